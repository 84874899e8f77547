"""digest_attention: values, gradients, layouts, dropout and memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import BACKENDS, DTYPES, Case, native, run
from support.digest import CASES, DROPOUT, SMALL, digest
from support.isa import ISAS, check_isa
from support.oracle import check_against_float64
from torch import Tensor

from xattn_ops import digest_attention
from xattn_ops.digest import digest_attention_reference

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
TENSORS = ["qkv", "digest_kv", "bias_table", "digest_bias"]


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
    """The definition, token by token; shares nothing with the reference."""
    qkv, digest_kv, table, digest_bias = (tensors[name] for name in TENSORS)
    B, N, C3 = qkv.shape
    heads, (_, gw) = case.options["num_heads"], case.options["grid"]
    prefix, C, D = case.options["num_prefix_tokens"], C3 // 3, C3 // 3 // heads
    out = torch.empty(B, N, C, dtype=qkv.dtype)
    for b, i, h in ((b, i, h) for b in range(B) for i in range(N) for h in range(heads)):
        q = qkv[b, i, h * D : h * D + D]
        logits, values = [], []
        for j in range(N):
            k, v = (qkv[b, j, part * C + h * D : part * C + h * D + D] for part in (1, 2))
            bias = 0.0
            if i >= prefix and j >= prefix:
                (y, x), (ky, kx) = divmod(i - prefix, gw), divmod(j - prefix, gw)
                bias = table[h, abs(y - ky) * gw + abs(x - kx)]
            logits.append(q @ k / math.sqrt(D) + bias)
            values.append(v)
        for m in range(digest_kv.shape[1]):
            k, v = (digest_kv[b, m, part * C + h * D : part * C + h * D + D] for part in (0, 1))
            logits.append(q @ k / math.sqrt(D) + digest_bias[h, m])
            values.append(v)
        out[b, i, h * D : h * D + D] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(digest(2, (3, 4), 2, 3, M=2), id="grid"),
        pytest.param(digest(1, (4, 2), 1, 2, M=5, prefix=2), id="prefix"),
    ],
)
def test_reference_is_the_definition(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    got = case.reference(**tensors, **case.options)
    torch.testing.assert_close(got, attention_by_loops(case, tensors))


def test_reference_twice_differentiable() -> None:
    case = digest(1, (2, 3), 1, 2, M=2, prefix=1)
    tensors = list(case.tensors(torch.float64).values())
    assert torch.autograd.gradgradcheck(lambda *t: case.reference(*t, **case.options), tensors)


@backends
def test_no_digests_is_none(backend: str) -> None:
    """M = 0 and digest_kv=None are one thing."""
    case = digest(2, (4, 5), 2, 8, M=0)
    tensors = case.tensors(torch.float32, requires_grad=False)
    got = digest_attention(**tensors, backend=backend, **case.options)
    del tensors["digest_kv"], tensors["digest_bias"]
    assert torch.equal(got, digest_attention(**tensors, backend=backend, **case.options))


# ------------------------------------------------------------------------------------- gradients


@backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(digest(1, (2, 3), 2, 1, M=2), id="grid"),
        pytest.param(digest(2, (2, 2), 1, 2, M=1, prefix=1), id="prefix"),
        pytest.param(digest(1, (3, 2), 1, 2, M=2, dropout_p=0.4), id="dropout"),
        pytest.param(digest(1, (3, 2), 1, 2, M=2, scale=0.0), id="scale_zero"),
    ],
)
def test_gradcheck(case: Case, backend: str) -> None:
    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return digest_attention(*tensors, backend=backend, **case.options)

    assert torch.autograd.gradcheck(function, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize("wanted", TENSORS)
def test_gradient_of_one_input_alone(wanted: str, backend: str) -> None:
    tensors, grad_out = SMALL.tensors(torch.float64), SMALL.grad_out(torch.float64)
    every = run(digest_attention, tensors, grad_out, backend=backend, **SMALL.options)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    out = digest_attention(**tensors, backend=backend, **SMALL.options)
    out.backward(grad_out)
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensors[name].grad is None for name in tensors if name != wanted)


@backends
def test_grad_out_of_a_sum(backend: str) -> None:
    """`.sum().backward()` hands over a single expanded one."""
    case = digest(2, (5, 7), 2, 8, M=3)
    tensors = case.tensors(torch.float32)
    dense = run(case.function, tensors, torch.ones(case.out_shape), backend=backend, **case.options)
    case.function(**tensors, backend=backend, **case.options).sum().backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, dense[name], msg=name)


# --------------------------------------------------------------------------------------- layouts


@backends
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda t: t.mT.contiguous().mT, id="channels_strided"),
        pytest.param(lambda t: t.transpose(0, 2).contiguous().transpose(0, 2), id="mixed"),
        pytest.param(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), id="tokens_first"),
        pytest.param(lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]], id="wider_rows"),
        pytest.param(lambda t: torch.stack([t, t + 1], -1)[..., 0], id="every_other"),
        pytest.param(lambda t: t.flip(1).contiguous().flip(1), id="flipped"),
        pytest.param(lambda t: t[:1].expand_as(t), id="expanded_batch"),
        pytest.param(lambda t: t[:, :1].expand_as(t), id="expanded_tokens"),
        pytest.param(
            lambda t: torch.cat([t[:1, :1].reshape(-1), t.flatten()])[-t.numel() :].view_as(t),
            id="offset",
        ),
    ],
)
def test_layouts(layout, backend: str) -> None:
    case = digest(2, (5, 4), 2, 8, M=6, prefix=1)
    tensors = case.tensors(torch.float32, requires_grad=False)
    for name in ("qkv", "digest_kv"):
        tensors[name] = layout(tensors[name])
    grad_out = layout(case.grad_out(torch.float32))
    dense = {name: t.contiguous().requires_grad_() for name, t in tensors.items()}
    strided = {name: t.requires_grad_() for name, t in tensors.items()}
    want = run(case.function, dense, grad_out.contiguous(), backend=backend, **case.options)
    got = run(case.function, strided, grad_out, backend=backend, **case.options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@backends
def test_digests_in_a_growing_buffer(backend: str) -> None:
    """Each block reads the part that earlier blocks have filled; the rest may hold anything."""
    case = digest(2, (4, 5), 2, 8, M=12)
    tensors = case.tensors(torch.float32, requires_grad=False)
    whole = tensors["digest_kv"]
    buffer = torch.full_like(whole, math.nan)
    for filled in (0, 4, 8, 12):
        buffer[:, :filled] = whole[:, :filled]
        given = {
            "qkv": tensors["qkv"],
            "digest_kv": buffer[:, :filled],
            "bias_table": tensors["bias_table"],
            "digest_bias": tensors["digest_bias"][:, :filled],
        }
        got = digest_attention(**given, backend=backend, **case.options)
        copied = {name: t.clone() for name, t in given.items()}
        want = digest_attention(**copied, backend=backend, **case.options)
        assert torch.equal(got, want)


@backends
def test_gradient_reaches_the_buffer(backend: str) -> None:
    case = digest(2, (4, 5), 2, 8, M=4)
    tensors, grad_out = case.tensors(torch.float64), case.grad_out(torch.float64)
    want = run(case.function, tensors, grad_out, backend=backend, **case.options)
    buffer = torch.zeros(2, 9, 32, dtype=torch.float64)
    buffer[:, 2:6] = tensors["digest_kv"].detach()
    buffer.requires_grad_()
    rest = {name: t for name, t in tensors.items() if name != "digest_kv"}
    out = digest_attention(digest_kv=buffer[:, 2:6], **rest, backend=backend, **case.options)
    out.backward(grad_out)
    torch.testing.assert_close(buffer.grad[:, 2:6], want["digest_kv"])
    assert buffer.grad[:, :2].abs().max() == 0
    assert buffer.grad[:, 6:].abs().max() == 0


@backends
def test_output_is_contiguous(backend: str) -> None:
    tensors = SMALL.tensors(torch.float32)
    assert digest_attention(**tensors, backend=backend, **SMALL.options).is_contiguous()


# ---------------------------------------------------------------------------------- determinism


@backends
@dtypes
def test_twice_bitwise_equal(dtype: torch.dtype, backend: str) -> None:
    case = digest(3, (14, 14), 3, 32, M=16, prefix=1, dropout_p=0.2)
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
        pytest.param(digest(1, (14, 14), 2, 32, M=16), id="batch_1"),
        pytest.param(digest(3, (9, 7), 3, 16, M=5, prefix=1), id="batch_3"),
        pytest.param(digest(1, (20, 17), 1, 16, M=9), id="split_queries"),
        pytest.param(digest(1, (24, 25), 1, 16, M=9), id="two_chunks"),
    ],
)
def test_threads_agree_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    tensors, grad_out = case.tensors(dtype), case.grad_out(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case.function, tensors, grad_out, backend="cpu", **case.options))
    for other in results[1:]:
        for name, one in results[0].items():
            assert torch.equal(one, other[name]), name


# ------------------------------------------------------------------------------- special values


@backends
@pytest.mark.parametrize("dtype", DTYPES[:3])  # float64 could not judge itself here
@pytest.mark.parametrize("size", [pytest.param(50.0, id="50"), pytest.param(-50.0, id="-50")])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(digest(8, (7, 7), 2, 8, M=4), id="one_chunk"),
        pytest.param(digest(1, (24, 25), 2, 8, M=4), id="two_chunks"),
    ],
)
def test_extreme_logits(case: Case, size: float, dtype: torch.dtype, backend: str) -> None:
    """The softmax subtracts its maximum: logits of thousands give finite, right weights."""
    check_against_float64(case.with_options(scale=size), dtype, backend)


@backends
@pytest.mark.parametrize("grid", [(5, 7), (24, 25)], ids=["one_chunk", "two_chunks"])
def test_weights_sum_to_one(grid: tuple[int, int], backend: str) -> None:
    """With v = 1 everywhere, in the digests too, the output is 1."""
    case = digest(2, grid, 2, 8, M=11, prefix=1)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["qkv"][..., 32:] = 1
    tensors["digest_kv"][..., 16:] = 1
    out = digest_attention(**tensors, backend=backend, **case.options)
    torch.testing.assert_close(out, torch.ones_like(out))


@backends
@pytest.mark.parametrize("grid", [(5, 7), (24, 25)], ids=["one_chunk", "two_chunks"])
def test_a_bias_of_minus_infinity_takes_a_digest_away(grid: tuple[int, int], backend: str) -> None:
    case = digest(2, grid, 2, 8, M=6)
    tensors, grad_out = case.tensors(torch.float32), case.grad_out(torch.float32)
    with torch.no_grad():
        tensors["digest_bias"][:, 4:] = -math.inf
    got = run(case.function, tensors, grad_out, backend=backend, **case.options)
    tensors["digest_kv"] = tensors["digest_kv"].detach()[:, :4].requires_grad_()
    tensors["digest_bias"] = tensors["digest_bias"].detach()[:, :4].requires_grad_()
    want = run(case.function, tensors, grad_out, backend=backend, **case.options)
    assert got["digest_kv"][:, 4:].abs().max() == 0
    assert got["digest_bias"][:, 4:].abs().max() == 0
    for name in ("digest_kv", "digest_bias"):
        got[name] = got[name].narrow(1, 0, 4)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@backends
def test_a_table_of_minus_infinity_leaves_the_digests(backend: str) -> None:
    """A first chunk without any weight does not spoil the next: all tokens are masked here."""
    case = digest(1, (24, 25), 1, 8, M=6)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["bias_table"].fill_(-math.inf)
    got = digest_attention(**tensors, backend=backend, **case.options)
    dk, dv = tensors["digest_kv"].split(8, -1)
    logits = tensors["qkv"][..., :8] @ dk.mT / math.sqrt(8) + tensors["digest_bias"]
    torch.testing.assert_close(got, logits.softmax(-1) @ dv)


@backends
@dtypes
def test_nan_stays_where_it_belongs(dtype: torch.dtype, backend: str) -> None:
    case = digest(3, (4, 5), 2, 8, M=6)
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][1, 8, :8] = math.nan  # the query of head 0
    tensors["qkv"][0, 2, 40:] = math.nan  # the value of head 1
    tensors["digest_kv"][2, 5, :8] = math.nan  # a digest's key of head 0
    out = digest_attention(**tensors, backend=backend, **case.options)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 8, :8] = True
    expected[0, :, 8:] = True
    expected[2, :, :8] = True
    assert torch.equal(out.isnan(), expected)


@backends
def test_infinite_key_gives_nan_where_the_formula_does(backend: str) -> None:
    case = digest(1, (4, 5), 1, 8, M=6)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors["qkv"][0, 3, 8:16] = math.inf
    want = digest_attention_reference(**tensors, **case.options)
    got = digest_attention(**tensors, backend=backend, **case.options)
    assert want.isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, torch
from xattn_ops import digest_attention
def step(g):
    qkv, kv = torch.randn(1, g * g, 48).requires_grad_(), torch.randn(1, 8, 32).requires_grad_()
    table, bias = torch.randn(2, g * g).requires_grad_(), torch.randn(2, 8).requires_grad_()
    out = digest_attention(qkv, kv, table, bias, num_heads=2, grid=(g, g), backend="cpu")
    out.sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8)
before = peak()
step(64)
print(peak() - before)
"""


