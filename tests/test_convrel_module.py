"""The attention map and the module of conv_relative_attention."""

from __future__ import annotations

import pytest
import torch
from support.cases import Case, backends
from support.convrel import convrel
from torch import Tensor

from xattn_ops import ConvRelativeAttention
from xattn_ops.convrel import (
    ConvRelativePosition,
    conv_relative_attention_map,
    conv_relative_attention_reference,
)

# --------------------------------------------------------------------------------- attention map


def map_of(case: Case, **options: int) -> tuple[Tensor, dict[str, Tensor]]:
    tensors = case.tensors(torch.float64, requires_grad=False)
    weights = [t for name, t in tensors.items() if name.startswith("weight")]
    given = case.options | options
    return conv_relative_attention_map(tensors["qkv"], weights, **given), tensors


@pytest.mark.parametrize("query", [0, 17])
def test_map_times_values_is_the_factorised_term(query: int) -> None:
    case = convrel(2, (5, 6), 3, 4, scale=0.3)
    row, tensors = map_of(case, query=query)
    assert row.shape == (2, 3, 31)
    v = tensors["qkv"].unflatten(-1, (3, 3, 4))[:, :, 2]  # [B, N, heads, D]
    out = case.reference(**tensors, **case.options)
    torch.testing.assert_close(torch.einsum("bhn,bnhd->bhd", row, v).flatten(1), out[:, query])


@pytest.mark.parametrize("query", [0, 1, 2, 18, 31], ids=["cls", "second", "corner", "mid", "end"])
@pytest.mark.parametrize("window", [3, 7, 13])
def test_map_holds_the_relative_term(window: int, query: int) -> None:
    """With one channel a head nothing is averaged, and the map gives the whole output."""
    case = convrel(2, (5, 6), 3, 1, (window, 2), (1, 1), bias=False, prefix=2)
    row, tensors = map_of(case, query=query)
    out = case.reference(**tensors, **case.options)
    values = torch.einsum("bhn,bnh->bh", row, tensors["qkv"][..., 6:])
    torch.testing.assert_close(values, out[:, query])


def test_map_averages_the_relative_term_over_a_head() -> None:
    case = convrel(1, (3, 4), 1, 2, (3, 2), prefix=0)
    row, tensors = map_of(case, query=5)  # at (1, 1)
    plain, _ = map_of(convrel(1, (3, 4), 1, 2, prefix=0), query=5)
    q, kernels = tensors["qkv"][0, 5, :2], tensors["weight_0"][:, 0]
    want = torch.zeros(3, 4, dtype=torch.float64)
    want[:, :3] = (q[:, None, None] * kernels).mean(0)
    torch.testing.assert_close((row - plain)[0, 0].view(3, 4), want)


# --------------------------------------------------------------------------------------- module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    module = ConvRelativeAttention(152)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {
        "qkv.weight": (456, 152),
        "qkv.bias": (456,),
        "crpe.conv_list.0.weight": (38, 1, 3, 3),
        "crpe.conv_list.0.bias": (38,),
        "crpe.conv_list.1.weight": (57, 1, 5, 5),
        "crpe.conv_list.1.bias": (57,),
        "crpe.conv_list.2.weight": (57, 1, 7, 7),
        "crpe.conv_list.2.bias": (57,),
        "proj.weight": (152, 152),
        "proj.bias": (152,),
    }


@backends
@pytest.mark.parametrize("windows", [{}, {7: 1, 3: 3}], ids=["no_relative_term", "7_and_3"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_module_is_the_function(qkv_bias: bool, windows: dict, backend: str) -> None:
    options = {"windows": windows, "qkv_bias": qkv_bias, "scale": 0.1, "num_prefix_tokens": 2}
    module = ConvRelativeAttention(12, 4, **options, backend=backend).eval()
    x = torch.randn(2, 2 + 5 * 7, 12)
    convs = module.crpe.conv_list if windows else []
    out = conv_relative_attention_reference(
        module.qkv(x),
        [conv.weight for conv in convs],
        [conv.bias for conv in convs],
        num_heads=4,
        grid=(5, 7),
        num_prefix_tokens=2,
        scale=0.1,
    )
    torch.testing.assert_close(module(x, (5, 7)), module.proj(out))


def test_modules_share_the_relative_term() -> None:
    shared = ConvRelativePosition(16, 8)
    blocks = torch.nn.ModuleList(ConvRelativeAttention(16, relative=shared) for _ in range(2))
    own = sum(p.numel() for p in blocks.parameters())
    alone = sum(p.numel() for p in ConvRelativeAttention(16).parameters())
    kernels = sum(p.numel() for p in shared.parameters())
    assert own == 2 * alone - kernels
    x = torch.randn(2, 1 + 4 * 5, 16)
    blocks[1](blocks[0](x, (4, 5)), (4, 5)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in shared.parameters())
