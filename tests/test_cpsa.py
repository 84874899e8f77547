"""cross_patch_attention: values, gradients, layouts, dropout, and its module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import BACKENDS, DTYPES, Case, native, run
from support.cpsa import CASES, DROPOUT, SMALL, cpsa
from support.isa import ISAS, check_isa
from support.oracle import check_against_float64
from torch import Tensor

from xattn_ops import CrossPatchAttention, cross_patch_attention
from xattn_ops.cpsa import cross_patch_attention_reference

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@backends
@dtypes
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(case, dtype, backend)


@backends
@dtypes
@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(case, dtype, backend, seed=5)


# ------------------------------------------------------------------------- the reference itself


def attention_by_loops(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The definition, channel by channel and patch by patch; shares nothing with the reference."""
    x, (ph, pw), heads = tensors["x"], case.options["patch"], case.options.get("num_heads", 1)
    B, H, W, C = x.shape
    P, D = ph * pw, ph * pw // heads
    corners = [(y, x) for y in range(0, H, ph) for x in range(0, W, pw)]

    out = torch.zeros(B, H + ph, W + pw, C, dtype=x.dtype)
    for b, c in ((b, c) for b in range(B) for c in range(C)):
        tokens = torch.zeros(len(corners), P, dtype=x.dtype)
        for t, (top, left) in enumerate(corners):
            for i, j in ((i, j) for i in range(ph) for j in range(pw)):
                if top + i < H and left + j < W:
                    tokens[t, i * pw + j] = x[b, top + i, left + j, c]
        q, k, v = (tokens @ tensors["qkv_weight"].mT + tensors["qkv_bias"]).split(P, -1)
        mixed = torch.zeros_like(tokens)
        for h in (slice(n * D, n * D + D) for n in range(heads)):
            weights = (q[:, h] @ k[:, h].mT * case.options["scale"]).softmax(-1)
            mixed[:, h] = weights @ v[:, h]
        result = mixed @ tensors["proj_weight"].mT + tensors["proj_bias"]
        for t, (top, left) in enumerate(corners):
            out[b, top : top + ph, left : left + pw, c] = result[t].reshape(ph, pw)
    return out[:, :H, :W]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(cpsa(2, 5, 7, 2, patch=(2, 3)), id="padded"),
        pytest.param(cpsa(1, 6, 8, 3, patch=(3, 4), num_heads=3), id="heads"),
        pytest.param(cpsa(1, 2, 3, 2, patch=(3, 4), num_heads=2), id="one_token_padded"),
    ],
)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64, requires_grad=False)
    got = case.reference(**tensors, **case.options)
    torch.testing.assert_close(got, attention_by_loops(case, tensors))


def test_scale_default() -> None:
    case = cpsa(1, 6, 6, 2, patch=(3, 4), num_heads=3)
    tensors = case.tensors(torch.float64)
    outs = [case.reference(**tensors, **case.options | {"scale": s}) for s in (None, 0.5)]
    assert torch.equal(*outs)


def test_reference_twice_differentiable() -> None:
    case = cpsa(1, 3, 4, 1, patch=(2, 2), num_heads=2)
    tensors = list(case.tensors(torch.float64).values())
    assert torch.autograd.gradgradcheck(lambda *t: case.reference(*t, **case.options), tensors)


# ------------------------------------------------------------------------------------- gradients


@backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(cpsa(2, 3, 4, 1, patch=(2, 2)), id="padded"),
        pytest.param(cpsa(1, 4, 4, 1, patch=(2, 2), num_heads=2), id="heads"),
        pytest.param(cpsa(1, 2, 2, 3, patch=(2, 2)), id="one_token"),
        pytest.param(cpsa(1, 4, 4, 1, patch=(2, 2), dropout_p=0.4), id="dropout"),
        pytest.param(cpsa(1, 3, 4, 1, patch=(2, 2), scale=0.0), id="scale_zero"),
    ],
)
def test_gradcheck(case: Case, backend: str) -> None:
    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return cross_patch_attention(*tensors, backend=backend, **case.options)

    assert torch.autograd.gradcheck(function, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize("wanted", ["x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"])
def test_gradient_of_one_input_alone(wanted: str, backend: str) -> None:
    tensors, grad_out = SMALL.tensors(torch.float64), SMALL.grad_out(torch.float64)
    every = run(cross_patch_attention, tensors, grad_out, backend=backend, **SMALL.options)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = cross_patch_attention(**tensors, backend=backend, **SMALL.options)
    out.backward(grad_out)
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensors[name].grad is None for name in tensors if name != wanted)


@backends
@pytest.mark.parametrize("num_heads", [1, 7])
def test_grad_out_of_a_sum(num_heads: int, backend: str) -> None:
    """`.sum().backward()` hands over a single expanded one."""
    case = cpsa(2, 9, 14, 5, num_heads=num_heads)
    tensors = case.tensors(torch.float64)
    ones = torch.ones(case.out_shape, dtype=torch.float64)
    dense = run(case.function, tensors, ones, backend=backend, **case.options)
    case.function(**tensors, backend=backend, **case.options).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, dense[name], msg=name)


# --------------------------------------------------------------------------------------- layouts