@native
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_memory_is_linear_in_the_tokens() -> None:
    """At 64 x 64 tokens a single matrix of weights would take 64 MiB a head."""
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    kib = int(ran.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kib < 32 * 1024


@native
def test_grid_64x64() -> None:
    """Every query in its place among the chunks, at the largest grid that models use."""
    case = digest(1, (64, 64), 1, 8, M=20)
    tensors = case.tensors(torch.float32, requires_grad=False)
    got = digest_attention(**tensors, backend="cpu", **case.options)
    want = digest_attention_reference(**tensors, **case.options)
    torch.testing.assert_close(got, want)


# --------------------------------------------------------------------------------- random cases


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    return digest(
        draw(st.integers(0, 3)),
        (draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 20)),
        M=draw(st.sampled_from([None, 0, 1, 5, 16, 40])),
        prefix=draw(st.integers(0, 3)),
        table=draw(st.booleans()),
        digest_bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=random_cases(), dtype=st.sampled_from([param.values[0] for param in DTYPES]))
def test_random_cases(case: Case, dtype: torch.dtype) -> None:
    check_against_float64(case, dtype, BACKENDS[-1])


@native
@pytest.mark.parametrize("isa", [*ISAS, "avx512_bf16"])
def test_every_isa(isa: str) -> None:
    check_isa("digest", isa)
