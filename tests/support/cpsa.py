"""Cases of cross_patch_attention."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.cases import Case, Tensors
from support.description import Description, param
from xattn_ops import CrossPatchAttention, cross_patch_attention
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
    outs = {"out": (B, H, W, C)}
    return Case(cross_patch_attention, cross_patch_attention_reference, shapes, outs, options)


_case = param(cpsa)

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
    _case("patch_16", 1, 16, 17, 2, patch=(16, 16)),
    _case("tokens_20_padded", 1, 9, 8, 5, patch=(2, 2)),
    _case("tokens_64", 1, 16, 16, 3, patch=(2, 2)),
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
    _case("dropout_many_tokens", 1, 20, 17, 2, patch=(2, 2), num_heads=2, dropout_p=0.3),
    _case("dropout_tiny", 1, 14, 14, 4, dropout_p=1e-12),
    _case("dropout_most", 2, 14, 14, 4, dropout_p=0.9),
    _case("dropout_no_bias", 1, 14, 10, 4, qkv_bias=False, proj_bias=False, dropout_p=0.5),
    _case("dropout_empty_batch", 0, 14, 7, 4, dropout_p=0.5),
]


def by_loops(case: Case, tensors: Tensors) -> Tensor:
    """The definition, channel by channel and patch by patch; shares nothing with the reference."""
    x, (ph, pw), heads = tensors["x"], case.options["patch"], case.options.get("num_heads", 1)
    B, H, W, C = x.shape
    P, D = ph * pw, ph * pw // heads
    corners = [(y, x) for y in range(0, H, ph) for x in range(0, W, pw)]

    out = torch.zeros(B, H + ph, W + pw, C, dtype=x.dtype)
    for b, c in ((b, c) for b in range(B) for c in range(C)):
        tokens = torch.zeros(len(corners), P, dtype=x.dtype)
        for t, (top, left) in enumerate(corners):
            for i, j in ((i, j) for i in range(ph) for j in range(pw)):
                if top + i < H and left + j < W:
                    tokens[t, i * pw + j] = x[b, top + i, left + j, c]
        q, k, v = (tokens @ tensors["qkv_weight"].mT + tensors["qkv_bias"]).split(P, -1)
        mixed = torch.zeros_like(tokens)
        for h in (slice(n * D, n * D + D) for n in range(heads)):
            weights = (q[:, h] @ k[:, h].mT * case.options["scale"]).softmax(-1)
            mixed[:, h] = weights @ v[:, h]
        result = mixed @ tensors["proj_weight"].mT + tensors["proj_bias"]
        for t, (top, left) in enumerate(corners):
            out[b, top : top + ph, left : left + pw, c] = result[t].reshape(ph, pw)
    return out[:, :H, :W]


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    patch = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    divisors = [n for n in range(1, 26) if patch[0] * patch[1] % n == 0]
    return cpsa(
        draw(st.integers(0, 3)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 20)),
        patch=patch,
        qkv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
        num_heads=draw(st.sampled_from([1, *divisors])),
        scale=draw(st.sampled_from([0.0, 0.05, -0.1])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


DESCRIPTION = Description(
    name="cpsa",
    small=SMALL,
    cases=CASES,
    dropout=DROPOUT,
    random=random_cases(),
    isa=[
        "padded_9x16",
        "cat_stage4_one_token",
        "channels_33",
        "channels_17",
        "heads_7",
        "rectangular_5x2",
        "tokens_20_padded",
        "no_bias",
        "dropout",
    ],
    definition=by_loops,
    defined=[
        _case("padded", 2, 5, 7, 2, patch=(2, 3)),
        _case("heads", 1, 6, 8, 3, patch=(3, 4), num_heads=3),
        _case("one_token_padded", 1, 2, 3, 2, patch=(3, 4), num_heads=2),
    ],
    half=cpsa(1, 6, 6, 2, patch=(3, 4), num_heads=3, scale=None),
    gradcheck=[
        _case("padded", 2, 3, 4, 1, patch=(2, 2)),
        _case("heads", 1, 4, 4, 1, patch=(2, 2), num_heads=2),
        _case("one_token", 1, 2, 2, 3, patch=(2, 2)),
        _case("dropout", 1, 4, 4, 1, patch=(2, 2), dropout_p=0.4),
        _case("scale_zero", 1, 3, 4, 1, patch=(2, 2), scale=0.0),
    ],
    twice=cpsa(1, 3, 4, 1, patch=(2, 2), num_heads=2),
    strided=[
        _case("rectangular", 2, 9, 8, 6, patch=(4, 3)),
        _case("patch_7", 2, 9, 14, 5),
        _case("heads_7", 2, 9, 14, 5, num_heads=7),
    ],
    steady=[
        _case("plain", 3, 14, 17, 18),
        _case("all", 3, 14, 17, 18, num_heads=7, dropout_p=0.2),
        _case("batch_1", 1, 14, 14, 40),
        _case("batch_3", 3, 9, 14, 18),
        _case("one_token", 2, 7, 7, 33),
        _case("heads", 2, 14, 14, 6, num_heads=7),
    ],
    free_order=("qkv_weight", "qkv_bias", "proj_weight", "proj_bias"),
    extreme=[
        _case(f"heads_{heads}-{scale:g}", 32, 9, 12, 8, (4, 4), num_heads=heads, scale=scale)
        for heads in (1, 2)
        for scale in (0.5, -1.0)
    ],
    large=cpsa(1, 224, 224, 16),  # weights of 67 MB, five copies of x
    scratch=24 << 20,
    module=lambda **options: CrossPatchAttention((2, 3), **options),
    drops=("attn_drop", "proj_drop"),
    of_size=lambda B, H, W: cpsa(B, H, W, 8, (2, 3)),
)
