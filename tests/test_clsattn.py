"""What is particular to cls_cross_attention: its other forms, its norm, strange values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import DTYPES, assert_same, backends, dtypes, leaves, native
from support.clsattn import clsattn
from support.oracle import check_against_float64
from torch import Tensor

from xattn_ops import cls_cross_attention
from xattn_ops.benchmarks.baselines import cls_absorbed, cls_eager, cls_sdpa

# ------------------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("formulation", [cls_eager, cls_sdpa, cls_absorbed])
@pytest.mark.parametrize("norm", ["affine", "none"])
def test_other_formulations_are_the_same_function(norm: str, formulation: Callable) -> None:
    """Among them the absorbed form, on which the kernels stand: values and all gradients."""
    case = clsattn(2, 9, 3, 4, norm=norm, scale=None)
    tensors, grad_outs = case.tensors(torch.float64), case.grad_outs(torch.float64)
    with torch.no_grad():
        tensors["q_weight"] /= 12
    plain = formulation(3)

    def function(**given: Any) -> Tensor:
        return plain(*(given[name] for name in tensors))

    got = case.run(tensors, grad_outs, function)
    want = case.run(tensors, grad_outs, case.reference)
    assert_same(got, want)


# ------------------------------------------------------------------------------------- gradients


@native
@dtypes
def test_k_bias_has_no_effect_and_no_gradient(dtype: torch.dtype) -> None:
    case = clsattn(3, 30, 3, 16)
    tensors = case.tensors(dtype)
    got = case.run(tensors, case.grad_outs(dtype), backend="cpu")
    assert got["k_bias"].shape == (48,)
    assert got["k_bias"].dtype == dtype
    assert got["k_bias"].abs().max() == 0
    without = case.function(**tensors | {"k_bias": None}, backend="cpu", **case.options)
    assert torch.equal(without, got["out"])


# --------------------------------------------------------------------------------------- layouts


@backends
def test_token_and_patches_of_one_tensor(backend: str) -> None:
    """As in a model: x[:, :1] of one branch with x[:, 1:] of the same or another."""
    case = clsattn(2, 19, 2, 16)
    tensors = case.tensors(torch.float64)
    x = torch.cat([tensors["cls_token"], tensors["patches"]], 1).detach().requires_grad_()
    views = tensors | {"cls_token": x[:, :1], "patches": x[:, 1:]}
    grad_outs = case.grad_outs(torch.float64)
    want = case.run(tensors, grad_outs, backend=backend)
    out = case.function(**views, backend=backend, **case.options)
    torch.testing.assert_close(out, want["out"])
    out.backward(*grad_outs)
    torch.testing.assert_close(x.grad, torch.cat([want["cls_token"], want["patches"]], 1))


# ------------------------------------------------------------------------------- special values


@backends
@pytest.mark.parametrize("norm", ["affine", "none"])
def test_weights_sum_to_one(norm: str, backend: str) -> None:
    """With v = 1 everywhere the output is 1."""
    case = clsattn(2, 30, 3, 16, norm=norm)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["v_weight"].zero_()
    tensors["v_bias"].fill_(1)
    out = cls_cross_attention(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out, torch.ones_like(out))


@backends
@dtypes
def test_patches_in_any_order(dtype: torch.dtype, backend: str) -> None:
    case = clsattn(2, 30, 3, 16)
    tensors = case.tensors(dtype, requires_grad=False)
    out = cls_cross_attention(**tensors, backend=backend, **case.options)
    tensors["patches"] = tensors["patches"].flip(1)
    other = cls_cross_attention(**tensors, backend=backend, **case.options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(other, out, rtol=0, atol=8 * eps * out.abs().max().item())


@backends
@dtypes
@pytest.mark.parametrize("at", [0, 1, 37, 72], ids=["cls", "first", "inside", "last"])
def test_one_token_takes_all(at: int, dtype: torch.dtype, backend: str) -> None:
    """Its value alone is left, wherever it stands; the maximum comes early or late."""
    case = clsattn(2, 72, 2, 4, norm="none", bias=False)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["k_weight"].copy_(torch.eye(8))
    tensors["q_weight"].zero_()
    q_bias = torch.ones(8, dtype=dtype)
    one = tensors["cls_token"][:, 0] if at == 0 else tensors["patches"][:, at - 1]
    one.fill_(64)
    options = case.options | {"scale": 4.0, "q_bias": q_bias}
    out = cls_cross_attention(**tensors, **options, backend=backend)
    want = (one.double() @ tensors["v_weight"].double().mT)[:, None]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=4 * eps, atol=256 * eps)


@backends
@dtypes
@pytest.mark.parametrize("norm", ["affine", "none"])
def test_nan_stays_in_its_image(norm: str, dtype: torch.dtype, backend: str) -> None:
    case = clsattn(3, 30, 2, 8, norm=norm)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["patches"][1, 20, 3] = math.nan
    out = cls_cross_attention(**tensors, backend=backend, **case.options)
    assert out[1].isnan().all()
    assert not out[0::2].isnan().any()


@backends
@dtypes
def test_constant_tokens_under_the_norm(dtype: torch.dtype, backend: str) -> None:
    """A token without variance is normalised to zeros by eps, not to NaN."""
    case = clsattn(2, 30, 3, 16)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["patches"][0, 4] = 3.0
    tensors["cls_token"][1] = 0.0
    check_against_float64(case, dtype, backend, tensors=leaves(tensors))


@native
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_norm_of_tokens_far_from_zero(dtype: torch.dtype) -> None:
    """The variance is that of the differences from the mean, not a difference of squares."""
    case = clsattn(2, 30, 3, 16)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["patches"] += 500
    tensors["cls_token"] -= 500
    check_against_float64(case, dtype, "cpu", tensors=leaves(tensors))
