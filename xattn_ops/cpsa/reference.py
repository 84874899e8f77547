"""Cross-patch self-attention: the equation, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._dropout import draw_seed, keep_mask


def cross_patch_attention_reference(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch: tuple[int, int] = (7, 7),
    num_heads: int = 1,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`cross_patch_attention` on any device and in any dtype, differentiable twice.

    seed: int64 scalar that fixes the dropout mask; None draws one.
    """
    B, H, W, C = x.shape
    ph, pw = patch
    P, D = ph * pw, ph * pw // num_heads
    scale = D**-0.5 if scale is None else scale

    x = F.pad(x, (0, 0, 0, -W % pw, 0, -H % ph))
    Hp, Wp = x.shape[1:3]
    T = (Hp // ph) * (Wp // pw)
    # a token is one channel's patch: [B, Hp, Wp, C] -> [B, C, T, P]
    tokens = x.reshape(B, Hp // ph, ph, Wp // pw, pw, C).permute(0, 5, 1, 3, 2, 4)
    tokens = tokens.reshape(B, C, T, P)

    qkv = F.linear(tokens, qkv_weight, qkv_bias).reshape(B, C, T, 3, num_heads, D)
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # 3 x [B, C, heads, T, D]
    weights = (scale * (q @ k.mT)).softmax(-1)  # [B, C, heads, T, T]
    if dropout_p > 0:
        seed = draw_seed(x.device) if seed is None else seed
        keep = keep_mask(seed, B * C * num_heads, T, T, dropout_p)
        weights = weights * keep.view(weights.shape) / (1 - dropout_p)
    out = (weights @ v).transpose(2, 3).reshape(B, C, T, P)
    out = F.linear(out, proj_weight, proj_bias)

    out = out.reshape(B, C, Hp // ph, Wp // pw, ph, pw).permute(0, 2, 4, 3, 5, 1)
    return out.reshape(B, Hp, Wp, C)[:, :H, :W].contiguous()
