"""Cases of cross_patch_attention."""

from __future__ import annotations

from typing import Any

import pytest

from support.cases import Case
from xattn_ops import cross_patch_attention
from xattn_ops.cpsa import cross_patch_attention_reference


def cpsa(
    B: int,
    H: int,
    W: int,
    C: int,
    patch: tuple[int, int] = (7, 7),
    qkv_bias: bool = True,
    proj_bias: bool = True,
    **options: Any,
) -> Case:
    P = patch[0] * patch[1]
    shapes: dict[str, tuple[int, ...]] = {"x": (B, H, W, C), "qkv_weight": (3 * P, P)}
    if qkv_bias:
        shapes["qkv_bias"] = (3 * P,)
    else:
        options["qkv_bias"] = None
    shapes["proj_weight"] = (P, P)
    if proj_bias:
        shapes["proj_bias"] = (P,)
    else:
        options["proj_bias"] = None
    # weights of deviation 1 multiply the logits by P; this keeps the softmax from saturating
    options = {"scale": (P // options.get("num_heads", 1)) ** -0.5 / P, "patch": patch} | options
    return Case(
        cross_patch_attention, cross_patch_attention_reference, shapes, (B, H, W, C), options
    )


def _case(id: str, *args: Any, **kwargs: Any) -> Any:
    return pytest.param(cpsa(*args, **kwargs), id=id)


SMALL = cpsa(2, 5, 8, 3, patch=(2, 3))

CASES = [
    _case("cat_stage3", 2, 14, 14, 32),
    _case("cat_stage4_one_token", 2, 7, 7, 32),
    _case("cat_stage2", 1, 28, 28, 16),
    _case("many_tokens", 1, 40, 36, 4, patch=(2, 3)),
    _case("batch_1", 1, 14, 21, 8),
    _case("one_channel", 2, 14, 14, 1),
    _case("channels_5", 2, 14, 7, 5),
    _case("channels_17", 2, 14, 7, 17),
    _case("channels_33", 1, 7, 14, 33),
    _case("padded_9x16", 2, 9, 16, 6),
    _case("padded_rows", 2, 13, 14, 16),
    _case("patch_wider_than_map", 2, 3, 5, 4),
    _case("one_pixel", 3, 1, 1, 4),
    _case("one_pixel_patch", 2, 3, 4, 5, patch=(1, 1)),
    _case("one_row_patch", 2, 5, 25, 4, patch=(1, 5)),
    _case("one_column_patch", 2, 25, 5, 4, patch=(6, 1)),
    _case("rectangular_3x5", 2, 7, 11, 6, patch=(3, 5)),
    _case("rectangular_5x2", 2, 11, 7, 18, patch=(5, 2)),
    _case("patch_4", 2, 12, 8, 16, patch=(4, 4)),
    _case("patch_8", 1, 16, 17, 8, patch=(8, 8)),
    _case("patch_11", 1, 22, 12, 4, patch=(11, 11)),
    _case("heads_7", 2, 14, 21, 5, num_heads=7),
    _case("heads_49", 1, 14, 14, 4, num_heads=49),
    _case("heads_one_token", 2, 7, 7, 18, num_heads=7),
    _case("heads_2_rectangular", 2, 7, 11, 6, patch=(2, 5), num_heads=2),
    _case("heads_padded", 2, 9, 10, 16, num_heads=7),
    _case("no_qkv_bias", 2, 14, 9, 8, qkv_bias=False),
    _case("no_proj_bias", 2, 14, 9, 8, proj_bias=False),
    _case("no_bias", 2, 7, 9, 8, qkv_bias=False, proj_bias=False),
    _case("no_bias_one_token", 2, 7, 7, 8, qkv_bias=False, proj_bias=False),
    _case("no_bias_heads", 2, 7, 9, 8, qkv_bias=False, proj_bias=False, num_heads=7),
    _case("scale_default", 2, 9, 8, 4, patch=(2, 2), scale=None),
    _case("scale_zero", 2, 14, 9, 8, scale=0.0),
    _case("scale_negative", 2, 14, 9, 8, scale=-0.004),
    _case("empty_batch", 0, 9, 8, 4),
    _case("empty_batch_heads", 0, 14, 14, 4, num_heads=7),
]

DROPOUT = [
    _case("dropout", 2, 14, 15, 5, dropout_p=0.3),
    _case("dropout_heads", 2, 14, 21, 3, num_heads=7, dropout_p=0.6),
    _case("dropout_odd", 1, 9, 11, 17, patch=(3, 2), dropout_p=0.1),
    _case("dropout_one_token", 2, 7, 7, 18, dropout_p=0.5),
    _case("dropout_tiny", 1, 14, 14, 4, dropout_p=1e-12),
    _case("dropout_most", 2, 14, 14, 4, dropout_p=0.9),
    _case("dropout_no_bias", 1, 14, 10, 4, qkv_bias=False, proj_bias=False, dropout_p=0.5),
    _case("dropout_empty_batch", 0, 14, 7, 4, dropout_p=0.5),
]
