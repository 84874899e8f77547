"""Cases of inner_patch_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.cases import Case, Tensors
from support.description import Description, param
from xattn_ops import InnerPatchAttention, inner_patch_attention
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
    outs = {"out": (B, H, W, C)}
    return Case(inner_patch_attention, inner_patch_attention_reference, shapes, outs, options)


_case = param(ipsa)

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


def by_loops(case: Case, tensors: Tensors) -> Tensor:
    """The definition, pixel by pixel; shares nothing with the reference."""
    qkv, table, pad = tensors["qkv"], tensors["bias_table"], tensors["pad_qkv"]
    B, H, W, C3 = qkv.shape
    heads, (wh, ww) = case.options["num_heads"], case.options["window"]
    sh, sw = case.options.get("shift", (0, 0))
    C, D = C3 // 3, C3 // 3 // heads
    Hp, Wp = math.ceil(H / wh) * wh, math.ceil(W / ww) * ww

    def place(y: int, x: int) -> tuple[int, int, bool, bool]:
        """Row and column after the roll, and whether they went around the edge."""
        return (y - sh) % Hp, (x - sw) % Wp, y < sh, x < sw

    out = torch.empty(B, H, W, C, dtype=qkv.dtype)
    for b, y, x, h in (
        (b, y, x, h) for b in range(B) for y in range(H) for x in range(W) for h in range(heads)
    ):
        ry, rx, *around = place(y, x)
        logits, values = [], []
        for ky, kx in ((ky, kx) for ky in range(Hp) for kx in range(Wp)):
            rky, rkx, *key_around = place(ky, kx)
            if (rky // wh, rkx // ww) != (ry // wh, rx // ww) or key_around != around:
                continue
            token = qkv[b, ky, kx] if ky < H and kx < W else pad
            row = (ry - rky + wh - 1) * (2 * ww - 1) + rx - rkx + ww - 1
            q, k = qkv[b, y, x, h * D : h * D + D], token[C + h * D : C + h * D + D]
            logits.append(q @ k / math.sqrt(D) + table[row, h])
            values.append(token[2 * C + h * D : 2 * C + h * D + D])
        out[b, y, x, h * D : h * D + D] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    size = st.integers(1, 5)
    window = (draw(size), draw(size))
    shift = (draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1)))
    return ipsa(
        draw(st.integers(0, 3)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 20)),
        window=window,
        bias=draw(st.booleans()),
        pad=draw(st.booleans()),
        shift=shift,
        scale=draw(st.sampled_from([None, 0.0, 0.3, -1.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


DESCRIPTION = Description(
    name="ipsa",
    small=SMALL,
    cases=CASES,
    dropout=DROPOUT,
    random=random_cases(),
    isa=[
        "padded_9x16",
        "shift_padded",
        "rectangular_5x2_shift_3x1",
        "no_bias_no_pad",
        "window_8",
        "head_dim_17",
        "head_dim_5",
        "dropout",
    ],
    definition=by_loops,
    defined=[
        _case("padded", 2, 5, 7, 2, 3, window=(2, 3)),
        _case("shifted", 1, 6, 6, 1, 4, window=(3, 2), shift=(2, 1)),
        _case("padded_shifted", 1, 5, 7, 2, 2, window=(3, 4), shift=(1, 3)),
        _case("one_window_shifted", 1, 3, 2, 1, 2, window=(4, 5), shift=(3, 2)),
    ],
    half=ipsa(1, 4, 5, 2, 4, window=(2, 3)),
    gradcheck=[
        _case("padded", 1, 3, 4, 2, 1, window=(2, 3)),
        _case("shifted", 1, 3, 4, 1, 2, window=(3, 2), shift=(1, 1)),
        _case("dropout", 1, 3, 3, 1, 2, window=(2, 2), dropout_p=0.4),
        _case("scale_zero", 1, 3, 3, 1, 2, window=(2, 2), scale=0.0),
    ],
    twice=ipsa(1, 3, 4, 1, 2, window=(2, 3), shift=(1, 1)),
    strided=[
        _case("padded_shifted", 2, 9, 8, 2, 8, window=(4, 3), shift=(1, 2)),
        _case("window_7", 2, 9, 8, 2, 8, shift=(3, 3)),
    ],
    steady=[
        _case("dropout", 3, 16, 17, 3, 32, shift=(3, 3), dropout_p=0.2),
        _case("batch_1", 1, 14, 14, 2, 32),
        _case("batch_3", 3, 16, 17, 3, 16, shift=(3, 3)),
    ],
    extreme=[  # of thousands
        _case("50", 16, 9, 10, 2, 8, scale=50.0),
        _case("-50", 16, 9, 10, 2, 8, scale=-50.0),
    ],
    large=ipsa(1, 224, 224, 2, 8),  # weights of 20 MB
    scratch=3 << 20,
    module=lambda **options: InnerPatchAttention(8, 2, (2, 3), (1, 2), **options),
    drops=("attn_drop", "proj_drop"),
    of_size=lambda B, H, W: ipsa(B, H, W, 2, 4, (2, 3)),
)
