"""CLS-query cross attention with its linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._linear import linear
from .interface import cls_cross_attention


class ClsCrossAttention(nn.Module):
    """y = proj(cls_cross_attention(cls, patches)) with the weights `wq`, `wk`, `wv`, CrossViT's.

    cls [B, 1, dim], patches [B, N, dim] -> [B, 1, dim].

    Args:
        dim: channels; num_heads divides it.
        qkv_bias: whether wq, wk and wv have biases.
        scale: factor on the logits; None: (dim / num_heads) ** -0.5.
        attn_drop, proj_drop: dropout in training, on the attention weights and on the output.
        backend: of the attention; None: the first that can.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.divides("num_heads", num_heads, "dim", _checks.integer("dim", dim, 1))
        self.num_heads = num_heads
        self.scale = scale
        self.attn_drop = _checks.probability("attn_drop", attn_drop)
        self.proj_drop = _checks.probability("proj_drop", proj_drop)
        self.backend = backend
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, cls_token: Tensor, patches: Tensor, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """norm: the LayerNorm over all tokens before the attention, done inside it; None: none."""
        out = cls_cross_attention(
            cls_token,
            patches,
            self.wq.weight,
            self.wq.bias,
            self.wk.weight,
            self.wk.bias,
            self.wv.weight,
            self.wv.bias,
            num_heads=self.num_heads,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=1e-6 if norm is None else norm.eps,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )
        out = linear(out, self.proj.weight, self.proj.bias)
        return F.dropout(out, self.proj_drop, self.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
