"""What the CLS token looks at: the weights that the operator never returns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import check


def cls_cross_attention_map(
    cls_token: Tensor,
    patches: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    *,
    num_heads: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """The attention weights A of `cls_cross_attention` (CrossViT, eq. 6), in plain PyTorch.

    Args: as of `cls_cross_attention`, which has the same names.

    Returns:
        [B, num_heads, 1 + N], first the weight of the CLS token itself; each row sums to 1.
        Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape or range.
    """
    keys = (q_weight, q_bias, k_weight, k_bias, None, None, norm_weight, norm_bias)
    scale, eps = check(
        cls_token, patches, *keys, num_heads=num_heads, eps=eps, scale=scale, values=False
    )
    tokens = torch.cat([cls_token, patches], 1)
    if norm_weight is not None:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
    q = F.linear(tokens[:, 0], q_weight, q_bias).unflatten(-1, (num_heads, -1))  # [B, heads, D]
    k = F.linear(tokens, k_weight, k_bias).unflatten(-1, (num_heads, -1))  # [B, 1 + N, heads, D]
    return (scale * torch.einsum("bhd,bnhd->bhn", q, k)).softmax(-1)
