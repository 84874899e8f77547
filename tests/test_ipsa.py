"""What is particular to inner_patch_attention: Swin's mask, padding, strange values, its module."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import backends, dtypes
from support.ipsa import ipsa

from xattn_ops import InnerPatchAttention, inner_patch_attention
from xattn_ops.ipsa import inner_patch_attention_reference

# ------------------------------------------------------------------------- the reference itself


def test_shift_masks_as_swin_does() -> None:
    """Swin numbers nine regions by slices and forbids attention between different numbers."""
    from xattn_ops.ipsa.reference import same_region

    image = torch.zeros(14, 21)
    cuts = (slice(0, -7), slice(-7, -3), slice(-3, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        image[rows, columns] = number
    windows = image.reshape(2, 7, 3, 7).permute(0, 2, 1, 3).reshape(6, 49)
    swin = windows[:, :, None] == windows[:, None]
    assert torch.equal(same_region(14, 21, (7, 7), (3, 3), torch.device("cpu")), swin)


# ------------------------------------------------------------------------------- special values


@backends
def test_weights_sum_to_one(backend: str) -> None:
    """With v = 1 everywhere, the padding too, the output is 1."""
    case = ipsa(2, 9, 11, 2, 8, shift=(3, 2))
    tensors = case.tensors(torch.float32, requires_grad=False)
    for name in ("qkv", "pad_qkv"):
        tensors[name][..., 32:] = 1
    out = inner_patch_attention(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out, torch.ones_like(out))


@backends
@dtypes
def test_nan_stays_in_its_window(dtype: torch.dtype, backend: str) -> None:
    case = ipsa(2, 14, 21, 2, 8)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][1, 8, 9, :8] = math.nan  # the query of head 0
    tensors["qkv"][0, 0, 20, 40:] = math.nan  # the value of head 1
    out = inner_patch_attention(**tensors, backend=backend, **case.options)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 8, 9, :8] = True
    expected[0, :7, 14:, 8:] = True
    assert torch.equal(out.isnan(), expected)


@backends
def test_infinite_key_gives_nan_where_the_formula_does(backend: str) -> None:
    case = ipsa(1, 7, 14, 1, 8)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["qkv"][0, 3, 3, 8:16] = math.inf
    want = inner_patch_attention_reference(**tensors, **case.options)
    got = inner_patch_attention(**tensors, backend=backend, **case.options)
    assert want.isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    shapes = {k: tuple(v.shape) for k, v in InnerPatchAttention(8, 2, (3, 5)).state_dict().items()}
    assert shapes == {
        "relative_position_bias_table": (45, 2),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }


@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_module_pads_with_zero_tokens(qkv_bias: bool) -> None:
    """Padding the qkv with its bias is padding the tokens with zeros."""
    module = InnerPatchAttention(8, 2, (4, 3), (1, 2), qkv_bias=qkv_bias).double().eval()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    whole = torch.zeros(2, 8, 9, 8, dtype=torch.float64)
    whole[:, :5, :7] = x
    torch.testing.assert_close(module(x), module(whole)[:, :5, :7])
