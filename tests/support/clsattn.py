"""Cases of cls_cross_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from support.cases import Case, Tensors
from support.description import Description, param
from xattn_ops import ClsCrossAttention, cls_cross_attention
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
        {"out": (B, 1, C)},
        options,
        zero=("k_bias",),
    )


_case = param(clsattn)

SMALL = clsattn(2, 7, 2, 4)

CASES = [
    _case("crossvit_tiny_large", 1, 400, 3, 32),
    _case("crossvit_15_small", 2, 196, 6, 32),
    _case("crossvit_15_large", 1, 100, 6, 64),
    _case("crossvit_9", 2, 49, 4, 32),
    _case("crossvit_18", 1, 49, 7, 32),
    _case("crossvit_18_large", 2, 40, 7, 64),
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
    _case("channels_1040", 1, 40, 16, 65),
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


def by_loops(case: Case, tensors: Tensors) -> Tensor:
    """The definition, token by token and head by head; shares nothing with the reference."""
    heads, scale, eps = (case.options.get(n) for n in ("num_heads", "scale", "eps"))
    t = {name: tensors.get(name) for name in ("q_bias", "v_bias", "norm_weight", "norm_bias")}
    B, _, C = tensors["cls_token"].shape
    D, out = C // heads, torch.zeros(tensors["cls_token"].shape, dtype=torch.float64)

    def normed(token: Tensor) -> Tensor:
        if t["norm_weight"] is None:
            return token
        mean = sum(token) / C
        spread = sum((token - mean) ** 2) / C
        hat = (token - mean) / math.sqrt(spread + (1e-6 if eps is None else eps)) * t["norm_weight"]
        return hat if t["norm_bias"] is None else hat + t["norm_bias"]

    def projected(name: str, token: Tensor, head: int) -> Tensor:
        rows = slice(head * D, head * D + D)
        y = tensors[f"{name}_weight"][rows] @ token
        return y if tensors.get(f"{name}_bias") is None else y + tensors[f"{name}_bias"][rows]

    for b in range(B):
        tokens = [normed(x) for x in (tensors["cls_token"][b, 0], *tensors["patches"][b])]
        for h in range(heads):
            q = projected("q", tokens[0], h)
            powers = [math.exp(scale * (q @ projected("k", x, h)).item()) for x in tokens]
            for power, x in zip(powers, tokens, strict=True):
                out[b, 0, h * D : h * D + D] += power / sum(powers) * projected("v", x, h)
    return out


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    return clsattn(
        draw(st.integers(0, 4)),
        draw(st.integers(1, 90)),
        draw(st.integers(1, 9)),
        draw(st.integers(4, 24)),  # of two channels, a LayerNorm leaves the signs alone
        norm=draw(st.sampled_from(["affine", "affine", "weight", "none"])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([0.0, 0.005, -0.01])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25])),
    )


class OfCls(nn.Module):
    """ClsCrossAttention as a module of maps: every pixel is what CLS takes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.module = ClsCrossAttention(8, 2, **options)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        cls = x.mean((1, 2))[:, None]
        return self.module(cls, x.flatten(1, 2), self.norm)[:, None].expand(x.shape)


DESCRIPTION = Description(
    name="clsattn",
    small=SMALL,
    cases=CASES,
    dropout=DROPOUT,
    random=random_cases(),
    isa=[
        "crossvit_15_small",
        "crossvit_18",
        "no_norm",
        "norm_without_shift",
        "no_bias_no_norm",
        "one_patch",
        "patches_17",
        "heads_5",
        "head_dim_19",
        "dropout",
        "dropout_odd",
    ],
    definition=by_loops,
    defined=[
        _case("norm", 2, 5, 2, 3),
        _case("norm_without_shift", 1, 4, 3, 2, norm="weight", eps=0.3),
        _case("no_norm", 2, 3, 1, 4, norm="none"),
        _case("no_bias", 1, 1, 2, 2, norm="none", bias=False),
    ],
    half=clsattn(1, 6, 3, 4, scale=None),
    gradcheck=[
        _case("norm", 2, 3, 2, 2),
        _case("norm_without_shift", 1, 4, 1, 3, norm="weight", eps=0.1),
        _case("no_norm", 2, 3, 2, 2, norm="none", bias=False),
        _case("one_patch", 1, 1, 2, 2),
        _case("dropout", 2, 5, 2, 2, dropout_p=0.4),
        _case("scale_zero", 1, 3, 1, 2, scale=0.0),
    ],
    twice=clsattn(1, 3, 2, 2),
    strided=[
        _case("norm", 2, 30, 3, 16),
        _case("no_norm", 2, 19, 2, 16, norm="none"),
        _case("no_norm_heads_3", 2, 30, 3, 16, norm="none"),
    ],
    steady=[
        _case("plain", 3, 131, 3, 16),
        _case("all", 3, 131, 3, 16, norm="none", dropout_p=0.2),
        _case("batch_1", 1, 400, 6, 32),
        _case("batch_3", 3, 196, 3, 16),
        _case("many_patches", 1, 2311, 1, 8, norm="none"),  # split: few heads leave threads idle
        _case("dropout", 2, 100, 2, 19, dropout_p=0.3),
    ],
    free_order=("out", *clsattn(1, 1, 1, 1).shapes),
    extreme=[
        _case("1", 16, 40, 2, 8, scale=1.0),
        _case("-3", 16, 40, 2, 8, scale=-3.0),
    ],
    large=clsattn(1, 16384, 8, 8),  # K and V of 8 MB
    scratch=2 << 20,
    module=OfCls,
    drops=("attn_drop", "proj_drop"),
    idle=("module.wk.bias",),
    of_size=lambda B, H, W: clsattn(B, H * W, 2, 4),
)
