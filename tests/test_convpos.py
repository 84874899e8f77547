"""What is particular to conv_position_encoding: prefix tokens, strange values, its module."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import backends, dtypes
from support.convpos import convpos

from xattn_ops import ConvPositionEncoding, conv_position_encoding
from xattn_ops.convrel import conv_position_encoding_reference


@backends
def test_output_is_no_view_of_the_input(backend: str) -> None:
    """Not even where there is nothing to add."""
    x, weight = torch.randn(2, 5, 4), torch.zeros(4, 1, 3, 3)
    before = x.clone()
    out = conv_position_encoding(x, weight, grid=(2, 2), backend=backend)
    assert torch.equal(out, x)
    out.zero_()
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------- special values


@backends
@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_prefix_tokens_pass_unchanged(value: float, dtype: torch.dtype, backend: str) -> None:
    """Bitwise, and nothing of them reaches the image."""
    case = convpos(2, (4, 5), 19, prefix=3)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][:, :3, 4] = value
    out = conv_position_encoding(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out[:, :3], tensors["x"][:, :3], rtol=0, atol=0, equal_nan=True)
    assert out[:, 3:].isfinite().all()


@backends
@dtypes
def test_nan_stays_in_its_window(dtype: torch.dtype, backend: str) -> None:
    case = convpos(2, (7, 9), 19)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][1, 1 + 6 * 9 + 3, 7] = math.nan  # (6, 3) on the last row
    out = conv_position_encoding(**tensors, backend=backend, **case.options)
    expected = torch.zeros(2, 7, 9, 19, dtype=torch.bool)
    expected[1, 5:, 2:5, 7] = True
    assert torch.equal(out[:, 1:].isnan().unflatten(1, (7, 9)), expected)


# --------------------------------------------------------------------------------------- module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    shapes = {k: tuple(v.shape) for k, v in ConvPositionEncoding(64).state_dict().items()}
    assert shapes == {"proj.weight": (64, 1, 3, 3), "proj.bias": (64,)}


@backends
@pytest.mark.parametrize("window", [1, 3, 5])
def test_module_is_the_function(window: int, backend: str) -> None:
    module = ConvPositionEncoding(8, window, num_prefix_tokens=2, backend=backend)
    x = torch.randn(2, 2 + 5 * 7, 8)
    want = conv_position_encoding_reference(
        x, module.proj.weight, module.proj.bias, grid=(5, 7), num_prefix_tokens=2
    )
    torch.testing.assert_close(module(x, (5, 7)), want)
