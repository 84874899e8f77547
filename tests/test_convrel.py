"""What is particular to conv_relative_attention: its lists, its softmax over the keys."""

from __future__ import annotations

import math
import os
from itertools import pairwise, product

import pytest
import torch
from support.cases import BACKENDS, DTYPES, backends, dtypes, leaves
from support.convrel import convrel
from support.oracle import check_against_float64

from xattn_ops import conv_relative_attention

# Triton's kernels too, where its interpreter runs them, in all but float64.
INTERPRETED = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
with_triton = pytest.mark.parametrize("backend", BACKENDS + INTERPRETED)
kinds = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(backend, *dtype.values, id=f"{backend}-{dtype.id}")
        for backend, dtype in product(BACKENDS + INTERPRETED, DTYPES)
        if backend != "triton" or dtype.id != "f64"
    ],
)

# ------------------------------------------------------------------------- the reference itself


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


# ------------------------------------------------------------------------------- special values


@with_triton
@pytest.mark.parametrize("dtype", DTYPES[:3])  # float64 could not judge itself here
@pytest.mark.parametrize("size", [pytest.param(60.0, id="60"), pytest.param(-500.0, id="-500")])
def test_extreme_keys(size: float, dtype: torch.dtype, backend: str) -> None:
    """The softmax subtracts its maximum: keys far beyond the range of exp give right weights."""
    case = convrel(3, (9, 10), 2, 16, (3, 32))
    tensors = case.tensors(dtype, requires_grad=False)
    tensors["qkv"][..., 32:64] *= size
    check_against_float64(case, dtype, backend, tensors=leaves(tensors))


@kinds
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


@with_triton
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


@kinds
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
    check_against_float64(case, dtype, backend, tensors=leaves(tensors))


@with_triton
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
