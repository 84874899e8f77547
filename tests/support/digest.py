"""Cases of digest_attention."""

from __future__ import annotations

from typing import Any

import pytest

from support.cases import Case
from xattn_ops import digest_attention
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
    return Case(digest_attention, digest_attention_reference, shapes, (B, N, C), options)


def _case(id: str, *args: Any, **kwargs: Any) -> Any:
    return pytest.param(digest(*args, **kwargs), id=id)


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
