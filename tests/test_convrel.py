"""conv_relative_attention: values, gradients, layouts, memory, special values."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import peak
from support.cases import BACKENDS, DTYPES, Case, native, run
from support.convrel import CASES, LAYOUTS, SMALL, coat, convrel
from support.isa import ISAS, check_isa
from support.oracle import check_against_float64
from torch import Tensor

from xattn_ops import conv_relative_attention

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@backends
@dtypes
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(case, dtype, backend)


# ------------------------------------------------------------------------- the reference itself


def attention_by_loops(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The definition, token by token and channel by channel; shares nothing with the reference."""
    qkv, heads, prefix = (
        tensors["qkv"],
        case.options["num_heads"],
        case.options["num_prefix_tokens"],
    )
    H, W = case.options["grid"]
    B, N, C3 = qkv.shape
    C, D = C3 // 3, C3 // 3 // heads
    weights = [t for name, t in tensors.items() if name.startswith("weight")]
    biases = [t for name, t in tensors.items() if name.startswith("bias")]
    kernels = [kernel for w in weights for kernel in w[:, 0]]  # one for each channel
    bias = torch.cat(biases) if biases else qkv.new_zeros(C)

    out = torch.zeros(B, N, C, dtype=qkv.dtype)
    for b, n, c in ((b, n, c) for b in range(B) for n in range(N) for c in range(C)):
        for d in range(c // D * D, c // D * D + D):
            keys = [math.exp(qkv[b, m, C + d].item()) for m in range(N)]
            mean = sum(k * qkv[b, m, 2 * C + c] for m, k in enumerate(keys)) / sum(keys)
            out[b, n, c] += qkv[b, n, d] * mean / math.sqrt(D)
        if n < prefix or not kernels:
            continue
        (y, x), r = divmod(n - prefix, W), kernels[c].shape[0] // 2
        near = bias[c].clone()
        for dy, dx in ((dy, dx) for dy in range(-r, r + 1) for dx in range(-r, r + 1)):
            if 0 <= y + dy < H and 0 <= x + dx < W:
                value = qkv[b, prefix + (y + dy) * W + x + dx, 2 * C + c]
                near += kernels[c][dy + r, dx + r] * value
        out[b, n, c] += qkv[b, n, c] * near
    return out


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(convrel(2, (3, 4), 2, 2, (3, 3), (5, 1)), id="groups"),
        pytest.param(convrel(1, (2, 3), 1, 3, (7, 3), prefix=0), id="no_prefix"),
        pytest.param(convrel(1, (4, 2), 1, 2, (3, 2), prefix=2, bias=False), id="no_bias"),
        pytest.param(convrel(1, (2, 3), 2, 2), id="no_relative_term"),
    ],
)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64, requires_grad=False)
    got = case.reference(**tensors, **case.options)
    torch.testing.assert_close(got, attention_by_loops(case, tensors))


def test_reference_twice_differentiable() -> None:
    case = convrel(1, (2, 3), 2, 2, (3, 1), (1, 3))
    names, tensors = list(case.shapes), list(case.tensors(torch.float64).values())

    def function(*tensors: Tensor) -> Tensor:
        return case.reference(**dict(zip(names, tensors, strict=True)), **case.options)

    assert torch.autograd.gradgradcheck(function, tensors)


@backends
def test_scale_default(backend: str) -> None:
    tensors = convrel(1, (3, 5), 3, 4, (3, 12)).tensors(torch.float64)
    case = convrel(1, (3, 5), 3, 4, (3, 12))
    outs = [case.function(**tensors, **case.options, scale=s, backend=backend) for s in (None, 0.5)]
    assert torch.equal(*outs)


@backends
def test_lists_tuples_and_absent_biases(backend: str) -> None:
    """Lists or tuples; no biases are None or a None for each weight."""
    case = convrel(2, (5, 6), 2, 4, (3, 3), (5, 5), bias=False)
    qkv, *weights = case.tensors(torch.float32, requires_grad=False).values()
    outs = [
        conv_relative_attention(qkv, given, absent, **case.options, backend=backend)
        for given in (weights, tuple(weights))
        for absent in (None, [None, None], (None, None))
    ]
    assert all(torch.equal(*two) for two in pairwise(outs))


# ------------------------------------------------------------------------------------- gradients


@backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(convrel(2, (2, 3), 2, 2, (3, 1), (5, 3)), id="groups"),
        pytest.param(convrel(1, (3, 2), 1, 3, (3, 3), prefix=0, bias=False), id="no_prefix"),
        pytest.param(convrel(1, (1, 4), 1, 2, (3, 2), prefix=3), id="prefix_3"),
        pytest.param(convrel(2, (2, 3), 2, 2), id="no_relative_term"),
        pytest.param(convrel(1, (2, 3), 1, 2, (3, 2), scale=0.0), id="scale_zero"),
    ],
)
def test_gradcheck(case: Case, backend: str) -> None:
    names = list(case.shapes)

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        return case.function(**named, backend=backend, **case.options)

    assert torch.autograd.gradcheck(function, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize("wanted", list(SMALL.shapes))
def test_gradient_of_one_input_alone(wanted: str, backend: str) -> None:
    tensors, grad_out = SMALL.tensors(torch.float64), SMALL.grad_out(torch.float64)
    every = run(SMALL.function, tensors, grad_out, backend=backend, **SMALL.options)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = SMALL.function(**tensors, backend=backend, **SMALL.options)
    out.backward(grad_out)
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensors[name].grad is None for name in tensors if name != wanted)


@backends
def test_grad_out_of_a_sum(backend: str) -> None:
    """`.sum().backward()` hands over a single expanded one."""
    case = convrel(2, (9, 8), 2, 16, (3, 10), (7, 22))
    tensors = case.tensors(torch.float64)
    ones = torch.ones(case.out_shape, dtype=torch.float64)
    dense = run(case.function, tensors, ones, backend=backend, **case.options)
    case.function(**tensors, backend=backend, **case.options).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, dense[name], msg=name)


# --------------------------------------------------------------------------------------- layouts


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend: str) -> None:
    case = convrel(2, (5, 8), 2, 16, (3, 10), (5, 22))
    tensors = case.tensors(torch.float64, requires_grad=False)
    tensors["qkv"] = layout(tensors["qkv"])
    tensors["weight_0"] = tensors["weight_0"].mT.contiguous().mT
    grad_out = layout(case.grad_out(torch.float64))
    dense = {name: t.contiguous().requires_grad_() for name, t in tensors.items()}
    strided = {name: t.requires_grad_() for name, t in tensors.items()}
    want = run(case.function, dense, grad_out.contiguous(), backend=backend, **case.options)
    got = run(case.function, strided, grad_out, backend=backend, **case.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@backends
@pytest.mark.parametrize("groups", [[], [(3, 8)]], ids=["no_relative_term", "relative_term"])
def test_output_is_contiguous(groups: list, backend: str) -> None:
    case = convrel(2, (5, 8), 2, 4, *groups)
    tensors = case.tensors(torch.float32)
    assert case.function(**tensors, backend=backend, **case.options).is_contiguous()


# ---------------------------------------------------------------------- determinism and memory


@backends
@dtypes
def test_twice_bitwise_equal(dtype: torch.dtype, backend: str) -> None:
    case = convrel(3, (13, 11), 8, 8, *coat(8, 8))
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    first, second = (
        run(case.function, tensors, grad_out, backend=backend, **case.options) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@native
@pytest.mark.usefixtures("threads")
@dtypes
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(convrel(1, (14, 14), 8, 8, *coat(8, 8)), id="batch_1"),
        pytest.param(convrel(3, (7, 9), 8, 19, *coat(8, 19)), id="batch_3"),
        pytest.param(convrel(1, (56, 56), 2, 16, (3, 32)), id="many_tokens"),
    ],
)
def test_threads_agree(case: Case, dtype: torch.dtype) -> None:
    """Bitwise: every sum is made of the same parts in the same order."""
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case.function, tensors, grad_out, backend="cpu", **case.options))
    for name, one in results[0].items():
        assert torch.equal(one, results[1][name]), name
        assert torch.equal(one, results[2][name]), name


@native
@pytest.mark.skipif(not peak.CLEAR.exists(), reason="needs Linux's /proc/self/clear_refs")
def test_linear_memory() -> None:
    """16,384 tokens: beyond the results less than one copy of q, where N x N would be 1 GiB."""
    tokens = 128 * 128 + 1
    copy = 4 * peak.HEADS * peak.D * tokens
    taken, results = peak.peak_of_step(128, 128)
    assert results >= 4 * copy  # out and the gradients of q, k, v
    assert taken < results + copy


# ------------------------------------------------------------------------------- special values


