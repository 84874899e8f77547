"""Cases of digest_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.cases import Case, Tensors
from support.description import Description, param
from support.modules import OnMap
from xattn_ops import DigestAttention, digest_attention
from xattn_ops.digest import digest_attention_reference


def digest(
    B: int,
    grid: tuple[int, int],
    num_heads: int,
    D: int,
    M: int | None = None,
    prefix: int = 0,
    table: bool = True,
    digest_bias: bool = True,
    **options: Any,
) -> Case:
    """M: number of digests; None passes no digest_kv."""
    N, C = prefix + grid[0] * grid[1], num_heads * D
    shapes: dict[str, tuple[int, ...]] = {"qkv": (B, N, 3 * C)}
    if M is not None:
        shapes["digest_kv"] = (B, M, 2 * C)
    if table:
        shapes["bias_table"] = (num_heads, grid[0] * grid[1])
    if M is not None and digest_bias:
        shapes["digest_bias"] = (num_heads, M)
    options |= {"num_heads": num_heads, "grid": grid, "num_prefix_tokens": prefix}
    return Case(digest_attention, digest_attention_reference, shapes, {"out": (B, N, C)}, options)


_case = param(digest)

SMALL = digest(2, (3, 5), 2, 4, M=3, prefix=1)

CASES = [
    _case("cabvit_stage3", 2, (14, 14), 2, 32, M=80),
    _case("cabvit_stage3_early", 1, (14, 14), 3, 32, M=16),
    _case("cabvit_stage4", 2, (7, 7), 3, 32, M=4),
    _case("cabvit_first_block", 1, (14, 14), 2, 32),
    _case("cabvit_plain", 1, (14, 14), 3, 64, M=16, prefix=1),
    _case("no_digests", 2, (4, 5), 2, 8, M=0),
    _case("no_bias", 2, (5, 4), 2, 8, M=6, table=False, digest_bias=False),
    _case("no_table", 2, (5, 4), 2, 8, M=6, table=False),
    _case("no_digest_bias", 2, (5, 4), 2, 8, M=6, digest_bias=False),
    _case("nothing", 2, (5, 4), 2, 8, table=False),
    _case("prefix_2", 2, (4, 7), 2, 8, M=5, prefix=2),
    _case("prefix_alone_in_a_vector", 1, (4, 4), 2, 8, M=17, prefix=16),
    _case("prefix_no_digests", 2, (4, 7), 2, 8, prefix=3),
    _case("one_token", 3, (1, 1), 2, 8),
    _case("one_token_one_digest", 3, (1, 1), 2, 8, M=1),
    _case("one_row", 2, (1, 25), 2, 8, M=3),
    _case("one_column", 2, (25, 1), 2, 8, M=3),
    _case("wide_5x25", 1, (5, 25), 2, 8, M=9),
    _case("tall_37x2", 1, (37, 2), 2, 8, M=9, prefix=1),
    _case("grid_16x16", 1, (16, 16), 1, 32, M=16),
    _case("more_digests_than_tokens", 2, (3, 3), 2, 8, M=50),
    _case("keys_of_whole_vectors", 1, (8, 8), 2, 16, M=32),
    _case("keys_512", 1, (16, 28), 1, 8, M=64),
    _case("keys_513", 1, (16, 28), 1, 8, M=65),
    _case("two_chunks", 1, (24, 25), 1, 32, M=37, prefix=1),
    _case("three_chunks", 1, (31, 40), 1, 8, M=30),
    _case("digests_in_chunks_of_their_own", 1, (4, 4), 1, 8, M=1100),
    _case("split_queries", 1, (20, 17), 1, 16, M=9),
    _case("head_dim_1", 2, (4, 5), 3, 1, M=4),
    _case("head_dim_5", 2, (4, 5), 3, 5, M=4),
    _case("head_dim_17", 2, (4, 5), 1, 17, M=4),
    _case("head_dim_33", 1, (7, 7), 2, 33, M=4),
    _case("head_dim_64", 1, (9, 8), 2, 64, M=20, prefix=1),
    _case("head_dim_128", 1, (5, 5), 1, 128, M=4),
    _case("scale_large", 2, (7, 9), 2, 8, M=4, scale=1.5),
    _case("scale_zero", 2, (7, 9), 2, 8, M=4, scale=0.0),
    _case("scale_negative", 2, (7, 9), 2, 8, M=4, scale=-0.7),
    _case("empty_batch", 0, (4, 5), 2, 8, M=4),
    _case("empty_batch_no_digests", 0, (4, 5), 2, 8, prefix=1),
]

DROPOUT = [
    _case("dropout", 2, (7, 9), 2, 8, M=5, dropout_p=0.3),
    _case("dropout_prefix", 2, (5, 4), 3, 5, M=7, prefix=2, dropout_p=0.6),
    _case("dropout_no_digests", 1, (5, 9), 2, 16, dropout_p=0.1),
    _case("dropout_head_dim_32", 1, (14, 14), 2, 32, M=16, dropout_p=0.2),
    _case("dropout_two_chunks", 1, (24, 25), 1, 8, M=30, prefix=1, dropout_p=0.4),
    _case("dropout_split_queries", 1, (20, 17), 1, 16, M=9, dropout_p=0.2),
    _case("dropout_tiny", 1, (7, 7), 2, 8, M=4, dropout_p=1e-12),
    _case("dropout_nearly_all", 2, (7, 7), 1, 8, M=4, dropout_p=0.999),
    _case("dropout_empty_batch", 0, (7, 7), 2, 8, M=4, dropout_p=0.5),
]


def by_loops(case: Case, tensors: Tensors) -> Tensor:
    """The definition, token by token; shares nothing with the reference."""
    qkv, digest_kv, table, digest_bias = tensors.values()
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


class DigestOnMap(OnMap):
    """DigestAttention, which has a size of its own, with some of the tokens as digests."""

    def __init__(self, **options: Any) -> None:
        super().__init__(DigestAttention(8, 2, (5, 8), 4, num_prefix_tokens=1, **options))

    def of_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.module(tokens, tokens[:, 3::10])


DESCRIPTION = Description(
    name="digest",
    small=SMALL,
    cases=CASES,
    dropout=DROPOUT,
    random=random_cases(),
    isa=[
        "cabvit_stage4",
        "prefix_2",
        "nothing",
        "one_token_one_digest",
        "tall_37x2",
        "two_chunks",
        "split_queries",
        "head_dim_33",
        "head_dim_64",
        "head_dim_128",
        "dropout_prefix",
        "dropout_two_chunks",
    ],
    definition=by_loops,
    defined=[
        _case("grid", 2, (3, 4), 2, 3, M=2),
        _case("prefix", 1, (4, 2), 1, 2, M=5, prefix=2),
    ],
    half=digest(1, (3, 4), 2, 4, M=3),
    gradcheck=[
        _case("grid", 1, (2, 3), 2, 1, M=2),
        _case("prefix", 2, (2, 2), 1, 2, M=1, prefix=1),
        _case("dropout", 1, (3, 2), 1, 2, M=2, dropout_p=0.4),
        _case("scale_zero", 1, (3, 2), 1, 2, M=2, scale=0.0),
    ],
    twice=digest(1, (2, 3), 1, 2, M=2, prefix=1),
    strided=[
        _case("prefix", 2, (5, 4), 2, 8, M=6, prefix=1),
        _case("grid", 2, (5, 7), 2, 8, M=3),
    ],
    steady=[
        _case("dropout", 3, (14, 14), 3, 32, M=16, prefix=1, dropout_p=0.2),
        _case("batch_1", 1, (14, 14), 2, 32, M=16),
        _case("batch_3", 3, (9, 7), 3, 16, M=5, prefix=1),
        _case("split_queries", 1, (20, 17), 1, 16, M=9),
        _case("two_chunks", 1, (24, 25), 1, 16, M=9),
    ],
    extreme=[  # of thousands
        _case(f"{name}-{scale:g}", B, grid, 2, 8, M=4, scale=scale)
        for name, B, grid in (("one_chunk", 8, (7, 7)), ("two_chunks", 1, (24, 25)))
        for scale in (50.0, -50.0)
    ],
    large=digest(1, (64, 64), 2, 8, M=8),  # weights of 134 MB
    scratch=16 << 20,
    module=DigestOnMap,
    drops=("attn_drop", "proj_drop"),
    one_size=True,
    of_size=lambda B, H, W: digest(B, (H, W), 2, 4, M=H + 3, prefix=1),
)