@backends
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda t: t.mT.contiguous().mT, id="channels_strided"),
        pytest.param(lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), id="nchw"),
        pytest.param(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), id="columns_first"),
        pytest.param(lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]], id="wider_rows"),
        pytest.param(lambda t: torch.stack([t, t + 1], -1)[..., 0], id="every_other"),
        pytest.param(lambda t: t[:1].expand_as(t), id="expanded_batch"),
        pytest.param(lambda t: t[..., :1].expand_as(t), id="expanded_channels"),
    ],
)
def test_layouts(layout, backend: str) -> None:
    case = cpsa(2, 9, 8, 6, patch=(4, 3))
    tensors = case.tensors(torch.float64, requires_grad=False)
    tensors["x"] = layout(tensors["x"])
    tensors["qkv_weight"] = tensors["qkv_weight"].mT.contiguous().mT
    grad_out = layout(case.grad_out(torch.float64))
    dense = {name: t.contiguous().requires_grad_() for name, t in tensors.items()}
    strided = {name: t.requires_grad_() for name, t in tensors.items()}
    want = run(case.function, dense, grad_out.contiguous(), backend=backend, **case.options)
    got = run(case.function, strided, grad_out, backend=backend, **case.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@backends
def test_output_is_contiguous(backend: str) -> None:
    tensors = SMALL.tensors(torch.float32)
    assert cross_patch_attention(**tensors, backend=backend, **SMALL.options).is_contiguous()


# ---------------------------------------------------------------------------------- determinism


@backends
@dtypes
@pytest.mark.parametrize("options", [{}, {"num_heads": 7, "dropout_p": 0.2}], ids=["plain", "all"])
def test_twice_bitwise_equal(options: dict, dtype: torch.dtype, backend: str) -> None:
    case = cpsa(3, 14, 17, 18, **options)
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(case.function, tensors, grad_out, backend=backend, **case.options))
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name


@native
@pytest.mark.usefixtures("threads")
@dtypes
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(cpsa(1, 14, 14, 40), id="batch_1"),
        pytest.param(cpsa(3, 9, 14, 18), id="batch_3"),
        pytest.param(cpsa(2, 7, 7, 33), id="one_token"),
        pytest.param(cpsa(2, 14, 14, 6, num_heads=7), id="heads"),
    ],
)
def test_threads_agree(case: Case, dtype: torch.dtype) -> None:
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(case.function, tensors, grad_out, backend="cpu", **case.options))
    assert torch.equal(results[0]["out"], results[1]["out"])
    for name, one in results[0].items():
        unit = torch.finfo(dtype).eps * one.abs().max().item()
        torch.testing.assert_close(one, results[1][name], msg=name, rtol=0, atol=2 * unit)


# ------------------------------------------------------------------------------- special values


@backends
@pytest.mark.parametrize("dtype", DTYPES[:3])  # float64 could not judge itself here
@pytest.mark.parametrize("size", [pytest.param(0.5, id="0.5"), pytest.param(-1.0, id="-1")])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_extreme_logits(num_heads: int, size: float, dtype: torch.dtype, backend: str) -> None:
    """The softmax subtracts its maximum: logits beyond the range of exp give right weights."""
    case = cpsa(16, 9, 12, 8, patch=(4, 4), num_heads=num_heads, scale=size)
    check_against_float64(case, dtype, backend)


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


@backends
def test_one_token_is_a_linear_map(backend: str) -> None:
    """The weight of a lone patch is 1, so q and k do not matter and get no gradient."""
    case = cpsa(2, 7, 7, 18)
    tensors = case.tensors(torch.float64)
    got = run(case.function, tensors, case.grad_out(torch.float64), backend=backend, **case.options)
    tokens = tensors["x"].permute(0, 3, 1, 2).reshape(-1, 49)
    v = tokens @ tensors["qkv_weight"][98:].mT + tensors["qkv_bias"][98:]
    want = (v @ tensors["proj_weight"].mT + tensors["proj_bias"]).reshape(2, 18, 7, 7)
    torch.testing.assert_close(got["out"], want.permute(0, 2, 3, 1))
    assert got["qkv_weight"][:98].abs().max() == 0
    assert got["qkv_bias"][:98].abs().max() == 0


# --------------------------------------------------------------------------------- random cases


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    patch = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    divisors = [n for n in range(1, 26) if patch[0] * patch[1] % n == 0]
    return cpsa(
        draw(st.integers(0, 3)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 20)),
        patch=patch,
        qkv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
        num_heads=draw(st.sampled_from([1, *divisors])),
        scale=draw(st.sampled_from([0.0, 0.05, -0.1])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from([param.values[0] for param in DTYPES]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    check_against_float64(case, dtype, BACKENDS[-1])


@native
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa: str) -> None:
    check_isa("cpsa", isa)


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


@backends
def test_module_gradients_reach_every_parameter(backend: str) -> None:
    module = CrossPatchAttention((4, 3), backend=backend)
    module(torch.randn(2, 5, 7, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_module_dropout_in_training_alone() -> None:
    module = CrossPatchAttention((4, 3), attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(2, 5, 7, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("drop", ["attn_drop", "proj_drop"])
def test_module_dropout_follows_manual_seed(drop: str) -> None:
    module = CrossPatchAttention((4, 3), **{drop: 0.5})
    x, outs = torch.randn(2, 5, 7, 8), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(module(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