@backends
@pytest.mark.parametrize("dtype", DTYPES[:3])  # float64 could not judge itself here
@pytest.mark.parametrize("size", [pytest.param(60.0, id="60"), pytest.param(-500.0, id="-500")])
def test_extreme_keys(size: float, dtype: torch.dtype, backend: str) -> None:
    """The softmax subtracts its maximum: keys far beyond the range of exp give right weights."""
    case = convrel(3, (9, 10), 2, 16, (3, 32))
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][..., 32:64] *= size
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    check_against_float64(case, dtype, backend, tensors=tensors)


@backends
@dtypes
@pytest.mark.parametrize("at", [0, 1, 37, 72], ids=["prefix", "first", "inside", "last"])
def test_one_key_takes_all(at: int, dtype: torch.dtype, backend: str) -> None:
    """Its value alone is left, wherever it stands; its column's maximum comes early or late."""
    case = convrel(2, (8, 9), 2, 4)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][:, at, 8:16] = 1000.0
    out = case.function(**tensors, **case.options, backend=backend)
    q, _, v = tensors["qkv"].double().unflatten(-1, (3, 2, 4)).unbind(2)
    want = 0.5 * q.sum(-1, keepdim=True) * v[:, at][:, None]  # [B, N, heads, D]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want.flatten(2), rtol=4 * eps, atol=16 * eps)


@backends
def test_weights_sum_to_one(backend: str) -> None:
    """With v = 1 everywhere the first term is the sum of q, whatever the keys."""
    case = convrel(2, (9, 11), 2, 8)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["qkv"][..., 32:] = 1
    out = case.function(**tensors, backend=backend, **case.options, scale=1.0)
    want = tensors["qkv"][..., :16].unflatten(-1, (2, 8)).sum(-1, keepdim=True).expand(2, 100, 2, 8)
    torch.testing.assert_close(out, want.flatten(2))


@backends
@dtypes
def test_nan_stays_where_it_belongs(dtype: torch.dtype, backend: str) -> None:
    case = convrel(2, (7, 9), 2, 8, (3, 16))
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][0, 30, 3] = math.nan  # a query of head 0: its token and head
    tensors["qkv"][1, 5, 16 + 9] = math.nan  # a key of head 1: every query of that head
    out = case.function(**tensors, backend=backend, **case.options)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 30, :8] = True
    expected[1, :, 8:] = True
    assert torch.equal(out.isnan(), expected)


@backends
@dtypes
@pytest.mark.parametrize("masked", [slice(0, 90), slice(1, 100), slice(40, 64)])
def test_keys_of_minus_infinity_take_nothing(
    masked: slice, dtype: torch.dtype, backend: str
) -> None:
    """Also where the first block of keys has no finite maximum."""
    case = convrel(2, (9, 11), 2, 8)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][:, masked, 16:32] = -math.inf
    out = case.function(**tensors, **case.options, backend=backend)
    assert out.isfinite().all()
    check_against_float64(
        case, dtype, backend, tensors={n: t.requires_grad_() for n, t in tensors.items()}
    )


@backends
@pytest.mark.parametrize(
    ("channel", "value"),
    [
        pytest.param(3, math.inf, id="query"),
        pytest.param(10, math.inf, id="key"),
        pytest.param(18, math.inf, id="value"),
        pytest.param(slice(8, 16), -math.inf, id="all_keys"),
    ],
)
def test_infinities_give_what_the_formula_does(channel, value: float, backend: str) -> None:
    case = convrel(1, (5, 7), 1, 8, (3, 8))
    tensors = case.tensors(torch.float32, requires_grad=False)
    tokens = slice(None) if isinstance(channel, slice) else 20
    tensors["qkv"][0, tokens, channel] = value
    want = case.reference(**tensors, **case.options)
    got = case.function(**tensors, backend=backend, **case.options)
    assert not want.isfinite().all()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- random cases


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    heads, D = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    cuts = sorted(draw(st.sets(st.integers(1, heads * D), max_size=3)) | {0, heads * D})
    groups = [(draw(st.sampled_from([1, 3, 5, 7, 9])), b - a) for a, b in pairwise(cuts)]
    return convrel(
        draw(st.integers(0, 3)),
        (draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        heads,
        D,
        *(groups if draw(st.integers(0, 4)) else []),
        bias=draw(st.booleans()),
        prefix=draw(st.sampled_from([0, 1, 1, 3])),
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from([param.values[0] for param in DTYPES]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    check_against_float64(case, dtype, BACKENDS[-1])


@native
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa(isa: str) -> None:
    check_isa("convrel", isa)
