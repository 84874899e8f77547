"""Cases of inner_patch_attention."""

from __future__ import annotations

from typing import Any

import pytest

from support.cases import Case
from xattn_ops import inner_patch_attention
from xattn_ops.ipsa import inner_patch_attention_reference


def ipsa(
    B: int,
    H: int,
    W: int,
    num_heads: int,
    D: int,
    window: tuple[int, int] = (7, 7),
    bias: bool = True,
    pad: bool = True,
    **options: Any,
) -> Case:
    C = num_heads * D
    shapes: dict[str, tuple[int, ...]] = {"qkv": (B, H, W, 3 * C)}
    if bias:
        shapes["bias_table"] = ((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
    if pad:
        shapes["pad_qkv"] = (3 * C,)
    options |= {"num_heads": num_heads, "window": window}
    return Case(
        inner_patch_attention, inner_patch_attention_reference, shapes, (B, H, W, C), options
    )


def _case(id: str, *args: Any, **kwargs: Any) -> Any:
    return pytest.param(ipsa(*args, **kwargs), id=id)


SMALL = ipsa(2, 5, 8, 2, 4, window=(2, 3), shift=(1, 2))

CASES = [
    _case("cat_s_stage2", 2, 14, 14, 6, 32),
    _case("cat_t_stage4", 2, 7, 7, 16, 32),
    _case("batch_1", 1, 14, 7, 3, 32),
    _case("padded_9x16", 2, 9, 16, 2, 32),
    _case("padded_with_zeros", 2, 9, 16, 2, 16, pad=False),
    _case("no_bias", 2, 7, 14, 2, 16, bias=False),
    _case("no_bias_no_pad", 2, 8, 8, 2, 16, bias=False, pad=False),
    _case("window_wider_than_map", 2, 3, 5, 2, 8),
    _case("one_pixel", 64, 1, 1, 2, 8),
    _case("one_pixel_window", 2, 3, 4, 2, 8, window=(1, 1)),
    _case("one_row_window", 2, 5, 25, 2, 8, window=(1, 5)),
    _case("one_column_window", 2, 25, 5, 2, 8, window=(6, 1)),
    _case("rectangular_3x5", 2, 7, 11, 3, 8, window=(3, 5)),
    _case("rectangular_5x2_shift_3x1", 2, 11, 7, 3, 8, window=(5, 2), shift=(3, 1)),
    _case("shift_3", 2, 14, 21, 2, 16, shift=(3, 3)),
    _case("shift_padded", 2, 13, 17, 2, 16, shift=(3, 3)),
    _case("shift_rows_alone", 2, 14, 14, 2, 16, shift=(3, 0)),
    _case("shift_columns_alone", 2, 10, 10, 2, 16, shift=(0, 6)),
    _case("shift_largest", 2, 15, 8, 2, 8, window=(4, 4), shift=(3, 3)),
    _case("shift_one_window", 2, 4, 6, 2, 8, shift=(3, 3)),
    _case("map_84x19", 1, 84, 19, 1, 8, shift=(3, 3)),
    _case("window_8", 1, 16, 17, 2, 32, window=(8, 8)),
    _case("window_12", 1, 24, 12, 2, 32, window=(12, 12), shift=(6, 6)),
    _case("window_16x17", 1, 16, 17, 1, 24, window=(16, 17)),
    _case("head_dim_1", 2, 7, 7, 3, 1),
    _case("head_dim_5", 2, 7, 8, 3, 5),
    _case("head_dim_17", 2, 8, 7, 1, 17),
    _case("head_dim_33", 1, 7, 7, 2, 33),
    _case("head_dim_64", 1, 7, 14, 2, 64),
    _case("head_dim_128", 1, 5, 5, 1, 128, window=(4, 4)),
    _case("scale_large", 2, 7, 9, 2, 8, scale=1.5),
    _case("scale_zero", 2, 7, 9, 2, 8, scale=0.0),
    _case("scale_negative", 2, 7, 9, 2, 8, scale=-0.7),
    _case("empty_batch", 0, 9, 8, 2, 8),
    _case("empty_batch_shifted", 0, 7, 7, 2, 8, shift=(3, 3)),
]

DROPOUT = [
    _case("dropout", 2, 7, 9, 2, 8, dropout_p=0.3),
    _case("dropout_rectangular_shifted", 2, 5, 8, 3, 5, window=(2, 3), shift=(1, 1), dropout_p=0.6),
    _case("dropout_odd_window", 1, 9, 5, 2, 16, window=(3, 5), dropout_p=0.1),
    _case("dropout_window_8", 1, 8, 9, 2, 8, window=(8, 8), shift=(2, 0), dropout_p=0.2),
    _case("dropout_tiny", 1, 7, 7, 2, 8, dropout_p=1e-12),
    _case("dropout_nearly_all", 2, 7, 7, 1, 8, dropout_p=0.999),
    _case("dropout_no_bias", 1, 7, 10, 2, 8, bias=False, pad=False, dropout_p=0.5),
    _case("dropout_empty_batch", 0, 7, 7, 2, 8, dropout_p=0.5),
]
