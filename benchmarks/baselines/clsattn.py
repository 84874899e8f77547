"""CLS-query cross attention in plain PyTorch, in three forms.

All take (cls_token [B, 1, C], patches [B, N, C], then weight and bias of q, k, v and, where there
is one, of the LayerNorm), and give [B, 1, C] before the output projection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_ops.benchmarks.baselines.plain import Plain

CLS_EPS = 1e-6  # of CrossViT's LayerNorms


def cls_eager(heads: int) -> Plain:
    """As the official code of CrossViT has it: k and v of all tokens, attention spelled out."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v

    return _projected(heads, attend)


def cls_sdpa(heads: int) -> Plain:
    """The same through scaled_dot_product_attention."""
    return _projected(heads, F.scaled_dot_product_attention)


def cls_absorbed(heads: int) -> Plain:
    """W_k multiplied into the query and W_v after the weighted sum, so that k and v never exist.

    softmax_n(q_h . (W_k t_n + b_k)) = softmax_n((q_h W_k) . t_n), for q_h . b_k is the same for
    all n; and sum_n p_n (W_v t_n + b_v) = W_v (sum_n p_n t_n) + b_v, for the p_n sum to 1.
    """

    def cls_attention(cls_token: Tensor, patches: Tensor, *weights: Tensor) -> Tensor:
        q_weight, q_bias, k_weight, _, v_weight, v_bias, *norm = weights
        batch, _, channels = cls_token.shape
        dim = channels // heads
        tokens = _tokens(cls_token, patches, norm)
        q = F.linear(tokens[:, 0], q_weight, q_bias).view(batch, heads, dim).transpose(0, 1)
        absorbed = (q @ k_weight.view(heads, dim, channels) * dim**-0.5).transpose(0, 1)
        weights_of = (absorbed @ tokens.transpose(1, 2)).softmax(-1)  # [B, heads, 1 + N]
        pooled = (weights_of @ tokens).transpose(0, 1)  # [heads, B, C]
        out = pooled @ v_weight.view(heads, dim, channels).transpose(1, 2)
        return out.transpose(0, 1).reshape(batch, 1, channels) + v_bias

    return cls_attention


def _projected(heads: int, attend: Callable[..., Tensor]) -> Plain:
    def cls_attention(cls_token: Tensor, patches: Tensor, *weights: Tensor) -> Tensor:
        q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, *norm = weights
        tokens = _tokens(cls_token, patches, norm)
        q = F.linear(tokens[:, :1], q_weight, q_bias)
        k, v = F.linear(tokens, k_weight, k_bias), F.linear(tokens, v_weight, v_bias)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v).transpose(1, 2).reshape(cls_token.shape)

    return cls_attention


def _tokens(cls_token: Tensor, patches: Tensor, norm: list[Tensor]) -> Tensor:
    tokens = torch.cat((cls_token, patches), 1)
    if not norm:
        return tokens
    weight, bias = norm
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, CLS_EPS)
