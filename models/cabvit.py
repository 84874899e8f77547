"""CabViT: Cross Attention among Blocks for Vision Transformer (Zhang, Hu and Wang, 2022).

Hybrid models (CabViT-H) and the plain one (CabViT-P); see `cabvit_blocks` for their blocks,
`cabvit_convs` for what is between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops import _checks
from xattn_ops._linear import linear
from xattn_ops.digest import digest_attention_map
from xattn_ops.models.cabvit_blocks import (
    CaBlock,
    ConvNeXtBlock,
    Grid,
    WindowBlock,
    digest_grid,
    run_blocks,
)
from xattn_ops.models.cabvit_convs import EMBEDS, PatchProjection
from xattn_ops.models.checkpoints import resize_token_positions, token_side
from xattn_ops.models.layers import Linear, check_image, image_size, init_weights, run
from xattn_ops.models.registry import register

ATTENTION = ("global", "window", "none")


class Stage(nn.Module):
    """Blocks on one map; `downsample` follows, if there is one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        """[B, H, W, C] -> the same, before downsampling."""
        if isinstance(self.blocks[0], CaBlock):
            grid = (x.shape[1], x.shape[2])
            x = run_blocks(self.blocks, x.flatten(1, 2), grid, recompute=recompute)
            return x.unflatten(1, grid)
        for block in self.blocks:
            x = run(block, x, recompute=recompute)
        return x


