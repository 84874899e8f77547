"""Digest-token attention with its linear layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .._linear import linear
from .interface import digest_attention


class Tables(NamedTuple):
    """What depends on the grid, for M digests of all blocks together."""

    grid: tuple[int, int]
    bias: Tensor  # [num_heads, gh * gw], by offset
    digest_bias: Tensor | None  # [num_heads, M]; None without digests
    digest_scale: Tensor | None  # [1, M, 1]; None without digests or without scale factors


class DigestAttention(nn.Module):
    """The attention of a CabViT block: x [B, N, dim], digests [B, M, dim] -> [B, N, dim].

    Digests are scaled token by token, normalised and projected to keys and values by the qkv layer
    of the tokens (CabViT eq. 2-4); parameters carry the names of the official code.

    Args:
        dim: channels; num_heads divides it.
        grid: rows and columns of the tokens.
        num_digests: M, the digests of all earlier blocks together; 0 for the first block of a
            stage, which has no parameters for them.
        num_prefix_tokens: how many tokens, such as a class token, precede the grid.
        digest_scale: whether digests have learned scale factors.
        qkv_bias: whether the qkv layer has a bias.
        scale: factor on the logits; None: (dim / num_heads) ** -0.5.
        attn_drop, proj_drop: dropout in training, on the attention weights and on the output.
        backend: of the attention; None: the first that can.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        num_digests: int = 0,
        *,
        num_prefix_tokens: int = 0,
        digest_scale: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.divides("num_heads", num_heads, "dim", _checks.integer("dim", dim, 1))
        self.num_heads = num_heads
        self.grid = _checks.pair("grid", grid, 1)
        self.num_digests = M = _checks.integer("num_digests", num_digests, 0)
        self.num_prefix_tokens = _checks.integer("num_prefix_tokens", num_prefix_tokens, 0)
        self.scale = scale
        self.attn_drop = _checks.probability("attn_drop", attn_drop)
        self.proj_drop = _checks.probability("proj_drop", proj_drop)
        self.backend = backend
        self.attention_biases = nn.Parameter(torch.empty(num_heads, self.grid[0] * self.grid[1]))
        self.s_token_bias = nn.Parameter(torch.empty(1, num_heads, 1, M)) if M else None
        self.s_scale_factors = nn.Parameter(torch.ones(1, M, 1)) if M and digest_scale else None
        self.s_norm = nn.LayerNorm(dim) if M else None
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        for bias in (self.attention_biases, self.s_token_bias):
            if bias is not None:
                nn.init.trunc_normal_(bias, std=0.02)

    def forward(self, x: Tensor, digests: Tensor | None = None) -> Tensor:
        out = linear(self.attend(x, digests, self.tables()), self.proj.weight, self.proj.bias)
        return F.dropout(out, self.proj_drop, self.training)

    def tables(self) -> Tables:
        """The module's own, for its grid."""
        digest_bias = None if self.s_token_bias is None else self.s_token_bias[0, :, 0]
        return Tables(self.grid, self.attention_biases, digest_bias, self.s_scale_factors)

    def attend(self, x: Tensor, digests: Tensor | None, tables: Tables) -> Tensor:
        """What enters the output projection: [B, N, dim]."""
        return digest_attention(
            linear(x, self.qkv.weight, self.qkv.bias),
            self.digest_kv(x, digests, tables),
            tables.bias,
            tables.digest_bias,
            num_heads=self.num_heads,
            grid=tables.grid,
            num_prefix_tokens=self.num_prefix_tokens,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )

    def digest_kv(self, x: Tensor, digests: Tensor | None, tables: Tables) -> Tensor | None:
        """Keys and values [B, M, 2 dim] of the digests [B, M, dim]; None without any."""
        if self.s_norm is None or tables.digest_bias is None:
            if digests is not None and digests.shape[1] > 0:
                shape = list(digests.shape)
                raise ValueError(f"digests must be None for num_digests=0, got shape {shape}")
            return None
        dim, bias = self.qkv.in_features, self.qkv.bias
        sizes = (x.shape[0], tables.digest_bias.shape[1], dim)
        _checks.tensor("digests", digests, "[B, M, dim]", sizes=sizes)
        assert digests is not None
        if tables.digest_scale is not None:
            digests = digests * tables.digest_scale
        # the queries' rows of the layer are left out: nobody reads queries of digests
        return linear(
            self.s_norm(digests), self.qkv.weight[dim:], None if bias is None else bias[dim:]
        )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, grid={self.grid}, num_digests={self.num_digests}, "
            f"num_prefix_tokens={self.num_prefix_tokens}"
        )
