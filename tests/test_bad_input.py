"""Every wrong argument raises, and the message names it, what came and what is allowed.

Here: inner_patch_attention and cross_patch_attention. What functions refuse alike stands in
tests/support/wrong.py.
"""

from __future__ import annotations

import torch
from support.cpsa import SMALL as CPSA
from support.ipsa import SMALL as IPSA
from support.wrong import (
    activation,
    backend,
    companion,
    heads_of,
    integer,
    of_value,
    pair,
    probability,
    refuses,
    required,
    scale,
)

from xattn_ops import (
    CrossPatchAttention,
    InnerPatchAttention,
    cross_patch_attention,
    inner_patch_attention,
)

f32 = torch.float32
TABLE, PIXELS = "[(2h-1)(2w-1), num_heads]", "num_heads must divide the pixels of a patch"

test_inner_patch_attention = refuses(
    inner_patch_attention,
    IPSA.tensors(f32, requires_grad=False) | IPSA.options,  # map 5 x 8, 2 heads of 4, window 2 x 3
    *activation("qkv", "[B, H, W, 3C]", 2, 5, 8, 24),
    of_value(
        "qkv must have 3 * num_heads * D channels with num_heads=2, got 27",
        qkv=torch.zeros(2, 5, 8, 27),
    ),
    *heads_of("qkv", 24),
    *pair("window", 1),
    *pair("shift", 0),
    of_value("shift must be smaller than window (2, 3), got (1, 3)", shift=(1, 3)),
    of_value("shift must be smaller than window (2, 3), got (2, 0)", shift=(2, 0)),
    *companion("bias_table", TABLE, 15, 2, of="qkv"),
    *companion("pad_qkv", "[3C]", 24, of="qkv"),
    of_value(
        f"bias_table must be {TABLE} = [15, 2], got shape [169, 2]", bias_table=torch.zeros(169, 2)
    ),
    of_value("pad_qkv must be [3C] = [24], got shape [8]", pad_qkv=torch.zeros(8)),
    *scale(),
    *probability("dropout_p"),
    *backend(inner_patch_attention),
)

test_cross_patch_attention = refuses(
    cross_patch_attention,
    CPSA.tensors(f32, requires_grad=False) | CPSA.options,  # map 5 x 8, 3 channels, patch 2 x 3
    *activation("x", "[B, H, W, C]", 2, 5, 8, 3),
    required("qkv_weight", "[3P, P]"),
    *companion("qkv_weight", "[3P, P]", 18, 6, of="x"),
    of_value(
        "qkv_weight must be [3P, P] = [18, 6], got shape [6, 18]", qkv_weight=torch.zeros(6, 18)
    ),
    *companion("qkv_bias", "[3P]", 18, of="x"),
    required("proj_weight", "[P, P]"),
    *companion("proj_weight", "[P, P]", 6, 6, of="x"),
    *companion("proj_bias", "[P]", 6, of="x"),
    *pair("patch", 1),
    *integer("num_heads", 1),
    of_value(f"{PIXELS}, 6, got 4", num_heads=4),
    *scale(),
    *probability("dropout_p"),
    *backend(cross_patch_attention),
)

test_inner_patch_module = refuses(
    InnerPatchAttention,
    {"dim": 8, "num_heads": 2},
    *integer("dim", 1),
    *integer("num_heads", 1),
    of_value("num_heads must divide dim, 8, got 3", num_heads=3),
    *pair("window", 1),
    *pair("shift", 0),
    of_value("shift must be smaller than window (7, 7), got (7, 0)", shift=(7, 0)),
    *probability("attn_drop"),
    *probability("proj_drop"),
)

test_cross_patch_module = refuses(
    CrossPatchAttention,
    {},
    *pair("patch", 1),
    *integer("num_heads", 1),
    of_value(f"{PIXELS}, 49, got 2", num_heads=2),
    *probability("attn_drop"),
    *probability("proj_drop"),
)


def test_a_list_is_a_pair() -> None:
    tensors = IPSA.tensors(f32, requires_grad=False)
    options = IPSA.options | {"window": [2, 3], "shift": [1, 2]}
    want = inner_patch_attention(**tensors, **IPSA.options)
    assert torch.equal(inner_patch_attention(**tensors, **options), want)


def test_an_int_is_a_scale() -> None:
    tensors = IPSA.tensors(f32, requires_grad=False)
    outs = [inner_patch_attention(**tensors, **IPSA.options, scale=scale) for scale in (1, 1.0)]
    assert torch.equal(*outs)