class CabViT(nn.Module):
    """A hybrid CabViT as a classifier or a backbone: two ConvNeXt stages, two of CabViT blocks.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        num_classes, features_only, backend: see `create_model`. A backbone gives the stages' maps,
            un-normalised.
        img_size (224): the size that the bias tables and those of the digests are for. Images of
            any size are taken; the tables are resized where it is another.
        attention: "global", or with digests and tme off "window" for Swin's, "none" for ConvNeXt
            blocks in all stages (table 4, rows 2 and 1).
        digests: whether blocks attend to the digests of earlier ones (table 4, row 4).
        digest_scale: whether digests are scaled by learned factors (table 4, row 5).
        tme: whether there is the token merge and enhancement (table 4, row 6). Without it digests
            are the means of 4 x 4 tokens: the paper does not say what they are in rows 4 and 5,
            whose parameters leave none for a merge, and whose MACs are those of as many digests.
        embed: "conv" as in the official models, or "patch" for the stem and the downsampling of
            ConvNeXt (table 4, rows 0 to 5).
        head_dim: channels of a head.
        mlp_ratio: width of the MLPs of the last two stages, in dims.
        drop_path: stochastic depth rate of the last block, from 0 linearly.
        attn_drop: dropout on the attention weights.
        layer_scale: what the factors on the residual branches begin with.
        checkpoint: whether training recomputes each block in backward instead of keeping its
            activations.
    """

    def __init__(
        self,
        dims: tuple[int, int, int, int],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        img_size: int | tuple[int, int] | None = None,
        backend: str | None = None,
        attention: str = "global",
        digests: bool = True,
        digest_scale: bool = True,
        tme: bool = True,
        embed: str = "conv",
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        attn_drop: float = 0.0,
        layer_scale: float = 1e-6,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check_options(attention, digests, tme, embed, dims, head_dim)
        self.features_only = features_only
        self.checkpoint = checkpoint
        height, width = image_size(img_size)
        stem, downsample = EMBEDS[embed]
        self.patch_embed = stem(dims[0])
        common: dict[str, Any] = {"layer_scale": layer_scale, "backend": backend}
        attending = {"head_dim": head_dim, "mlp_ratio": mlp_ratio, "attn_drop": attn_drop}
        exchange = {"digests": digests, "digest_scale": digest_scale, "tme": tme}
        rates = _rates(drop_path, sum(depths))
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks: list[nn.Module]
            grid = (-(-height // (4 * 2**i)), -(-width // (4 * 2**i)))
            if i < 2 or attention == "none":
                blocks = [ConvNeXtBlock(dim, next(rates), **common) for _ in range(depth)]
            elif attention == "window":
                options = common | attending
                blocks = [WindowBlock(dim, grid, k, next(rates), **options) for k in range(depth)]
            else:
                options, last = common | attending | exchange, depth - 1
                blocks = [
                    CaBlock(dim, grid, k, k < last, next(rates), **options) for k in range(depth)
                ]
            after = downsample(dim, dims[i + 1]) if i < len(dims) - 1 else None
            self.add_module(f"layer_{i}", Stage(blocks, after))
        if not features_only:
            self.norm_head = nn.LayerNorm(dims[-1])
            self.head = Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    @property
    def stages(self) -> list[Stage]:
        return [getattr(self, f"layer_{i}") for i in range(4)]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image [B, 3, H, W] -> logits [B, num_classes], or the four maps [B, C_i, H_i, W_i]."""
        maps = self.maps(image)
        if self.features_only:
            return [x.permute(0, 3, 1, 2) for x in maps]
        return self.head(self.norm_head(maps[-1].mean((1, 2))))

    def maps(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W] -> the stages' maps [B, H_i, W_i, C_i]."""
        check_image(image)
        recompute = self.checkpoint and self.training
        x, maps = self.patch_embed(image.permute(0, 2, 3, 1)), []
        for stage in self.stages:
            x = stage(x, recompute)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    @property
    def cab_stages(self) -> dict[int, list[CaBlock]]:
        """The CabViT blocks of each stage that has any, by its number."""
        return {stage: blocks for stage in (3, 4) if (blocks := self.cab_blocks(stage))}

    def cab_blocks(self, stage: int) -> list[CaBlock]:
        """The CabViT blocks of a stage, of which 1 and 2 have none."""
        if not 1 <= stage <= 4:
            raise ValueError(f"stage is {stage}; it must be 1, 2, 3 or 4")
        return [b for b in self.stages[stage - 1].blocks if isinstance(b, CaBlock)]

    def adapt_official(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """An official state in this model's layout, and the prefixes of keys it need not fit."""
        return _adapted(self, state), ("norm_head.", "head.") if self.features_only else ()


class PlainCabViT(nn.Module):
    """The plain CabViT (Fig. 4a), one stage of CabViT blocks on DeiT's patches and CLS token.

    CLS has no relative bias, and the convolutions leave it out.

    Args:
        dim, depth, heads: of the blocks.
        patch: rows and columns of a patch.
        num_classes, features_only, backend: see `create_model`. A backbone gives one map, the
            patches after the final norm.
        img_size (224): the size that the tables and the position embedding are for. Images of any
            size are taken, of which whole patches count (at least one: smaller images are padded
            with zeros); the tables are resized where it is another.
        pos_embed: whether DeiT's position embedding stays. The paper does not say; its 5.9 M
            parameters are those with it (5.87 M, and 5.83 M without).
        digests, digest_scale, tme, mlp_ratio, drop_path, attn_drop, layer_scale, checkpoint: of
            `CabViT`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        patch: int = 16,
        num_classes: int = 1000,
        features_only: bool = False,
        img_size: int | tuple[int, int] | None = None,
        backend: str | None = None,
        pos_embed: bool = True,
        digests: bool = True,
        digest_scale: bool = True,
        tme: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        attn_drop: float = 0.0,
        layer_scale: float = 1e-6,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.features_only = features_only
        self.checkpoint = checkpoint
        self.patch = patch
        height, width = image_size(img_size)
        self.grid: Grid = (max(height // patch, 1), max(width // patch, 1))
        self.patch_embed = PatchProjection(dim, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed: nn.Parameter | None = None
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim))
        rates = _rates(drop_path, depth)
        self.blocks = nn.ModuleList(
            CaBlock(
                dim,
                self.grid,
                index,
                index < depth - 1,
                next(rates),
                head_dim=_checks.divides("heads", heads, "dim", dim),
                num_prefix_tokens=1,
                digests=digests,
                digest_scale=digest_scale,
                tme=tme,
                mlp_ratio=mlp_ratio,
                attn_drop=attn_drop,
                layer_scale=layer_scale,
                backend=backend,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        if not features_only:
            self.head = Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image [B, 3, H, W] -> logits [B, num_classes], or the patches' map [B, dim, h, w]."""
        x, grid = self.tokens(image)
        if self.features_only:
            return [self.norm(x[:, 1:]).mT.unflatten(2, grid)]
        return self.head(self.norm(x[:, 0]))

    def tokens(self, image: Tensor) -> tuple[Tensor, Grid]:
        """image [B, 3, H, W] -> the tokens [B, 1 + h w, dim] at the end, and (h, w)."""
        height, width = check_image(image)
        pad = (0, max(self.patch - width, 0), 0, max(self.patch - height, 0))
        image = F.pad(image, pad) if any(pad) else image
        patches = self.patch_embed(image)
        grid = (patches.shape[1], patches.shape[2])
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), patches.flatten(1, 2)], 1)
        if self.pos_embed is not None:
            x = x + resize_token_positions(self.pos_embed, 1, self.grid, grid)
        return run_blocks(self.blocks, x, grid, recompute=self.checkpoint and self.training), grid

    @property
    def cab_stages(self) -> dict[int, list[CaBlock]]:
        """All blocks, as those of stage 1."""
        return {1: self.cab_blocks(1)}

    def cab_blocks(self, stage: int) -> list[CaBlock]:
        """All blocks, as those of stage 1."""
        if stage != 1:
            raise ValueError(f"stage is {stage}; a plain CabViT has one, 1")
        return list(self.blocks)  # type: ignore[arg-type]

    def adapt_official(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A state of a square image's model in this model's layout, and prefixes as above."""
        state = _adapted(self, state)
        if self.pos_embed is not None and "pos_embed" in state:
            positions = state["pos_embed"]
            side = token_side(positions, 1)
            if side:
                state["pos_embed"] = resize_token_positions(
                    positions.to(self.pos_embed), 1, (side, side), self.grid
                )
        return state, ("head.",) if self.features_only else ()


class AttentionMaps(NamedTuple):
    """What the image's tokens of one block take of every token and of earlier blocks' digests.

    A query's weights over prefix tokens, tokens and digests sum to 1.
    """

    tokens: Tensor  # [B, heads, gh, gw, gh, gw]: of each query (first two), over the tokens
    digests: Tensor  # [B, heads, gh, gw, blocks, mh, mw]: over the digests of each earlier block


@torch.no_grad()
def attention_maps(
    model: CabViT | PlainCabViT, image: Tensor, stage: int, block: int = -1
) -> AttentionMaps:
    """The attention of one block over tokens and digests (paper, Fig. 6).

    Args:
        model: best in eval mode.
        image: [B, 3, H, W].
        stage: 3 or 4; 1 of a plain model.
        block: which of the stage's blocks; from the end where negative.

    Raises:
        ValueError: no such stage or block, or one without global attention.
    """
    blocks = model.cab_blocks(stage)
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block is {block}; stage {stage} has {len(blocks)} CabViT blocks")
    chosen, seen = blocks[block], []
    handle = chosen.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        model(image)
    finally:
        handle.remove()
    x, grid, digests = seen[0]
    tables = chosen.tables_on(grid)
    x, prefix = chosen.norm1(x), chosen.num_prefix_tokens
    weights = digest_attention_map(
        linear(x, chosen.qkv.weight, chosen.qkv.bias),
        chosen.digest_kv(x, digests, tables),
        tables.bias,
        tables.digest_bias,
        num_heads=chosen.num_heads,
        grid=grid,
        num_prefix_tokens=prefix,
        scale=chosen.scale,
    )
    weights = weights[:, :, prefix:].unflatten(2, grid)
    count = x.shape[1]
    return AttentionMaps(
        weights[..., prefix:count].unflatten(-1, grid),
        weights[..., count:].unflatten(-1, (-1, *digest_grid(grid))),
    )


def _rates(last: float, count: int) -> Iterator[float]:
    """Stochastic depth rates from 0 to `last`."""
    return (last * i / max(count - 1, 1) for i in range(count))


def _adapted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the state with the tables of every block for its grid."""
    state = dict(state)
    for name, block in model.named_modules():
        if isinstance(block, CaBlock):
            block.adapt_official(state, name + ".")
    return state


def _check_options(
    attention: str, digests: bool, tme: bool, embed: str, dims: Sequence[int], head_dim: int
) -> None:
    for name, kind, allowed in (
        ("attention", attention, ATTENTION),
        ("embed", embed, [*EMBEDS]),
    ):
        if kind not in allowed:
            raise ValueError(f"{name} is '{kind}'; allowed are {', '.join(allowed)}")
    if attention != "global" and (digests or tme):
        raise ValueError(f"attention is '{attention}'; digests and tme go with 'global' alone")
    for dim in dims[2:] if attention != "none" else ():
        _checks.divides("head_dim", head_dim, "the channels of stages 3 and 4", dim)


def _register(name: str, model: type[nn.Module], **architecture: Any) -> None:
    register(f"cabvit_{name}", lambda **options: model(**architecture | options))


# section 3.2 and, for L3, the official code
_register("h_l1", CabViT, dims=(64, 128, 192, 320), depths=(2, 2, 6, 2))
_register("h_l2", CabViT, dims=(96, 192, 320, 480), depths=(2, 2, 7, 2))
_register("h_l3", CabViT, dims=(96, 192, 320, 512), depths=(3, 6, 12, 3))
_register("p_l0", PlainCabViT, dim=192, depth=12, heads=3)
