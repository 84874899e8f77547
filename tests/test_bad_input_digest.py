"""Every wrong argument of CabViT's functions and modules raises and is named."""

from __future__ import annotations

import pytest
import torch
from support import merge
from support.digest import SMALL
from support.wrong import (
    activation,
    backend,
    companion,
    depthwise,
    heads_of,
    integer,
    of_value,
    pair,
    probability,
    refuses,
    scale,
    token_grid,
)

from xattn_ops import (
    DigestAttention,
    TokenMergeEnhance,
    digest_attention,
    token_merge_enhance,
)

DIGESTS, TABLE = "digest_kv must be [B, M, 2C] = [2, 3, 16]", "bias_table must be [num_heads, gh *"

test_digest_attention = refuses(
    digest_attention,
    # 2 images, grid 3 x 5 and one prefix token, 2 heads of 4, 3 digests
    SMALL.tensors(torch.float32, requires_grad=False) | SMALL.options,
    *activation("qkv", "[B, N, 3C]", 2, 16, 24),
    of_value(
        "qkv must have 3 * num_heads * D channels with num_heads=2, got 27",
        qkv=torch.zeros(2, 16, 27),
    ),
    of_value(
        "qkv must have num_prefix_tokens + rows * columns tokens, 1 + 3 * 5 = 16, got 15",
        qkv=torch.zeros(2, 15, 24),
    ),
    *token_grid("qkv", 1, 3, 5),
    *heads_of("qkv", 24),
    *companion("digest_kv", "[B, M, 2C]", 2, 3, 16, of="qkv", exact=False),
    of_value(f"{DIGESTS}, got shape [1, 3, 16]", digest_kv=torch.zeros(1, 3, 16)),
    of_value(f"{DIGESTS}, got shape [2, 3, 24]", digest_kv=torch.zeros(2, 3, 24)),
    *companion("bias_table", "[num_heads, gh * gw]", 2, 15, of="qkv"),
    of_value(f"{TABLE} gw] = [2, 15], got shape [15, 2]", bias_table=torch.zeros(15, 2)),
    of_value(f"{TABLE} gw] = [2, 15], got shape [2, 45]", bias_table=torch.zeros(2, 45)),
    *companion("digest_bias", "[num_heads, M]", 2, 3, of="qkv"),
    of_value(
        "digest_bias must be [num_heads, M], got shape [1, 2, 1, 3]",
        digest_bias=torch.zeros(1, 2, 1, 3),
    ),
    of_value("digest_bias must be [num_heads, M] = [2, 0], got shape [2, 3]", digest_kv=None),
    *scale(),
    *probability("dropout_p"),
    *backend(digest_attention),
)

test_digest_module = refuses(
    DigestAttention,
    {"dim": 8, "num_heads": 2, "grid": (3, 5)},
    *integer("dim", 1),
    *integer("num_heads", 1),
    of_value("num_heads must divide dim, 8, got 3", num_heads=3),
    *pair("grid", 1),
    *integer("num_digests", 0),
    *integer("num_prefix_tokens", 0),
    *probability("attn_drop"),
    *probability("proj_drop"),
)


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


KERNEL = "[C, 1, k, k]"

test_token_merge_enhance = refuses(
    token_merge_enhance,
    # 2 images, grid 5 x 8 and one prefix token, 8 channels
    merge.SMALL.tensors(torch.float32, requires_grad=False) | merge.SMALL.options,
    *activation("x", "[B, N, C]", 2, 41, 8),
    of_value(
        "x must have num_prefix_tokens + rows * columns tokens, 1 + 5 * 8 = 41, got 40",
        x=torch.zeros(2, 40, 8),
    ),
    *token_grid("x", 1, 5, 8),
    *depthwise("merge_weight", KERNEL, 8, 7, of="x")[1:],  # None: no digests
    *depthwise("enhance_weight", KERNEL, 8, 3, of="x"),
    *companion("enhance_bias", "[C]", 8, of="x"),
    *integer("stride", 1),
    *backend(token_merge_enhance),
)

test_token_merge_module = refuses(
    TokenMergeEnhance,
    {"dim": 8},
    *integer("dim", 1),
    *integer("window", 1),
    of_value("window must be odd, got 4", window=4),
    *integer("stride", 1),
    *integer("enhance_window", 1),
    of_value("enhance_window must be odd, got 2", enhance_window=2),
    *integer("num_prefix_tokens", 0),
)
