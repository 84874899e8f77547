"""As test_bad_input.py, for cls_cross_attention, its map and its module."""

from __future__ import annotations

import math

import pytest
import torch
from support.clsattn import SMALL
from support.wrong import (
    activation,
    backend,
    companion,
    integer,
    of_type,
    of_value,
    probability,
    refuses,
    required,
    scale,
)

from xattn_ops import ClsCrossAttention, cls_cross_attention
from xattn_ops.clsattn import cls_cross_attention_map

# 2 images, 7 patches, 2 heads of 4
GOOD = SMALL.tensors(torch.float32, requires_grad=False) | SMALL.options
OF_KEYS = {n: given for n, given in GOOD.items() if not n.startswith("v_")}
PATCHES = "patches must be [B, N, C] with B = 2, N at least 1 and C = 8"

KEYS = [  # what the map refuses too
    *activation("cls_token", "[B, 1, C]", 2, 1, 8),
    of_value("cls_token must be [B, 1, C], got shape [2, 2, 8]", cls_token=torch.zeros(2, 2, 8)),
    required("patches", "[B, N, C]"),
    *companion("patches", "[B, N, C]", 2, 7, 8, of="cls_token", exact=False),
    *(
        of_value(f"{PATCHES}, got shape {list(shape)}", patches=torch.zeros(shape))
        for shape in ((3, 7, 8), (1, 7, 8), (2, 0, 8), (2, 7, 12))
    ),
    *integer("num_heads", 1),
    of_value("num_heads must divide the channels of cls_token, 8, got 3", num_heads=3),
    *(
        given
        for name in ("q_weight", "k_weight")
        for given in (
            required(name, "[C, C]"),
            *companion(name, "[C, C]", 8, 8, of="cls_token"),
        )
    ),
    *(
        given
        for name in ("q_bias", "k_bias", "norm_weight", "norm_bias")
        for given in companion(name, "[C]", 8, of="cls_token")
    ),
    of_value("norm_bias must be None where norm_weight is None, got a tensor", norm_weight=None),
    of_type("eps must be a float, got str", eps="1e-6"),
    of_type("eps must be a float, got bool", eps=True),
    of_value("eps must be at least 0, got -1e-06", eps=-1e-6),
    of_value("eps must be at least 0, got nan", eps=math.nan),
    *scale(),
]

test_cls_cross_attention = refuses(
    cls_cross_attention,
    GOOD,
    *KEYS,
    required("v_weight", "[C, C]"),
    *companion("v_weight", "[C, C]", 8, 8, of="cls_token"),
    *companion("v_bias", "[C]", 8, of="cls_token"),
    *probability("dropout_p"),
    *backend(cls_cross_attention),
)

test_attention_map = refuses(cls_cross_attention_map, OF_KEYS, *KEYS)

test_cls_module = refuses(
    ClsCrossAttention,
    {"dim": 12, "num_heads": 3},
    *integer("dim", 1),
    *integer("num_heads", 1),
    of_value("num_heads must divide dim, 12, got 5", num_heads=5),
    *probability("attn_drop"),
    *probability("proj_drop"),
)


def test_options_told_apart_by_their_spelling() -> None:
    """A good call before must not let a wrong one of equal value pass."""
    cls_cross_attention(**GOOD | {"scale": 1.0})
    with pytest.raises(TypeError, match="num_heads must be an int, got float"):
        cls_cross_attention(**GOOD | {"num_heads": 2.0})
    with pytest.raises(TypeError, match="scale must be a float or None, got bool"):
        cls_cross_attention(**GOOD | {"scale": True})
