"""CLS-query cross attention: the equation, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dropout import draw_seed, keep_mask


def cls_cross_attention_reference(
    cls_token: Tensor,
    patches: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    num_heads: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`cls_cross_attention` on any device and in any dtype, differentiable twice.

    seed: int64 scalar that fixes the dropout mask; None draws one.
    """
    B, _, C = cls_token.shape
    D = C // num_heads
    scale = D**-0.5 if scale is None else scale

    tokens = torch.cat([cls_token, patches], 1)  # [B, 1 + N, C]
    if norm_weight is not None:
        tokens = F.layer_norm(tokens, (C,), norm_weight, norm_bias, eps)
    q = F.linear(tokens[:, :1], q_weight, q_bias)
    k = F.linear(tokens, k_weight, k_bias)
    v = F.linear(tokens, v_weight, v_bias)
    q, k, v = (t.unflatten(-1, (num_heads, D)).transpose(1, 2) for t in (q, k, v))

    weights = (scale * (q @ k.mT)).softmax(-1)  # [B, heads, 1, 1 + N]
    if dropout_p > 0:
        seed = draw_seed(cls_token.device) if seed is None else seed
        keep = keep_mask(seed, B * num_heads, 1, weights.shape[-1], dropout_p)
        weights = weights * keep.view(weights.shape) / (1 - dropout_p)
    return (weights @ v).transpose(1, 2).reshape(B, 1, C)
