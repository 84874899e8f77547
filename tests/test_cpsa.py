"""What is particular to cross_patch_attention: one patch alone, strange values, its module."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import backends, dtypes, interpreted
from support.cpsa import CASES, cpsa
from support.emulator import SHARED_LIMITS, emulated, emulator
from support.oracle import check_against_float64

from xattn_ops import CrossPatchAttention, cross_patch_attention
from xattn_ops.cpsa import cross_patch_attention_reference

# ------------------------------------------------------------------------------- special values


@backends
@pytest.mark.parametrize("num_heads", [1, 7])
def test_weights_sum_to_one(num_heads: int, backend: str) -> None:
    """With v = 1 everywhere and an identity projection, the output is 1."""
    case = cpsa(2, 9, 15, 5, num_heads=num_heads)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["qkv_weight"][98:] = 0
    tensors["qkv_bias"][98:] = 1
    tensors["proj_weight"].copy_(torch.eye(49))
    tensors["proj_bias"].zero_()
    out = cross_patch_attention(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out, torch.ones_like(out))


@backends
@dtypes
@pytest.mark.parametrize("num_heads", [1, 7])
def test_nan_stays_in_its_channel(num_heads: int, dtype: torch.dtype, backend: str) -> None:
    case = cpsa(2, 14, 16, 18, num_heads=num_heads)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][1, 8, 9, 4] = math.nan
    out = cross_patch_attention(**tensors, backend=backend, **case.options)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, :, :, 4] = True
    assert torch.equal(out.isnan(), expected)


def check_nan_stays_in_its_channel_of_a_shared_matrix(backend: str, dtype: torch.dtype) -> None:
    """Kernels for GPUs put the few tokens of several channels into one matrix."""
    case = cpsa(1, 14, 14, 18)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["x"][0, 8, 9, 4] = math.nan
    tensors["x"][0, 8, 9, 6] = math.inf
    out = cross_patch_attention(**tensors, backend=backend, **case.options)
    strange = (~out.isfinite()).all((0, 1, 2))
    assert strange.nonzero().flatten().tolist() == [4, 6]
    others = [c for c in range(18) if not strange[c]]
    assert out[..., others].isfinite().all()


@interpreted
def test_nan_stays_in_its_channel_of_a_shared_matrix_of_triton() -> None:
    check_nan_stays_in_its_channel_of_a_shared_matrix("triton", torch.float32)


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_nan_stays_in_its_channel_of_a_shared_matrix_of_cuda(dtype: torch.dtype) -> None:
    with emulator("checked"):
        check_nan_stays_in_its_channel_of_a_shared_matrix("cuda", dtype)


# What the cases of all operators leave out of the CUDA kernels: keys of many tokens that stay in
# shared memory or stream through it, in every type, and as many channels at a time as a card holds.
@emulated
@pytest.mark.parametrize("card", SHARED_LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["many_tokens", "tokens_64"])
def test_many_tokens_on_every_card(name: str, dtype: torch.dtype, card: str) -> None:
    (case,) = (given.values[0] for given in CASES if given.id == name)
    with emulator("plain", shared_limit=SHARED_LIMITS[card]):
        check_against_float64(case, dtype, "cuda")


@interpreted
@pytest.mark.parametrize(
    "name", ["cat_stage4_one_token", "padded_9x16", "rectangular_3x5", "tokens_20_padded"]
)
def test_tf32_takes_the_absorbed_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which float32 otherwise does not; interpreted, the products are exact all the same."""
    (case,) = (given.values[0] for given in CASES if given.id == name)
    monkeypatch.setattr("xattn_ops._triton.precision", lambda dtype: "tf32")
    monkeypatch.setattr("xattn_ops.cpsa.triton_direct.backward", None)
    check_against_float64(case, torch.float32, "triton")


@backends
def test_one_token_is_a_linear_map(backend: str) -> None:
    """The weight of a lone patch is 1, so q and k do not matter and get no gradient."""
    case = cpsa(2, 7, 7, 18)
    tensors = case.tensors(torch.float64)
    got = case.run(tensors, case.grad_outs(torch.float64), backend=backend)
    tokens = tensors["x"].permute(0, 3, 1, 2).reshape(-1, 49)
    v = tokens @ tensors["qkv_weight"][98:].mT + tensors["qkv_bias"][98:]
    want = (v @ tensors["proj_weight"].mT + tensors["proj_bias"]).reshape(2, 18, 7, 7)
    torch.testing.assert_close(got["out"], want.permute(0, 2, 3, 1))
    assert got["qkv_weight"][:98].abs().max() == 0
    assert got["qkv_bias"][:98].abs().max() == 0


# --------------------------------------------------------------------------------------- module


def test_module_keys_are_those_of_the_checkpoints() -> None:
    shapes = {k: tuple(v.shape) for k, v in CrossPatchAttention((3, 4)).state_dict().items()}
    assert shapes == {
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }


@backends
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_module_is_the_function(qkv_bias: bool, backend: str) -> None:
    module = CrossPatchAttention((4, 3), 2, qkv_bias=qkv_bias, scale=0.1, backend=backend).eval()
    x = torch.randn(2, 5, 7, 8)
    want = cross_patch_attention_reference(
        x,
        module.qkv.weight,
        module.qkv.bias,
        module.proj.weight,
        module.proj.bias,
        patch=(4, 3),
        num_heads=2,
        scale=0.1,
    )
    torch.testing.assert_close(module(x), want)
