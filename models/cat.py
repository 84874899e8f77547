"""CAT: Cross Attention in Vision Transformer (arXiv 2106.05786), classifier and backbone.

Activations stay [B, H, W, C] from the patch embedding to the head.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from xattn_ops import CrossPatchAttention, InnerPatchAttention
from xattn_ops._linear import linear
from xattn_ops.models.checkpoints import resize_positions
from xattn_ops.models.layers import (
    DropPath,
    Linear,
    Mlp,
    PatchEmbed,
    add_mlp,
    check_image,
    image_size,
    init_weights,
    interleave,
    pad_to_multiple,
    run,
)
from xattn_ops.models.registry import register

PATCH = 7  # N of the paper: rows and columns of an IPSA window and of a CPSA patch
STRIDE = 4  # of the patch embedding


class SliceEmbed(nn.Module):
    """[B, 3, H, W], 4 divides H and W -> [B, H/4, W/4, C], as PatchEmbed (paper, table 5).

    Two rounds of the 2x2 interleave and a 1x1 convolution stand for the 4x4 convolution.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3 * STRIDE * STRIDE, dim, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        pixels = interleave(interleave(image.permute(0, 2, 3, 1)))
        return self.norm(linear(pixels, self.proj.weight.flatten(1), self.proj.bias))


def _patch_embed(dim: int, kind: str) -> nn.Module:
    if kind not in ("conv", "slice"):
        raise ValueError(f"patch_embed is '{kind}'; allowed are 'conv' and 'slice'")
    return PatchEmbed(3, dim, STRIDE) if kind == "conv" else SliceEmbed(dim)


class Block(nn.Module):
    """x += DropPath(attn(norm1 x)); x += DropPath(mlp(norm2 x)). Equations 7 to 12."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path(self.attn(self.norm1(x)), x)
        return add_mlp(self.mlp, self.norm2(x), x, self.drop_path)


class Downsample(nn.Module):
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]; odd maps are padded with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(interleave(pad_to_multiple(x, 2))))


class Stage(nn.Module):
    """CABs (IPSA, CPSA, IPSA, each with its MLP) in a row; `downsample` follows, if there is one.

    Args:
        patch: N of the stage.
        drop_path: one rate for each CAB.
        shift: of the windows of the second IPSA.
        last: whether no downsampling follows.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        patch: int,
        drop_path: list[float],
        *,
        cpsa_heads: int | str,
        shift: int,
        attn_drop: float,
        mlp_ratio: float,
        checkpoint: bool,
        last: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        window = (patch, patch)

        def ipsa(shift: int) -> nn.Module:
            return InnerPatchAttention(
                dim, heads, window, (shift, shift), attn_drop=attn_drop, backend=backend
            )

        def cpsa() -> nn.Module:
            count = patch if cpsa_heads == "patch" else int(cpsa_heads)
            return CrossPatchAttention(window, count, attn_drop=attn_drop, backend=backend)

        block = functools.partial(Block, dim, mlp_ratio=mlp_ratio)
        self.pre_ipsa_blocks = nn.ModuleList(block(ipsa(0), drop_path=r) for r in drop_path)
        self.cpsa_blocks = nn.ModuleList(block(cpsa(), drop_path=r) for r in drop_path)
        self.post_ipsa_blocks = nn.ModuleList(block(ipsa(shift), drop_path=r) for r in drop_path)
        self.downsample = None if last else Downsample(dim)

    def forward(self, x: Tensor) -> Tensor:
        blocks = zip(self.pre_ipsa_blocks, self.cpsa_blocks, self.post_ipsa_blocks, strict=True)
        for cab in blocks:
            x = run(_in_a_row, cab, x, recompute=self.checkpoint and self.training)
        return x


