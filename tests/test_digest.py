"""What is particular to digest_attention: digests in a buffer, masks, chunks, strange values."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import assert_same, backends, dtypes, native
from support.digest import digest

from xattn_ops import digest_attention
from xattn_ops.digest import digest_attention_reference

# ------------------------------------------------------------------------- the reference itself


@backends
def test_no_digests_is_none(backend: str) -> None:
    """M = 0 and digest_kv=None are one thing."""
    case = digest(2, (4, 5), 2, 8, M=0)
    tensors = case.tensors(torch.float32, requires_grad=False)
    got = digest_attention(**tensors, backend=backend, **case.options)
    del tensors["digest_kv"], tensors["digest_bias"]
    assert torch.equal(got, digest_attention(**tensors, backend=backend, **case.options))


# --------------------------------------------------------------------------------------- layouts


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
    tensors, grad_outs = case.tensors(torch.float64), case.grad_outs(torch.float64)
    want = case.run(tensors, grad_outs, backend=backend)
    buffer = torch.zeros(2, 9, 32, dtype=torch.float64)
    buffer[:, 2:6] = tensors["digest_kv"].detach()
    buffer.requires_grad_()
    rest = {name: t for name, t in tensors.items() if name != "digest_kv"}
    out = digest_attention(digest_kv=buffer[:, 2:6], **rest, backend=backend, **case.options)
    out.backward(*grad_outs)
    torch.testing.assert_close(buffer.grad[:, 2:6], want["digest_kv"])
    assert buffer.grad[:, :2].abs().max() == 0
    assert buffer.grad[:, 6:].abs().max() == 0


# ------------------------------------------------------------------------------- special values


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
    tensors, grad_outs = case.tensors(torch.float32), case.grad_outs(torch.float32)
    with torch.no_grad():
        tensors["digest_bias"][:, 4:] = -math.inf
    got = case.run(tensors, grad_outs, backend=backend)
    tensors["digest_kv"] = tensors["digest_kv"].detach()[:, :4].requires_grad_()
    tensors["digest_bias"] = tensors["digest_bias"].detach()[:, :4].requires_grad_()
    want = case.run(tensors, grad_outs, backend=backend)
    assert got["digest_kv"][:, 4:].abs().max() == 0
    assert got["digest_bias"][:, 4:].abs().max() == 0
    for name in ("digest_kv", "digest_bias"):
        got[name] = got[name].narrow(1, 0, 4)
    assert_same(got, want)


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


@native
def test_grid_64x64() -> None:
    """Every query in its place among the chunks, at the largest grid that models use."""
    case = digest(1, (64, 64), 1, 8, M=20)
    tensors = case.tensors(torch.float32, requires_grad=False)
    got = digest_attention(**tensors, backend="cpu", **case.options)
    want = digest_attention_reference(**tensors, **case.options)
    torch.testing.assert_close(got, want)
