"""Blocks of CabViT (paper, 3.1 and 3.2). Activations are maps [B, H, W, C] or tokens [B, P + N, C]:
prefix tokens such as CLS, then the image row by row.

On large maps a layer scale is folded into the linear layer before it, whose weights are smaller
than its activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops import DigestAttention, InnerPatchAttention, TokenMergeEnhance, token_merge_enhance
from xattn_ops._linear import linear, mlp
from xattn_ops.digest.module import Tables
from xattn_ops.models.checkpoints import resize_positions, square_side
from xattn_ops.models.layers import DropPath, Mlp, norm_layer, run

STRIDE = 4  # of the digests: s of the paper
WINDOW = 7  # of window attention
LARGE = 4  # times as many tokens as hidden channels: from there on layer scales are folded

Grid = tuple[int, int]


def digest_grid(grid: Grid) -> Grid:
    """Rows and columns of the digests of one block."""
    return -(-grid[0] // STRIDE), -(-grid[1] // STRIDE)


# ---- Blocks -------------------------------------------------------------------------------------


def add_scaled_mlp(
    x: Tensor, shortcut: Tensor, fc1: nn.Linear, fc2: nn.Linear, gamma: Tensor, drop_path: DropPath
) -> Tensor:
    """shortcut + DropPath(gamma * fc2(gelu(fc1 x)))."""
    if x.numel() // x.shape[-1] <= LARGE * fc2.in_features:
        y = mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return add_scaled(y, shortcut, gamma, drop_path)
    layers = fc1.weight, fc1.bias, gamma[:, None] * fc2.weight, gamma * fc2.bias
    if drop_path.active:
        return drop_path(mlp(x, *layers), shortcut)
    return mlp(x, *layers, shortcut)


def _factors(dim: int, value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((dim,), float(value)))


def add_scaled(y: Tensor, shortcut: Tensor, gamma: Tensor, drop_path: DropPath) -> Tensor:
    """shortcut + DropPath(gamma * y)."""
    if drop_path.active:
        return drop_path(gamma * y, shortcut)
    return torch.addcmul(shortcut, y, gamma)


class ConvNeXtBlock(nn.Module):
    """x += DropPath(gamma * pwconv2(gelu(pwconv1(norm(dwconv x))))), maps to maps."""

    def __init__(self, dim: int, drop_path: float, layer_scale: float, backend: str | None):
        super().__init__()
        self.gamma = _factors(dim, layer_scale)
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = norm_layer(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.pwconv1, self.pwconv2, self.gamma, self.drop_path)
        return add_scaled_mlp(self.norm(self.convolved(x)), x, *layers)

    def convolved(self, x: Tensor) -> Tensor:
        """The depthwise convolution of a map: an enhancement without a merge."""
        grid, conv = (x.shape[1], x.shape[2]), self.dwconv
        tokens = x.flatten(1, 2)
        options: dict[str, Any] = {"grid": grid, "backend": self.backend}
        y = token_merge_enhance(tokens, None, conv.weight, conv.bias, **options)[1]
        return y.unflatten(1, grid)


class NormedMlp(Mlp):
    """An MLP that the official code starts with a LayerNorm of its own."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.norm = nn.LayerNorm(dim)