def _in_a_row(blocks: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class CAT(nn.Module):
    """CAT as a classifier, or as a backbone for dense prediction.

    Args:
        dim: channels of the first stage; they double with each stage.
        depths: CABs of each stage.
        heads: IPSA heads of each stage.
        num_classes, features_only, img_size (224), backend: see `create_model`. A classifier runs
            on img_size alone, unless ape is False; its patch is the stage's smaller side where
            that is 7 or less. A backbone takes any size.
        drop_path: stochastic depth rate of the last CAB, from 0 linearly.
        attn_drop: dropout on the attention weights; the paper trains with 0.2.
        patch_embed: "conv" or "slice" (table 5).
        cpsa_heads: heads of CPSA; "patch" for as many as the patch has rows (table 5).
        shift: whether the second IPSA of a CAB has its windows shifted by half (table 5).
        ape: whether there is an absolute position embedding (table 6).
        checkpoint: whether training recomputes each CAB in backward instead of keeping its
            activations.
    """

    def __init__(
        self,
        dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        img_size: int | tuple[int, int] | None = None,
        backend: str | None = None,
        drop_path: float = 0.1,
        attn_drop: float = 0.0,
        mlp_ratio: float = 4.0,
        patch_embed: str = "conv",
        cpsa_heads: int | str = 1,
        shift: bool = False,
        ape: bool = True,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(cpsa_heads, str) and cpsa_heads != "patch":
            raise ValueError(f"cpsa_heads is '{cpsa_heads}'; allowed are a number and 'patch'")
        self.features_only = features_only
        self.img_size = image_size(img_size)
        self.grid = tuple(math.ceil(size / STRIDE) for size in self.img_size)
        self.patch_embed = _patch_embed(dim, patch_embed)
        self.ape: nn.Parameter | None = None
        if ape:
            height, width = self.grid
            shape = (1, dim, height, width) if features_only else (1, height * width, dim)
            self.ape = nn.Parameter(torch.zeros(shape))
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.layers = nn.ModuleList()
        for i in range(len(depths)):
            side = min(math.ceil(size / 2**i) for size in self.grid)
            patch = PATCH if features_only else min(PATCH, side)
            one_window = not features_only and side <= PATCH  # a shift would only cut it apart
            stage = Stage(
                dim * 2**i,
                heads[i],
                patch,
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                cpsa_heads=cpsa_heads,
                shift=patch // 2 if shift and not one_window else 0,
                attn_drop=attn_drop,
                mlp_ratio=mlp_ratio,
                checkpoint=checkpoint,
                last=i == len(depths) - 1,
                backend=backend,
            )
            self.layers.append(stage)
        if features_only:
            for i in range(len(depths)):
                self.add_module(f"norm{i}", nn.LayerNorm(dim * 2**i))
        else:
            width = dim * 2 ** (len(depths) - 1)
            self.norm = nn.LayerNorm(width)
            self.head = Linear(width, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)
        if self.ape is not None:
            nn.init.trunc_normal_(self.ape, std=0.02)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image [B, 3, H, W] -> logits [B, num_classes], or the four maps [B, C_i, H_i, W_i]."""
        maps = self.stages(image)
        if not self.features_only:
            return self.head(self.norm(maps[-1]).mean((1, 2)))
        norms = (getattr(self, f"norm{i}") for i in range(len(maps)))
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(norms, maps, strict=True)]

    def stages(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W] -> the stages' maps before any head or norm, [B, H_i, W_i, C_i]."""
        x = self.patch_embed(self._padded(image))
        if self.ape is not None:
            x = x + self._positions(x.shape[1], x.shape[2])
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
            if isinstance(layer.downsample, Downsample):
                x = layer.downsample(x)
        return maps

    def _padded(self, image: Tensor) -> Tensor:
        size = check_image(image)
        if not self.features_only and self.ape is not None and size != self.img_size:
            raise ValueError(
                f"image is {size[0]} x {size[1]}; this classifier takes {self.img_size[0]} x "
                f"{self.img_size[1]} (see create_model's img_size and features_only)"
            )
        bottom, right = -size[0] % STRIDE, -size[1] % STRIDE
        if bottom or right:
            image = nn.functional.pad(image, (0, right, 0, bottom))
        return image

    def _positions(self, height: int, width: int) -> Tensor:
        """The position embedding of a map, [1, H, W, C]."""
        assert self.ape is not None
        if not self.features_only:
            return self.ape.unflatten(1, (height, width))
        return resize_positions(self.ape, (height, width)).permute(0, 2, 3, 1)

    def adapt_official(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """An official state in this model's layout, and the prefixes of keys it need not fit."""
        state = dict(state)
        for key in [k for k in state if k.endswith(".relative_position_index")]:
            _check_index(key, state.pop(key), state)
        grid = _ape_grid(state["ape"]) if self.ape is not None and "ape" in state else None
        if grid is not None:
            grid = resize_positions(grid.to(self.ape), self.grid)
            state["ape"] = grid if self.features_only else grid.flatten(2).transpose(1, 2)
        from_classifier = self.features_only and "norm.weight" in state
        return state, ("norm", "head.") if from_classifier else ()


def _ape_grid(official: Tensor) -> Tensor | None:
    """A position embedding [1, L, C] or [1, C, h, w] as a grid [1, C, h, w]; None if it is neither.

    The loader reports the shape of one that is neither.
    """
    if official.dim() == 4:
        return official
    side = math.isqrt(official.shape[1]) if official.dim() == 3 else 0
    if side == 0 or side * side != official.shape[1]:
        return None
    return official.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _check_index(key: str, index: Tensor, state: dict[str, Tensor]) -> None:
    """The official buffer must hold the rule (dy + N - 1) * (2N - 1) + (dx + N - 1)."""
    n = math.isqrt(index.shape[0])
    y, x = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    dy, dx = y[:, None] - y[None], x[:, None] - x[None]  # query minus key
    expected = (dy + n - 1) * (2 * n - 1) + dx + n - 1
    if index.shape != expected.shape or not torch.equal(index.cpu().long(), expected):
        raise ValueError(f"the checkpoint's {key} does not hold CAT's relative positions")


def _register(name: str, dim: int, depths: tuple[int, ...], drop_path: float) -> None:
    heads = tuple(dim * 2**i // 32 for i in range(len(depths)))

    def build(**options: Any) -> CAT:
        return CAT(dim, depths, heads, **{"drop_path": drop_path, **options})

    register(name, build)


_register("cat_tiny", 64, (1, 1, 3, 1), 0.1)
_register("cat_small", 96, (1, 1, 3, 1), 0.2)
_register("cat_base", 96, (1, 1, 6, 1), 0.3)
