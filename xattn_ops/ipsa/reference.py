"""Inner-patch self-attention: the equation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dropout import draw_seed, keep_mask


def inner_patch_attention_reference(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window: tuple[int, int] = (7, 7),
    shift: tuple[int, int] = (0, 0),
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`inner_patch_attention` on any device and in any dtype, differentiable twice.

    seed: int64 scalar that fixes the dropout mask; None draws one.
    """
    B, H, W, C3 = qkv.shape
    C, D = C3 // 3, C3 // 3 // num_heads
    wh, ww = window
    sh, sw = shift
    N = wh * ww
    scale = D**-0.5 if scale is None else scale

    tokens = _pad(qkv, pad_qkv, -H % wh, -W % ww).roll((-sh, -sw), (1, 2))
    Hp, Wp = tokens.shape[1:3]
    nH, nW = Hp // wh, Wp // ww
    # [B, nH, wh, nW, ww, 3, heads, D] -> 3 x [B, nH nW, heads, N, D]
    q, k, v = (
        tokens.reshape(B, nH, wh, nW, ww, 3, num_heads, D)
        .permute(5, 0, 1, 3, 6, 2, 4, 7)
        .reshape(3, B, nH * nW, num_heads, N, D)
    )

    logits = scale * (q @ k.mT)  # [B, nH nW, heads, N, N]
    if bias_table is not None:
        index = relative_index(window, qkv.device)
        logits = logits + bias_table[index].permute(2, 0, 1)
    if sh or sw:
        allowed = same_region(Hp, Wp, window, shift, qkv.device)
        logits = logits.masked_fill(~allowed[:, None], float("-inf"))
    weights = logits.softmax(-1)
    if dropout_p > 0:
        seed = draw_seed(qkv.device) if seed is None else seed
        keep = keep_mask(seed, B * nH * nW * num_heads, N, N, dropout_p)
        weights = weights * keep.view(weights.shape) / (1 - dropout_p)

    out = (weights @ v).reshape(B, nH, nW, num_heads, wh, ww, D)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, Hp, Wp, C)
    return out.roll((sh, sw), (1, 2))[:, :H, :W].contiguous()


def relative_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """Row of the table for each query and key: [N, N]; offsets are query minus key."""
    wh, ww = window
    y, x = torch.arange(wh * ww, device=device) // ww, torch.arange(wh * ww, device=device) % ww
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + wh - 1) * (2 * ww - 1) + dx + ww - 1


def same_region(
    Hp: int, Wp: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Which tokens of a rolled map see each other: bool [nH nW, N, N].

    Both wrapped around the edge or neither, in rows and in columns alike.
    """
    wh, ww = window
    row = torch.arange(Hp, device=device) >= Hp - shift[0]
    column = torch.arange(Wp, device=device) >= Wp - shift[1]
    region = 2 * row[:, None].int() + column.int()  # [Hp, Wp]
    region = region.view(Hp // wh, wh, Wp // ww, ww).permute(0, 2, 1, 3).reshape(-1, wh * ww)
    return region[:, :, None] == region[:, None]


def _pad(qkv: Tensor, pad_qkv: Tensor | None, below: int, right: int) -> Tensor:
    """Tokens `pad_qkv` (None: zeros) below and right of the image."""
    if not below and not right:
        return qkv
    B, H, W, C3 = qkv.shape
    token = qkv.new_zeros(C3) if pad_qkv is None else pad_qkv
    qkv = torch.cat([qkv, token.expand(B, H, right, C3)], 2)
    return torch.cat([qkv, token.expand(B, below, W + right, C3)], 1)
