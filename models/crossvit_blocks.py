"""Stages of CrossViT: ViT blocks in two branches, then one of the fusions of section 3.3.

Branch 0 is the small one (fine patches), branch 1 the large. Activations are tokens [B, P + N, C]
of each branch: the CLS token where there is one (P = 1), then the patches row by row. Without CLS
tokens (P = 0) the mean of the patches takes their place: it is what fusion reads and replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops import ClsCrossAttention
from xattn_ops._linear import linear
from xattn_ops.models.layers import DropPath, Linear, Mlp, add_mlp, norm_layer, resize, run

BRANCHES = (0, 1)

Grid = tuple[int, int]


class Rates(NamedTuple):
    """What a stage drops in training."""

    drop: float  # elements, after projections and in the MLPs
    attn_drop: float  # attention weights
    drop_path: Sequence[float]  # whole residual branches: of the first block, the second, ...


class Architecture(NamedTuple):
    """What all stages of a model have in common."""

    dims: tuple[int, int]
    heads: int
    depths: tuple[int, int]  # blocks of each branch
    mlp_ratio: float
    fusion_depth: int  # cross-attention blocks
    has_cls: bool
    checkpoint: bool  # whether training recomputes each block in backward
    backend: str | None


class SelfAttention(nn.Module):
    """proj(softmax(q k^T / sqrt(D)) v) through torch's scaled_dot_product_attention."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float, proj_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.proj_drop = proj_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = linear(x, self.qkv.weight, self.qkv.bias)
        # [B, N, 3C] -> 3 x [B, heads, N, D]
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        out = linear(out.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
        return F.dropout(out, self.proj_drop, self.training)


class Block(nn.Module):
    """x += DropPath(MSA(norm1 x)); x += DropPath(FFN(norm2 x)). Equation 1."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, rates: Rates, i: int) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = SelfAttention(dim, num_heads, rates.attn_drop, rates.drop)
        self.drop_path = DropPath(rates.drop_path[i])
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), rates.drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path(self.attn(self.norm1(x)), x)
        return add_mlp(self.mlp, self.norm2(x), x, self.drop_path)


class CrossAttentionBlock(nn.Module):
    """cls + DropPath(MCA(norm1 [cls; patches])), the query from cls alone. Equation 7."""

    def __init__(self, dim: int, num_heads: int, rates: Rates, backend: str | None) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = ClsCrossAttention(
            dim, num_heads, attn_drop=rates.attn_drop, proj_drop=rates.drop, backend=backend
        )
        self.drop_path = DropPath(rates.drop_path[-1])

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        return self.drop_path(self.attn(cls, patches, self.norm1), cls)


class CrossAttentionBlocks(nn.ModuleList):
    """Several in a row: CLS goes through, the patches serve each. L of table 7."""

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        for block in self:
            cls = block(cls, patches)
        return cls


def projection(dim: int, other: int) -> nn.Module:
    """f or g of section 3.3."""
    return nn.Sequential(norm_layer(dim), nn.GELU(), Linear(dim, other))


def aligned(dim: int, other: int) -> nn.Module:
    """f or g where they are there to align widths; nothing where the widths are equal."""
    return nn.Identity() if dim == other else projection(dim, other)


class Stage(nn.Module):
    """One multi-scale encoder: the blocks of both branches, without fusion."""

    CLS_ALONE = True  # whether fusion leaves the patches as they are

    def __init__(self, architecture: Architecture, rates: Rates) -> None:
        super().__init__()
        dims, heads, depths, mlp_ratio = architecture[:4]
        self.prefix = int(architecture.has_cls)
        self.checkpoint = architecture.checkpoint
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(dim, heads, mlp_ratio, rates, i) for i in range(depth))
            for dim, depth in zip(dims, depths, strict=True)
        )

    def forward(self, xs: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """The tokens of each branch, and their grid."""
        recompute = self.checkpoint and self.training
        outs = []
        for x, blocks in zip(xs, self.blocks, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                x = run(block, x, recompute=recompute)
            outs.append(x)
        return self.fuse(outs, grids)

    def fuse(self, xs: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        return xs

    def summary(self, x: Tensor) -> Tensor:
        """The CLS token, or the mean of the patches: [B, 1, C]."""
        return x[:, :1] if self.prefix else x.mean(1, keepdim=True)

    def patches(self, x: Tensor) -> Tensor:
        return x[:, self.prefix :]

    def with_summary(self, x: Tensor, summary: Tensor) -> Tensor:
        """x with another summary: another first token, or all patches moved to another mean."""
        if self.prefix:
            return torch.cat([summary, x[:, 1:]], 1)
        return x + (summary - x.mean(1, keepdim=True))


class CrossAttentionStage(Stage):
    """Each branch's CLS token asks the other branch's patches. Equations 5 to 7."""

    def __init__(self, architecture: Architecture, rates: Rates) -> None:
        super().__init__(architecture, rates)
        dims, heads, depth = architecture.dims, architecture.heads, architecture.fusion_depth
        others = dims[::-1]

        def fusion(dim: int) -> nn.Module:
            blocks = [
                CrossAttentionBlock(dim, heads, rates, architecture.backend) for _ in range(depth)
            ]
            # the official layout has no list around a lone block
            return blocks[0] if depth == 1 else CrossAttentionBlocks(blocks)

        self.projs = nn.ModuleList(map(aligned, dims, others))
        self.fusion = nn.ModuleList(map(fusion, others))
        self.revert_projs = nn.ModuleList(map(aligned, others, dims))

    def fuse(self, xs: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        outs = []
        for b in BRANCHES:
            cls = self.projs[b](self.summary(xs[b]))
            cls = self.fusion[b](cls, self.patches(xs[1 - b]))
            outs.append(self.with_summary(xs[b], self.revert_projs[b](cls)))
        return outs


class ClassTokenStage(Stage):
    """Each branch takes the sum of both CLS tokens. Equation 3.

    f (`projs`) leads to the width of the wider branch, g (`revert_projs`) back.
    """

    ALIGN = staticmethod(aligned)

    def __init__(self, architecture: Architecture, rates: Rates) -> None:
        super().__init__(architecture, rates)
        dims, width = architecture.dims, max(architecture.dims)
        self.projs = nn.ModuleList(self.ALIGN(dim, width) for dim in dims)
        self.revert_projs = nn.ModuleList(self.ALIGN(width, dim) for dim in dims)

    def fuse(self, xs: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        small, large = (f(self.summary(x)) for f, x in zip(self.projs, xs, strict=True))
        summaries = (g(small + large) for g in self.revert_projs)
        return [self.with_summary(x, y) for x, y in zip(xs, summaries, strict=True)]


class PairwiseStage(ClassTokenStage):
    """CLS tokens as in class-token fusion, and the patches at the same place summed too.

    Equation 4; the patches of the other branch are interpolated to the branch's grid.
    """

    CLS_ALONE = False

    def fuse(self, xs: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        ys = [f(x) for f, x in zip(self.projs, xs, strict=True)]
        maps = [self.patches(y).mT.unflatten(2, g) for y, g in zip(ys, grids, strict=True)]
        outs = []
        for g, grid in zip(self.revert_projs, grids, strict=True):
            small, large = (resize(image, grid).flatten(2).mT for image in maps)
            y = small + large
            if self.prefix:
                y = torch.cat([ys[0][:, :1] + ys[1][:, :1], y], 1)
            outs.append(g(y))
        return outs


class AllAttentionStage(ClassTokenStage):
    """Self-attention among all tokens of both branches. Equation 2.

    Here the wider branch has its f and g too: so come the MACs of table 6.
    """

    CLS_ALONE = False
    ALIGN = staticmethod(projection)

    def __init__(self, architecture: Architecture, rates: Rates) -> None:
        super().__init__(architecture, rates)
        width = max(architecture.dims)
        self.norm1 = norm_layer(width)
        self.attn = SelfAttention(width, architecture.heads, rates.attn_drop, rates.drop)
        self.drop_path = DropPath(rates.drop_path[-1])

    def fuse(self, xs: list[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        y = torch.cat([f(x) for f, x in zip(self.projs, xs, strict=True)], 1)
        y = self.drop_path(self.attn(self.norm1(y)), y)
        parts = y.split([x.shape[1] for x in xs], 1)
        return [g(part) for g, part in zip(self.revert_projs, parts, strict=True)]


FUSIONS: dict[str, type[Stage]] = {  # table 6
    "none": Stage,
    "all_attention": AllAttentionStage,
    "class_token": ClassTokenStage,
    "pairwise": PairwiseStage,
    "cross_attention": CrossAttentionStage,
}
