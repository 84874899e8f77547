"""The attention map and the module of cls_cross_attention."""

from __future__ import annotations

import pytest
import torch
from support.cases import backends
from support.clsattn import clsattn

from xattn_ops import ClsCrossAttention, cls_cross_attention
from xattn_ops.clsattn import cls_cross_attention_map, cls_cross_attention_reference

VALUES = ("v_weight", "v_bias")

# --------------------------------------------------------------------------------- attention map


@pytest.mark.parametrize("norm", ["affine", "weight", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_map_times_values_is_the_output(norm: str, bias: bool) -> None:
    case = clsattn(2, 11, 3, 4, norm=norm, bias=bias, scale=0.05, eps=0.1)
    tensors = case.tensors(torch.float64, requires_grad=False)
    given = {n: t for n, t in (tensors | case.options).items() if n not in VALUES}
    weights = cls_cross_attention_map(**given)
    assert weights.shape == (2, 3, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))

    x = torch.cat([tensors["cls_token"], tensors["patches"]], 1)
    if norm != "none":
        scales = tensors["norm_weight"], tensors.get("norm_bias")
        x = torch.nn.functional.layer_norm(x, (12,), *scales, 0.1)
    v = torch.nn.functional.linear(x, tensors["v_weight"], tensors.get("v_bias"))
    out = torch.einsum("bhn,bnhd->bhd", weights, v.unflatten(-1, (3, 4))).reshape(2, 1, 12)
    torch.testing.assert_close(out, case.reference(**tensors, **case.options))


def test_map_is_differentiable() -> None:
    case = clsattn(1, 3, 2, 2)
    tensors = {n: t for n, t in case.tensors(torch.float64).items() if n not in VALUES}
    names = list(tensors)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return cls_cross_attention_map(**dict(zip(names, values, strict=True)), num_heads=2)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


# --------------------------------------------------------------------------------------- module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    module = ClsCrossAttention(12, 3)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {
        f"{layer}.{kind}": (12, 12) if kind == "weight" else (12,)
        for layer in ("wq", "wk", "wv", "proj")
        for kind in ("weight", "bias")
    }
    assert "wq.bias" not in ClsCrossAttention(12, 3, qkv_bias=False).state_dict()


@backends
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm(12, 0.2)], ids=["no_norm", "norm"])
def test_module_is_the_function(norm, qkv_bias: bool, backend: str) -> None:
    module = ClsCrossAttention(12, 3, qkv_bias=qkv_bias, scale=0.3, backend=backend).eval()
    cls, patches = torch.randn(2, 1, 12), torch.randn(2, 7, 12)
    out = cls_cross_attention_reference(
        cls,
        patches,
        *(t for layer in (module.wq, module.wk, module.wv) for t in (layer.weight, layer.bias)),
        num_heads=3,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        eps=0.2,
        scale=0.3,
    )
    torch.testing.assert_close(module(cls, patches, norm), module.proj(out))


def test_no_query_is_left_out() -> None:
    """CLS attends to itself too: without patches that matter, it gets its own value back."""
    cls, patches, eye = torch.randn(2, 1, 4), torch.zeros(2, 3, 4), torch.eye(4)
    out = cls_cross_attention(cls, patches, 50 * eye, None, eye, None, eye, None, num_heads=1)
    torch.testing.assert_close(out, cls, rtol=0.1, atol=0.1)
