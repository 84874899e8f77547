"""cls_cross_attention: values, gradients, layouts, dropout, special values."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import BACKENDS, DTYPES, Case, native, run
from support.clsattn import CASES, DROPOUT, SMALL, clsattn
from support.isa import ISAS, check_isa
from support.oracle import check_against_float64
from torch import Tensor

from xattn_ops import cls_cross_attention
from xattn_ops.benchmarks.baselines import cls_absorbed, cls_eager, cls_sdpa

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
    """The definition, token by token and head by head; shares nothing with the reference."""
    heads, scale, eps = (case.options.get(n) for n in ("num_heads", "scale", "eps"))
    t = {name: tensors.get(name) for name in ("q_bias", "v_bias", "norm_weight", "norm_bias")}
    B, _, C = tensors["cls_token"].shape
    D, out = C // heads, torch.zeros(tensors["cls_token"].shape, dtype=torch.float64)

    def normed(token: Tensor) -> Tensor:
        if t["norm_weight"] is None:
            return token
        mean = sum(token) / C
        spread = sum((token - mean) ** 2) / C
        hat = (token - mean) / math.sqrt(spread + (1e-6 if eps is None else eps)) * t["norm_weight"]
        return hat if t["norm_bias"] is None else hat + t["norm_bias"]

    def projected(name: str, token: Tensor, head: int) -> Tensor:
        rows = slice(head * D, head * D + D)
        y = tensors[f"{name}_weight"][rows] @ token
        return y if tensors.get(f"{name}_bias") is None else y + tensors[f"{name}_bias"][rows]

    for b in range(B):
        tokens = [normed(x) for x in (tensors["cls_token"][b, 0], *tensors["patches"][b])]
        for h in range(heads):
            q = projected("q", tokens[0], h)
            powers = [math.exp(scale * (q @ projected("k", x, h)).item()) for x in tokens]
            for power, x in zip(powers, tokens, strict=True):
                out[b, 0, h * D : h * D + D] += power / sum(powers) * projected("v", x, h)
    return out


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(clsattn(2, 5, 2, 3), id="norm"),
        pytest.param(clsattn(1, 4, 3, 2, norm="weight", eps=0.3), id="norm_without_shift"),
        pytest.param(clsattn(2, 3, 1, 4, norm="none"), id="no_norm"),
        pytest.param(clsattn(1, 1, 2, 2, norm="none", bias=False), id="no_bias"),
    ],
)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64, requires_grad=False)
    got = case.reference(**tensors, **case.options)
    torch.testing.assert_close(got, attention_by_loops(case, tensors))


@backends
def test_scale_default(backend: str) -> None:
    case = clsattn(1, 6, 3, 4)
    tensors = case.tensors(torch.float64)
    outs = [
        case.function(**tensors, **case.options | {"scale": s}, backend=backend)
        for s in (None, 0.5)
    ]
    assert torch.equal(*outs)


def test_reference_twice_differentiable() -> None:
    case = clsattn(1, 3, 2, 2)
    names, tensors = list(case.shapes), list(case.tensors(torch.float64).values())

    def function(*tensors: Tensor) -> Tensor:
        return case.reference(**dict(zip(names, tensors, strict=True)), **case.options)

    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("formulation", [cls_eager, cls_sdpa, cls_absorbed])
@pytest.mark.parametrize("norm", ["affine", "none"])
def test_other_formulations_are_the_same_function(norm: str, formulation: Callable) -> None:
    """Among them the absorbed form, on which the kernels stand: values and all gradients."""
    case = clsattn(2, 9, 3, 4, norm=norm, scale=None)
    tensors, grad_out = case.tensors(torch.float64), case.grad_out(torch.float64)
    with torch.no_grad():
        tensors["q_weight"] /= 12
    plain = formulation(3)

    def function(**named: Tensor) -> Tensor:
        return plain(*named.values())

    got = run(function, tensors, grad_out)
    want = run(case.reference, tensors, grad_out, **case.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


# ------------------------------------------------------------------------------------- gradients


@backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(clsattn(2, 3, 2, 2), id="norm"),
        pytest.param(clsattn(1, 4, 1, 3, norm="weight", eps=0.1), id="norm_without_shift"),
        pytest.param(clsattn(2, 3, 2, 2, norm="none", bias=False), id="no_norm"),
        pytest.param(clsattn(1, 1, 2, 2), id="one_patch"),
        pytest.param(clsattn(2, 5, 2, 2, dropout_p=0.4), id="dropout"),
        pytest.param(clsattn(1, 3, 1, 2, scale=0.0), id="scale_zero"),
    ],
)
def test_gradcheck(case: Case, backend: str) -> None:
    names = list(case.shapes)

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        named = dict(zip(names, tensors, strict=True))
        return case.function(**named, backend=backend, **case.options)

    assert torch.autograd.gradcheck(function, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize("wanted", list(SMALL.shapes))
def test_gradient_of_one_input_alone(wanted: str, backend: str) -> None:
    tensors, grad_out = SMALL.tensors(torch.float64), SMALL.grad_out(torch.float64)
    every = run(cls_cross_attention, tensors, grad_out, backend=backend, **SMALL.options)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = cls_cross_attention(**tensors, backend=backend, **SMALL.options)
    out.backward(grad_out)
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensors[name].grad is None for name in tensors if name != wanted)


@native
@dtypes
def test_k_bias_has_no_effect_and_no_gradient(dtype: torch.dtype) -> None:
    case = clsattn(3, 30, 3, 16)
    tensors = case.tensors(dtype)
    got = run(case.function, tensors, case.grad_out(dtype), backend="cpu", **case.options)
    assert got["k_bias"].shape == (48,)
    assert got["k_bias"].dtype == dtype
    assert got["k_bias"].abs().max() == 0
    without = case.function(**tensors | {"k_bias": None}, backend="cpu", **case.options)
    assert torch.equal(without, got["out"])


@backends
@pytest.mark.parametrize("norm", ["affine", "none"])
def test_grad_out_of_a_sum(norm: str, backend: str) -> None:
    """`.sum().backward()` hands over a single expanded one."""
    case = clsattn(2, 30, 3, 16, norm=norm)
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
        pytest.param(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), id="tokens_first"),
        pytest.param(lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]], id="wider_rows"),
        pytest.param(lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]], id="more_tokens"),
        pytest.param(lambda t: torch.stack([t, t + 1], -1)[..., 0], id="every_other"),
        pytest.param(lambda t: t[:1].expand_as(t), id="expanded_batch"),
        pytest.param(lambda t: t[:, :1].expand_as(t), id="expanded_tokens"),
        pytest.param(lambda t: t[..., :1].expand_as(t), id="expanded_channels"),
    ],
)
def test_layouts(layout: Callable[[Tensor], Tensor], backend: str) -> None:
    case = clsattn(2, 19, 2, 16, norm="none")
    tensors = case.tensors(torch.float64, requires_grad=False)
    for name in ("cls_token", "patches"):
        tensors[name] = layout(tensors[name])
    for name in ("q_weight", "k_weight", "v_weight"):
        tensors[name] = tensors[name].mT.contiguous().mT
    grad_out = layout(case.grad_out(torch.float64))
    dense = {name: t.contiguous().requires_grad_() for name, t in tensors.items()}
    strided = {name: t.requires_grad_() for name, t in tensors.items()}
    want = run(case.function, dense, grad_out.contiguous(), backend=backend, **case.options)
    got = run(case.function, strided, grad_out, backend=backend, **case.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@backends
def test_token_and_patches_of_one_tensor(backend: str) -> None:
    """As in a model: x[:, :1] of one branch with x[:, 1:] of the same or another."""
    case = clsattn(2, 19, 2, 16)
    tensors = case.tensors(torch.float64)
    x = torch.cat([tensors["cls_token"], tensors["patches"]], 1).detach().requires_grad_()
    views = tensors | {"cls_token": x[:, :1], "patches": x[:, 1:]}
    grad_out = case.grad_out(torch.float64)
    want = run(case.function, tensors, grad_out, backend=backend, **case.options)
    out = case.function(**views, backend=backend, **case.options)
    torch.testing.assert_close(out, want["out"])
    out.backward(grad_out)
    torch.testing.assert_close(x.grad, torch.cat([want["cls_token"], want["patches"]], 1))


@backends
def test_output_is_contiguous(backend: str) -> None:
    tensors = SMALL.tensors(torch.float32)
    assert cls_cross_attention(**tensors, backend=backend, **SMALL.options).is_contiguous()


# ---------------------------------------------------------------------------------- determinism


@backends
@dtypes
@pytest.mark.parametrize("options", [{}, {"norm": "none", "dropout_p": 0.2}], ids=["plain", "all"])
def test_twice_bitwise_equal(options: dict, dtype: torch.dtype, backend: str) -> None:
    case = clsattn(3, 131, 3, 16, **options)
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
        pytest.param(clsattn(1, 400, 6, 32), id="batch_1"),
        pytest.param(clsattn(3, 196, 3, 16), id="batch_3"),
        pytest.param(clsattn(1, 2311, 1, 8, norm="none"), id="many_patches"),
        pytest.param(clsattn(2, 100, 2, 19, dropout_p=0.3), id="dropout"),
    ],
)
def test_threads_agree(case: Case, dtype: torch.dtype) -> None:
    """Also where N is split because batch and heads leave threads idle."""
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append(run(case.function, tensors, grad_out, backend="cpu", **case.options))
    for name, one in results[0].items():
        unit = torch.finfo(dtype).eps * one.abs().max().item()
        for other in results[1:]:
            torch.testing.assert_close(one, other[name], msg=name, rtol=0, atol=2 * unit)


# ------------------------------------------------------------------------------- special values


@backends
@pytest.mark.parametrize("dtype", DTYPES[:3])  # float64 could not judge itself here
@pytest.mark.parametrize("size", [pytest.param(1.0, id="1"), pytest.param(-3.0, id="-3")])
def test_extreme_logits(size: float, dtype: torch.dtype, backend: str) -> None:
    """The softmax subtracts its maximum: logits beyond the range of exp give right weights."""
    case = clsattn(16, 40, 2, 8, scale=size)
    check_against_float64(case, dtype, backend)


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
    wide = {name: t.requires_grad_() for name, t in tensors.items()}
    check_against_float64(case, dtype, backend, tensors=wide)


@native
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_norm_of_tokens_far_from_zero(dtype: torch.dtype) -> None:
    """The variance is that of the differences from the mean, not a difference of squares."""
    case = clsattn(2, 30, 3, 16)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["patches"] += 500
    tensors["cls_token"] -= 500
    check_against_float64(
        case, dtype, "cpu", tensors={n: t.requires_grad_() for n, t in tensors.items()}
    )


# --------------------------------------------------------------------------------- random cases


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    return clsattn(
        draw(st.integers(0, 4)),
        draw(st.integers(1, 90)),
        draw(st.integers(1, 9)),
        draw(st.integers(4, 24)),  # of two channels, a LayerNorm leaves the signs alone
        norm=draw(st.sampled_from(["affine", "affine", "weight", "none"])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([0.0, 0.005, -0.01])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from([param.values[0] for param in DTYPES]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    check_against_float64(case, dtype, BACKENDS[-1])


@native
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa: str) -> None:
    check_isa("clsattn", isa)


def test_backends_drop_the_same_weights() -> None:
    case = clsattn(2, 30, 3, 16, dropout_p=0.5)
    tensors, outs = case.tensors(torch.float64), []
    for backend in BACKENDS:
        torch.manual_seed(4)
        outs.append(case.function(**tensors, backend=backend, **case.options))
    for one, other in pairwise(outs):
        torch.testing.assert_close(one, other)
    torch.manual_seed(5)
    other = case.function(**tensors, backend=BACKENDS[-1], **case.options)
    assert not torch.allclose(other, outs[-1])
