"""Cases of cls_cross_attention."""

from __future__ import annotations

from typing import Any

import pytest

from support.cases import Case
from xattn_ops import cls_cross_attention
from xattn_ops.clsattn import cls_cross_attention_reference


def clsattn(
    B: int,
    N: int,
    num_heads: int,
    D: int,
    norm: str = "affine",
    bias: bool = True,
    **options: Any,
) -> Case:
    """norm: "affine", "weight" for one without a shift, or "none"."""
    C = num_heads * D
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (B, 1, C), "patches": (B, N, C)}
    for name in ("q", "k", "v"):
        shapes[f"{name}_weight"] = (C, C)
        if bias:
            shapes[f"{name}_bias"] = (C,)
        else:
            options[f"{name}_bias"] = None
    if norm != "none":
        shapes["norm_weight"] = (C,)
    if norm == "affine":
        shapes["norm_bias"] = (C,)
    # weights of deviation 1 multiply the logits by C; this keeps the softmax from saturating
    options = {"num_heads": num_heads, "scale": D**-0.5 / C} | options
    return Case(
        cls_cross_attention,
        cls_cross_attention_reference,
        shapes,
        (B, 1, C),
        options,
        zero=("k_bias",),
    )


def _case(id: str, *args: Any, **kwargs: Any) -> Any:
    return pytest.param(clsattn(*args, **kwargs), id=id)


SMALL = clsattn(2, 7, 2, 4)

CASES = [
    _case("crossvit_tiny_large", 1, 400, 3, 32),
    _case("crossvit_15_small", 2, 196, 6, 32),
    _case("crossvit_15_large", 1, 100, 6, 64),
    _case("crossvit_9", 2, 49, 4, 32),
    _case("crossvit_18", 1, 49, 7, 32),
    _case("no_norm", 2, 30, 3, 16, norm="none"),
    _case("norm_without_shift", 2, 30, 3, 16, norm="weight"),
    _case("eps_large", 2, 30, 3, 16, eps=0.5),
    _case("eps_zero", 2, 30, 3, 16, eps=0.0),
    _case("no_bias", 2, 30, 3, 16, bias=False),
    _case("no_bias_no_norm", 2, 30, 3, 16, norm="none", bias=False),
    _case("batch_1", 1, 61, 2, 16),
    _case("batch_9", 9, 13, 2, 8),
    _case("one_patch", 2, 1, 2, 8),
    _case("one_patch_no_norm", 3, 1, 3, 5, norm="none"),
    _case("two_patches", 2, 2, 2, 8),
    _case("three_patches", 2, 3, 2, 8),
    _case("patches_15", 2, 15, 2, 8),
    _case("patches_17", 2, 17, 2, 8),
    _case("many_patches", 1, 2311, 2, 8),
    _case("one_head", 2, 30, 1, 24),
    _case("heads_5", 2, 30, 5, 8),
    _case("heads_12", 1, 30, 12, 8),
    _case("heads_24", 2, 10, 24, 1),
    _case("head_dim_1", 2, 9, 3, 1),
    _case("head_dim_5", 2, 30, 3, 5),
    _case("head_dim_19", 1, 30, 3, 19),
    _case("head_dim_33", 1, 20, 2, 33),
    _case("head_dim_130", 1, 10, 1, 130),
    _case("one_channel", 2, 9, 1, 1, norm="none"),
    _case("scale_zero", 2, 30, 3, 16, scale=0.0),
    _case("scale_negative", 2, 30, 3, 16, scale=-0.01),
    _case("empty_batch", 0, 9, 2, 8),
    _case("empty_batch_no_norm", 0, 9, 2, 8, norm="none", bias=False),
]

DROPOUT = [
    _case("dropout", 2, 30, 3, 16, dropout_p=0.3),
    _case("dropout_no_norm", 2, 45, 2, 8, norm="none", dropout_p=0.6),
    _case("dropout_no_bias", 2, 45, 2, 8, bias=False, dropout_p=0.2),
    _case("dropout_odd", 3, 13, 3, 5, dropout_p=0.1),
    _case("dropout_one_patch", 8, 1, 2, 8, dropout_p=0.5),
    _case("dropout_tiny", 1, 30, 2, 8, dropout_p=1e-12),
    _case("dropout_most", 2, 40, 2, 8, dropout_p=0.95),
    _case("dropout_empty_batch", 0, 9, 2, 8, dropout_p=0.5),
]