class WindowBlock(nn.Module):
    """x += DropPath(gamma_1 * attn(norm1 x)); x += DropPath(gamma_2 * mlp(norm2 x)), on maps.

    Attention within windows, as in Swin: row 2 of table 4.
    """

    def __init__(
        self,
        dim: int,
        grid: Grid,
        index: int,
        drop_path: float,
        *,
        head_dim: int,
        mlp_ratio: float,
        attn_drop: float,
        layer_scale: float,
        backend: str | None,
    ) -> None:
        super().__init__()
        one_window = max(grid) <= WINDOW  # a shift would only cut it apart
        shift = 0 if one_window or index % 2 == 0 else WINDOW // 2
        self.gamma_1 = _factors(dim, layer_scale)
        self.gamma_2 = _factors(dim, layer_scale)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = InnerPatchAttention(
            dim,
            dim // head_dim,
            (WINDOW, WINDOW),
            (shift, shift),
            attn_drop=attn_drop,
            backend=backend,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = NormedMlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        x = add_scaled(self.attn(self.norm1(x)), x, self.gamma_1, self.drop_path)
        layers = (self.mlp.fc1, self.mlp.fc2, self.gamma_2, self.drop_path)
        return add_scaled_mlp(self.mlp.norm(self.norm2(x)), x, *layers)


class CaBlock(DigestAttention):
    """The CabViT block (Fig. 2): attention with digests, token merge and enhancement, MLP.

    x += DropPath(gamma_1 * proj(attention(norm1 x, digests))); digest = dw_conv x;
    x = BN(local_conv x) on the image; x += DropPath(gamma_2 * mlp(norm2 x)).

    The parameters of the attention are the block's own, as in the official code. On another grid
    than its own the tables are resized at each call.

    Args:
        grid: rows and columns of the tokens.
        index: place in the stage, from 0: how many blocks' digests it takes.
        makes_digest: whether a later block takes its digest.
        digests: whether blocks exchange digests at all.
        digest_scale: whether they are scaled by learned factors.
        tme: whether there is the token merge and enhancement; without it, digests are the means of
            4 x 4 tokens.
    """

    def __init__(
        self,
        dim: int,
        grid: Grid,
        index: int,
        makes_digest: bool,
        drop_path: float,
        *,
        head_dim: int,
        num_prefix_tokens: int = 0,
        digests: bool = True,
        digest_scale: bool = True,
        tme: bool = True,
        mlp_ratio: float,
        attn_drop: float,
        layer_scale: float,
        backend: str | None,
    ) -> None:
        rows, columns = digest_grid(grid)
        super().__init__(
            dim,
            dim // head_dim,
            grid,
            index * rows * columns if digests else 0,
            num_prefix_tokens=num_prefix_tokens,
            digest_scale=digest_scale,
            attn_drop=attn_drop,
            backend=backend,
        )
        self.makes_digest = digests and makes_digest
        self.gamma_1 = _factors(dim, layer_scale)
        self.gamma_2 = _factors(dim, layer_scale)
        self.norm1 = nn.LayerNorm(dim)
        self.stride, self.tme = STRIDE, tme
        if tme:
            # Its layers stand in the block itself, as in the official code.
            layers = TokenMergeEnhance(dim, merge=self.makes_digest, stride=STRIDE)
            self.dw_conv, self.local_conv = layers.dw_conv, layers.local_conv
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = NormedMlp(dim, int(mlp_ratio * dim))

    def forward(  # type: ignore[override]
        self, x: Tensor, grid: Grid, digests: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, P + gh * gw, C], and the digests [B, M, C] of the blocks before.

        Returns:
            The tokens after the block, and its digest [B, m, C] where a later block takes it.
        """
        y = self.attend(self.norm1(x), digests, self.tables_on(grid))
        y = linear(y, self.proj.weight, self.proj.bias)
        x = add_scaled(y, x, self.gamma_1, self.drop_path)
        digest, x = self.merge_enhance(x, grid)
        layers = (self.mlp.fc1, self.mlp.fc2, self.gamma_2, self.drop_path)
        return add_scaled_mlp(self.mlp.norm(self.norm2(x)), x, *layers), digest

    def merge_enhance(self, x: Tensor, grid: Grid) -> tuple[Tensor | None, Tensor]:
        """The digest, and the enhanced tokens: TME, Fig. 3."""
        if self.tme:
            return TokenMergeEnhance.forward(self, x, grid)  # type: ignore[arg-type]
        image = x[:, self.num_prefix_tokens :]
        return (averages(image, grid) if self.makes_digest else None), x

    def tables_on(self, grid: Grid) -> Tables:
        """The tables for a grid, resized where it is not the block's own."""
        own = self.tables()
        if grid == self.grid:
            return own
        bias = resize_offsets(own.bias, self.grid, grid)
        sizes = digest_grid(self.grid), digest_grid(grid)
        if own.digest_bias is None:
            return Tables(grid, bias, None, None)
        scale = own.digest_scale
        if scale is not None:
            scale = resize_digests(scale[..., 0], *sizes)[..., None]
        return Tables(grid, bias, resize_digests(own.digest_bias, *sizes), scale)

    def adapt_official(self, state: dict[str, Tensor], prefix: str) -> None:
        """Resize the tables of another square grid in an official state to the block's grid."""
        key = prefix + "attention_biases"
        bias = state.get(key)
        side = 0 if bias is None or bias.dim() != 2 else square_side(bias.shape[1])
        if bias is None or side == 0 or (side, side) == self.grid:
            return  # the loader reports the shape of a table that fits no grid
        state[key] = resize_offsets(bias.to(self.attention_biases), (side, side), self.grid)
        before, after = digest_grid((side, side)), digest_grid(self.grid)
        for name, axis in (("s_token_bias", -1), ("s_scale_factors", -2)):
            table = state.get(prefix + name)
            if table is not None and table.dim() > 2 and table.shape[axis] % math.prod(before) == 0:
                moved = table.to(self.attention_biases).movedim(axis, -1)
                state[prefix + name] = resize_digests(moved, before, after).movedim(-1, axis)


def averages(x: Tensor, grid: Grid) -> Tensor:
    """[B, gh * gw, C] -> [B, m, C]: means of the cells of 4 x 4 tokens, cut at the edges."""
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    means = F.avg_pool2d(image, STRIDE, STRIDE, ceil_mode=True)
    return means.permute(0, 2, 3, 1).flatten(1, 2)


def run_blocks(blocks: Iterable[Any], x: Tensor, grid: Grid, *, recompute: bool) -> Tensor:
    """Tokens through the blocks of a stage; each sees the digests of all before it."""
    digests: Tensor | None = None
    for block in blocks:
        x, digest = run(block, x, grid, digests, recompute=recompute)
        if digest is not None:
            digests = digest if digests is None else torch.cat([digests, digest], 1)
    return x


# ---- Tables of other grids ----------------------------------------------------------------------


def resize_offsets(table: Tensor, grid: Grid, size: Grid) -> Tensor:
    """A bias table [heads, gh * gw] by |dy| and |dx| for another grid, bicubic.

    It is mirrored to all offsets from -gh + 1 to gh - 1 first, so that offset 0 stays where it is.
    """
    if grid == size:
        return table
    full = table.unflatten(1, grid)[None]
    for axis in (2, 3):
        full = torch.cat([full.flip(axis).narrow(axis, 0, full.shape[axis] - 1), full], axis)
    full = resize_positions(full, (2 * size[0] - 1, 2 * size[1] - 1))
    return full[0, :, size[0] - 1 :, size[1] - 1 :].flatten(1)


def resize_digests(table: Tensor, grid: Grid, size: Grid) -> Tensor:
    """A table [..., blocks * m] for another grid of digests in each block, bicubic."""
    if grid == size:
        return table
    maps = table.reshape(1, -1, *grid)
    return resize_positions(maps, size).reshape(*table.shape[:-1], -1)
