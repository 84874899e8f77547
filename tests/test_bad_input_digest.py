"""Every wrong argument of digest_attention and its module raises and is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.cases import DENSE, wrong
from support.digest import SMALL

from xattn_ops import DigestAttention, digest_attention

f32, f64 = torch.float32, torch.float64

# SMALL: B 2, grid 3 x 5, one prefix token, 2 heads of 4, 3 digests
CASES = [
    wrong("list", TypeError, "qkv must be a tensor [B, N, 3C], got list", qkv=[1.0]),
    wrong(
        "sparse",
        TypeError,
        "qkv must be a dense (strided) tensor, got torch.sparse_coo",
        qkv=torch.zeros(2, 16, 24).to_sparse(),
    ),
    wrong(
        "int64",
        TypeError,
        f"qkv must be {DENSE}, got torch.int64",
        qkv=torch.zeros(2, 16, 24, dtype=torch.int64),
    ),
    wrong(
        "rank",
        ValueError,
        "qkv must be [B, N, 3C], got shape [2, 3, 5, 24]",
        qkv=torch.zeros(2, 3, 5, 24),
    ),
    wrong(
        "no_channels",
        ValueError,
        "with every size but the first at least 1, got shape [2, 16, 0]",
        qkv=torch.zeros(2, 16, 0),
    ),
    wrong(
        "channels",
        ValueError,
        "qkv must have 3 * num_heads * D channels with num_heads=2, got 27",
        qkv=torch.zeros(2, 16, 27),
    ),
    wrong(
        "tokens",
        ValueError,
        "qkv must have num_prefix_tokens + rows * columns tokens, 1 + 3 * 5 = 16, got 15",
        qkv=torch.zeros(2, 15, 24),
    ),
    wrong(
        "grid",
        ValueError,
        "qkv must have num_prefix_tokens + rows * columns tokens, 1 + 4 * 5 = 21, got 16",
        grid=(4, 5),
    ),
    wrong("grid_int", TypeError, "grid must be a pair of ints (rows, columns), got 4", grid=4),
    wrong("grid_zero", ValueError, "grid[0] must be at least 1, got 0", grid=(0, 5)),
    wrong("grid_float", TypeError, "grid[1] must be an int, got float", grid=(3, 5.0)),
    wrong(
        "prefix_negative",
        ValueError,
        "num_prefix_tokens must be at least 0, got -1",
        num_prefix_tokens=-1,
    ),
    wrong(
        "prefix_bool",
        TypeError,
        "num_prefix_tokens must be an int, got bool",
        num_prefix_tokens=True,
    ),
    wrong("heads_zero", ValueError, "num_heads must be at least 1, got 0", num_heads=0),
    wrong("heads_float", TypeError, "num_heads must be an int, got float", num_heads=2.0),
    wrong(
        "digests_tuple",
        TypeError,
        "digest_kv must be a tensor [B, M, 2C], got tuple",
        digest_kv=(),
    ),
    wrong(
        "digests_rank",
        ValueError,
        "digest_kv must be [B, M, 2C], got shape [3, 16]",
        digest_kv=torch.zeros(3, 16),
    ),
    wrong(
        "digests_batch",
        ValueError,
        "digest_kv must be [B, M, 2C] = [2, 3, 16], got shape [1, 3, 16]",
        digest_kv=torch.zeros(1, 3, 16),
    ),
    wrong(
        "digests_with_queries",
        ValueError,
        "digest_kv must be [B, M, 2C] = [2, 3, 16], got shape [2, 3, 24]",
        digest_kv=torch.zeros(2, 3, 24),
    ),
    wrong(
        "digests_dtype",
        TypeError,
        "digest_kv must have the dtype of qkv, torch.float32, got torch.float64",
        digest_kv=torch.zeros(2, 3, 16, dtype=f64),
    ),
    wrong(
        "digests_device",
        ValueError,
        "digest_kv must be on the device of qkv, cpu, got meta",
        digest_kv=torch.zeros(2, 3, 16, device="meta"),
    ),
    wrong(
        "table_size",
        ValueError,
        "bias_table must be [num_heads, gh * gw] = [2, 15], got shape [2, 45]",
        bias_table=torch.zeros(2, 45),
    ),
    wrong(
        "table_transposed",
        ValueError,
        "bias_table must be [num_heads, gh * gw] = [2, 15], got shape [15, 2]",
        bias_table=torch.zeros(15, 2),
    ),
    wrong(
        "table_dtype",
        TypeError,
        "bias_table must have the dtype of qkv, torch.float32, got torch.bfloat16",
        bias_table=torch.zeros(2, 15, dtype=torch.bfloat16),
    ),
    wrong(
        "digest_bias_rank",
        ValueError,
        "digest_bias must be [num_heads, M], got shape [1, 2, 1, 3]",
        digest_bias=torch.zeros(1, 2, 1, 3),
    ),
    wrong(
        "digest_bias_size",
        ValueError,
        "digest_bias must be [num_heads, M] = [2, 3], got shape [2, 4]",
        digest_bias=torch.zeros(2, 4),
    ),
    wrong(
        "digest_bias_without_digests",
        ValueError,
        "digest_bias must be [num_heads, M] = [2, 0], got shape [2, 3]",
        digest_kv=None,
    ),
    wrong(
        "digest_bias_device",
        ValueError,
        "digest_bias must be on the device of qkv, cpu, got meta",
        digest_bias=torch.zeros(2, 3, device="meta"),
    ),
    wrong("scale_text", TypeError, "scale must be a float or None, got str", scale="0.1"),
    wrong("dropout_one", ValueError, "dropout_p must be in [0, 1), got 1.0", dropout_p=1.0),
    wrong("dropout_none", TypeError, "dropout_p must be a float, got NoneType", dropout_p=None),
    wrong(
        "backend_cannot",
        ValueError,
        "backend 'triton' cannot serve digest_attention: "
        "digest_attention has no triton kernel in this version",
        backend="triton",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CASES)
def test_digest_attention(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = SMALL.tensors(f32, requires_grad=False) | SMALL.options
    with pytest.raises(error, match=re.escape(message)):
        digest_attention(**good | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        wrong("dim", ValueError, "num_heads must divide dim, 8, got 3", num_heads=3),
        wrong("grid", TypeError, "grid must be a pair of ints (rows, columns), got 7", grid=7),
        wrong("digests", ValueError, "num_digests must be at least 0, got -4", num_digests=-4),
        wrong(
            "prefix",
            TypeError,
            "num_prefix_tokens must be an int, got float",
            num_prefix_tokens=1.0,
        ),
        wrong("attn_drop", ValueError, "attn_drop must be in [0, 1), got 1.0", attn_drop=1.0),
        wrong("proj_drop", ValueError, "proj_drop must be in [0, 1), got 2", proj_drop=2),
    ],
)
def test_digest_module(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        DigestAttention(**{"dim": 8, "num_heads": 2, "grid": (3, 5)} | arguments)


def test_digest_module_takes_the_digests_it_was_made_for() -> None:
    x, digests = torch.randn(2, 15, 8), torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=r"digests must be None for num_digests=0, got shape"):
        DigestAttention(8, 2, (3, 5))(x, digests)
    with pytest.raises(TypeError, match=r"digests must be a tensor \[B, M, dim\], got NoneType"):
        DigestAttention(8, 2, (3, 5), 4)(x)
    with pytest.raises(
        ValueError, match=r"digests must be .* = \[2, 8, 8\], got shape \[2, 4, 8\]"
    ):
        DigestAttention(8, 2, (3, 5), 8)(x, digests)
