"""Blocks of CoaT, serial and parallel, and how a parallel group mixes its scales (paper, 5.1).

Activations are tokens [B, 1 + h w, C]: the scale's CLS token, then its image row by row.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops import ConvPositionEncoding, ConvRelativeAttention, conv_relative_attention
from xattn_ops._linear import linear
from xattn_ops.models.layers import DropPath, Mlp, add_mlp, norm_layer, resize

PARALLEL = (2, 3, 4)  # the scales of a parallel group

Grid = tuple[int, int]


class Rates(NamedTuple):
    """What a block drops in training."""

    drop: float  # elements, after the attention's projection and in the MLP
    drop_path: float  # whole branches


class SerialBlock(nn.Module):
    """x = cpe(x); x += DropPath(attn(norm1 x)); x += DropPath(mlp(norm2 x)). Figure 5.

    Args:
        attention: conv-attention of this scale.
        cpe: conv position encoding, shared by the blocks of a scale; None for none.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: int,
        attention: ConvRelativeAttention,
        cpe: ConvPositionEncoding | None,
        rates: Rates,
    ) -> None:
        super().__init__()
        self.cpe = cpe
        self.norm1 = norm_layer(dim)
        self.factoratt_crpe = attention
        self.drop_path = DropPath(rates.drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim, rates.drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.cpe is not None:
            x = self.cpe(x, grid)
        x = self.drop_path(self.factoratt_crpe(self.norm1(x), grid), x)
        return add_mlp(self.mlp, self.norm2(x), x, self.drop_path)


class ParallelBlock(nn.Module):
    """The serial block on three scales at once, which meet in the attention. Figure 6.

    co_scale "interpolation": each scale adds the others' attention, resized to its own grid;
    "direct": each scale's queries attend to the others' keys and values too, resized to its own
    grid; "none": the scales stay apart. The MLP is one for all.

    Args:
        dim: of every scale.
        attentions: conv-attention of each scale.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: int,
        attentions: Sequence[ConvRelativeAttention],
        co_scale: str,
        rates: Rates,
    ) -> None:
        super().__init__()
        self.co_scale = co_scale
        mlp = Mlp(dim, mlp_ratio * dim, rates.drop)
        for scale, attention in zip(PARALLEL, attentions, strict=True):
            self.add_module(f"norm1{scale}", norm_layer(dim))
            self.add_module(f"factoratt_crpe{scale}", attention)
            self.add_module(f"norm2{scale}", norm_layer(dim))
            self.add_module(f"mlp{scale}", mlp)
        self.drop_path = DropPath(rates.drop_path)

    def forward(
        self, xs: list[Tensor], grids: list[Grid], cpes: list[ConvPositionEncoding]
    ) -> list[Tensor]:
        """The tokens of each scale, its grid and its position encoding (all or none have one)."""
        if cpes:
            xs = [cpe(x, grid) for cpe, x, grid in zip(cpes, xs, grids, strict=True)]
        normed = [norm(x) for norm, x in zip(self._each("norm1"), xs, strict=True)]
        branches = zip(self._attend(normed, grids), xs, strict=True)
        xs = [self.drop_path(branch, x) for branch, x in branches]
        layers = zip(self._each("norm2"), self._each("mlp"), xs, strict=True)
        return [add_mlp(mlp, norm(x), x, self.drop_path) for norm, mlp, x in layers]

    def _attend(self, xs: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        attentions = self._each("factoratt_crpe")
        if self.co_scale == "direct":
            return cross_layer_attention(attentions, xs, grids)
        ys = [attend(x, grid) for attend, x, grid in zip(attentions, xs, grids, strict=True)]
        return add_interpolated(ys, grids) if self.co_scale == "interpolation" else ys

    def attention(self, scale: int) -> tuple[nn.Module, ConvRelativeAttention]:
        """The conv-attention of a scale, after the norm before it."""
        return getattr(self, f"norm1{scale}"), getattr(self, f"factoratt_crpe{scale}")

    def _each(self, name: str) -> list[Any]:
        return [getattr(self, f"{name}{scale}") for scale in PARALLEL]


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """The image of [B, 1 + h w, C] as [B, C, h, w], a view."""
    return tokens[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(cls: Tensor, image: Tensor) -> Tensor:
    """[B, 1, C] and [B, C, h, w] -> [B, 1 + h w, C]."""
    return torch.cat([cls, image.flatten(2).mT], 1)


def add_interpolated(xs: list[Tensor], grids: list[Grid]) -> list[Tensor]:
    """Each scale plus the others resized to its grid; the CLS tokens are summed (5.1)."""
    cls = _sum(x[:, :1] for x in xs)
    maps = [as_map(x, grid) for x, grid in zip(xs, grids, strict=True)]
    return [as_tokens(cls, _sum(resize(image, grid) for image in maps)) for grid in grids]


def cross_layer_attention(
    attentions: list[ConvRelativeAttention], xs: list[Tensor], grids: list[Grid]
) -> list[Tensor]:
    """Conv-attention of each scale's queries to all scales' keys and values, summed (5.1).

    Keys and values of other scales are resized to the queries' grid; CLS rows pass as they are. The
    scale's relative encoding and output projection serve its cross-attentions too, each of which
    is projected: so come the parameters and the MACs of table 7.
    """
    qkvs = [linear(x, a.qkv.weight, a.qkv.bias) for a, x in zip(attentions, xs, strict=True)]
    sums = []
    for attention, qkv, grid in zip(attentions, qkvs, grids, strict=True):
        dim = attention.qkv.in_features
        q = qkv[..., :dim]
        others = [(o[..., dim:], g) for o, g in zip(qkvs, grids, strict=True) if o is not qkv]
        crossed = [torch.cat([q, _resize_tokens(kv, g, grid)], -1) for kv, g in others]
        sums.append(_sum(_attend_and_project(attention, x, grid) for x in [qkv, *crossed]))
    return sums


def _resize_tokens(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    return as_tokens(x[:, :1], resize(as_map(x, grid), size))


def _attend_and_project(attention: ConvRelativeAttention, qkv: Tensor, grid: Grid) -> Tensor:
    """A conv-attention on given queries, keys and values."""
    out = conv_relative_attention(
        qkv,
        *relative_term(attention),
        num_heads=attention.num_heads,
        grid=grid,
        scale=attention.scale,
        backend=attention.backend,
    )
    out = linear(out, attention.proj.weight, attention.proj.bias)
    return F.dropout(out, attention.proj_drop, attention.training)


def relative_term(attention: ConvRelativeAttention) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of its relative encoding, as the public functions take them."""
    return ([], []) if attention.crpe is None else attention.crpe.tensors()


def _sum(tensors: Any) -> Tensor:
    return functools.reduce(operator.add, tensors)
