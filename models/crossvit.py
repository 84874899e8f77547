"""CrossViT: Cross-Attention Multi-Scale Vision Transformer (arXiv 2103.14899).

Two branches, small (0) and large (1), each on the image in its own size and patches; see
`crossvit_blocks` for the stages and the fusions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops.clsattn import cls_cross_attention_map
from xattn_ops.models.checkpoints import resize_token_positions, token_side
from xattn_ops.models.crossvit_blocks import (
    BRANCHES,
    FUSIONS,
    Architecture,
    CrossAttentionBlock,
    CrossAttentionStage,
    Grid,
    Rates,
    Stage,
)
from xattn_ops.models.crossvit_tokenizers import TOKENIZERS
from xattn_ops.models.layers import Linear, check_image, image_size, init_weights, norm_layer
from xattn_ops.models.registry import register

# Patches of 12 pixels see the image enlarged by 15/14, patches of other sizes as it is. In whole
# patches these are 240 pixels for 224, 408 for 384 and 504 for 480 (table 4).
ENLARGE = {12: (15, 14)}
_TIMM = re.compile(r"^(pos_embed|cls_token)_(\d+)$")


class CrossViT(nn.Module):
    """CrossViT as a classifier, or its patches as feature maps.

    Args:
        dims: channels of each branch.
        heads: of the attentions of both branches.
        depths: N and M, blocks of each branch in a stage.
        mlp_ratio: width of the MLPs, in dims.
        num_classes, features_only, backend: see `create_model`. A classifier averages the logits of
            both branches; with num_classes 0 it gives their two embeddings in a row. With
            features_only there are two maps, the patches of the small and of the large branch
            after the last stage, through the branch's final norm; a fusion that would end in CLS
            tokens alone is then left out of the last stage.
        img_size (224): the size that the position embeddings are for. Images of any size are
            taken: each branch resizes the image bicubically to whole patches (a branch with
            patches of 12 enlarges it by 15/14), and the position embeddings to the patches' grid.
        stages: K, multi-scale encoders (table 7).
        fusion_depth: L, cross-attention blocks in a row (table 7).
        patches: rows and columns of a patch of each branch (table 7).
        tokenizer: "linear", "conv" for three convolutions (the models with a dagger) or "t2t"
            (section 4.3); the last two make patches of 12 and 16.
        fusion: "cross_attention", "none", "all_attention", "class_token" or "pairwise" (table 6).
        cls_token: False: none; the mean of the patches stands for it (section 4.3).
        drop_path: stochastic depth rate of the last block, from 0 linearly.
        drop: dropout after projections, in the MLPs and on the embeddings.
        attn_drop: dropout on the attention weights.
        checkpoint: whether training recomputes each block in backward instead of keeping its
            activations.
    """

    def __init__(
        self,
        dims: tuple[int, int],
        heads: int,
        depths: tuple[int, int],
        mlp_ratio: float,
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        img_size: int | tuple[int, int] | None = None,
        backend: str | None = None,
        stages: int = 3,
        fusion_depth: int = 1,
        patches: tuple[int, int] = (12, 16),
        tokenizer: str = "linear",
        fusion: str = "cross_attention",
        cls_token: bool = True,
        drop_path: float = 0.1,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check_options(stages, fusion_depth, depths, patches, tokenizer, fusion)
        self.dims, self.patches = dims, patches
        self.features_only, self.prefix = features_only, int(cls_token)
        self.drop = drop
        self.grids = self.grids_of(*image_size(img_size))

        self.patch_embed = nn.ModuleList(map(TOKENIZERS[tokenizer], dims, patches))
        places = [self.prefix + rows * columns for rows, columns in self.grids]
        self.pos_embed = _parameters([1, n, dim] for n, dim in zip(places, dims, strict=True))
        self.cls_token = _parameters([1, 1, dim] for dim in dims if cls_token)
        architecture = Architecture(
            dims, heads, depths, mlp_ratio, fusion_depth, cls_token, checkpoint, backend
        )
        last, depth = stages * max(depths) - 1, max(depths)
        paths = [drop_path * i / max(last, 1) for i in range(last + 1)]
        self.blocks = nn.ModuleList()
        for k in range(stages):
            kind = FUSIONS[fusion]
            if features_only and cls_token and k == stages - 1 and kind.CLS_ALONE:
                kind = Stage  # nobody would read what it fuses
            rates = Rates(drop, attn_drop, paths[k * depth : (k + 1) * depth])
            self.blocks.append(kind(architecture, rates))
        self.norm = nn.ModuleList(map(norm_layer, dims))
        if not features_only:
            self.head = nn.ModuleList(
                Linear(dim, num_classes) if num_classes else nn.Identity() for dim in dims
            )
        self.has_head = num_classes > 0
        self.apply(init_weights)
        for parameter in (*self.pos_embed, *self.cls_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image [B, 3, H, W] -> logits [B, num_classes], or both branches' maps [B, C, h, w]."""
        if self.features_only:
            return self.maps(image)
        xs, _ = self.tokens(image)
        small, large = (
            head(norm(x[:, 0]) if self.prefix else norm(x).mean(1))
            for head, norm, x in zip(self.head, self.norm, xs, strict=True)
        )
        return (small + large) / 2 if self.has_head else torch.cat([small, large], 1)

    def maps(self, image: Tensor) -> list[Tensor]:
        """image [B, 3, H, W] -> both branches' normalised patches at the end, [B, C, h, w]."""
        xs, grids = self.tokens(image)
        normed = [norm(x)[:, self.prefix :] for norm, x in zip(self.norm, xs, strict=True)]
        return [x.mT.unflatten(2, grid) for x, grid in zip(normed, grids, strict=True)]

    def tokens(self, image: Tensor) -> tuple[list[Tensor], list[Grid]]:
        """image [B, 3, H, W] -> each branch's tokens [B, P + h w, C] at the end, and (h, w)."""
        grids = self.grids_of(*check_image(image))
        xs = [self._embedded(image, b, grids[b]) for b in BRANCHES]
        for stage in self.blocks:
            xs = stage(xs, grids)
        return xs, grids

    def grids_of(self, height: int, width: int) -> list[Grid]:
        """Rows and columns of each branch's patches on an image of this size."""
        grids = []
        for patch in self.patches:
            up, down = ENLARGE.get(patch, (1, 1))
            rows, columns = (max(side * up // (down * patch), 1) for side in (height, width))
            grids.append((rows, columns))
        return grids

    def _embedded(self, image: Tensor, branch: int, grid: Grid) -> Tensor:
        """Tokens of one branch, with CLS and positions."""
        patch, prefix = self.patches[branch], self.prefix
        size = (grid[0] * patch, grid[1] * patch)
        if tuple(image.shape[2:]) != size:
            image = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
        x = self.patch_embed[branch](image).flatten(1, 2)
        if prefix:
            x = torch.cat([self.cls_token[branch].expand(x.shape[0], -1, -1), x], 1)
        positions = resize_token_positions(self.pos_embed[branch], prefix, self.grids[branch], grid)
        return F.dropout(x + positions, self.drop, self.training)

    def attentions(self, stage: int) -> list[CrossAttentionBlock]:
        """The last cross-attention block of a stage for the CLS token of each branch."""
        if not 1 <= stage <= len(self.blocks):
            raise ValueError(f"stage is {stage}; it must be 1 to {len(self.blocks)}")
        found = self.blocks[stage - 1]
        if not isinstance(found, CrossAttentionStage):
            raise ValueError(f"stage {stage} has no cross attention")
        return [f if isinstance(f, CrossAttentionBlock) else f[-1] for f in found.fusion]  # type: ignore[index]

    def adapt_official(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A state in this model's layout, and the prefixes of keys it need not fit.

        timm's has pos_embed_0 where the official has pos_embed.0, and cls_token likewise.
        """
        state = {_TIMM.sub(r"\1.\2", key): tensor for key, tensor in state.items()}
        for b in BRANCHES:
            key = f"pos_embed.{b}"
            side = token_side(state[key], self.prefix) if key in state else 0
            if side:
                resized = state[key].to(self.pos_embed[b])
                state[key] = resize_token_positions(
                    resized, self.prefix, (side, side), self.grids[b]
                )
        if not self.features_only:
            return state, ()
        last = f"blocks.{len(self.blocks) - 1}."
        unused = [] if hasattr(self.blocks[-1], "projs") else ["projs.", "fusion.", "revert_projs."]
        return state, ("head.", *(last + name for name in unused))


@torch.no_grad()
def cls_attention(model: CrossViT, image: Tensor, stage: int) -> list[Tensor]:
    """What the CLS token of each branch takes of the other branch's patches, in one stage.

    The weights of equation 6, without that of the CLS token itself; with several cross-attention
    blocks in a row, those of the last.

    Args:
        model: a CrossViT with cross attention, best in eval mode.
        image: [B, 3, H, W].
        stage: 1 to K.

    Returns:
        Of the small branch's CLS token [B, heads, h, w] over the patches of the large, and of the
        large branch's over those of the small. A map sums to 1 less the weight of CLS.

    Raises:
        ValueError: no such stage, or none with cross attention.
    """
    seen: list[tuple[Any, ...]] = []
    blocks = model.attentions(stage)
    handles = [
        block.attn.register_forward_pre_hook(lambda module, args: seen.append(args))
        for block in blocks
    ]
    try:
        _, grids = model.tokens(image)
    finally:
        for handle in handles:
            handle.remove()
    maps = []
    for block, (cls, patches, norm), grid in zip(blocks, seen, reversed(grids), strict=True):
        attn = block.attn
        weights = cls_cross_attention_map(
            cls,
            patches,
            attn.wq.weight,
            attn.wq.bias,
            attn.wk.weight,
            attn.wk.bias,
            num_heads=attn.num_heads,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            scale=attn.scale,
        )
        maps.append(weights[..., 1:].unflatten(-1, grid))
    return maps


def _parameters(shapes: Iterable[Sequence[int]]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.empty(*shape)) for shape in shapes)


def _check_options(
    stages: int,
    fusion_depth: int,
    depths: tuple[int, int],
    patches: tuple[int, int],
    tokenizer: str,
    fusion: str,
) -> None:
    counts = {"stages": stages, "fusion_depth": fusion_depth}
    for name, values in (("depths", depths), ("patches", patches)):
        if len(values) != len(BRANCHES):
            raise ValueError(f"{name} is {values}; it must have one number for each branch, 2")
        counts |= {f"{name}[{b}]": value for b, value in enumerate(values)}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")
    for name, kind, allowed in (
        ("tokenizer", tokenizer, [*TOKENIZERS]),
        ("fusion", fusion, [*FUSIONS]),
    ):
        if kind not in allowed:
            raise ValueError(f"{name} is '{kind}'; allowed are {', '.join(allowed)}")


def _register(name: str, size: int = 224, **architecture: Any) -> None:
    def build(*, img_size: int | tuple[int, int] | None, **options: Any) -> CrossViT:
        given = size if img_size is None else img_size
        return CrossViT(**architecture | options, img_size=given)

    register(f"crossvit_{name}", build)


# table 1
_TINY: dict[str, Any] = {"dims": (96, 192), "heads": 3, "depths": (1, 4), "mlp_ratio": 4}
_SMALL: dict[str, Any] = {"dims": (192, 384), "heads": 6, "depths": (1, 4), "mlp_ratio": 4}
_BASE: dict[str, Any] = {"dims": (384, 768), "heads": 12, "depths": (1, 4), "mlp_ratio": 4}
_9: dict[str, Any] = {"dims": (128, 256), "heads": 4, "depths": (1, 3), "mlp_ratio": 3}
_15: dict[str, Any] = {"dims": (192, 384), "heads": 6, "depths": (1, 5), "mlp_ratio": 3}
_18: dict[str, Any] = {"dims": (224, 448), "heads": 7, "depths": (1, 6), "mlp_ratio": 3}

_register("tiny", **_TINY)
_register("small", **_SMALL)
_register("base", **_BASE)
_register("9", **_9)
_register("15", **_15)
_register("18", **_18)
_register("9_dagger", **_9, tokenizer="conv")
_register("15_dagger", **_15, tokenizer="conv")
_register("18_dagger", **_18, tokenizer="conv")
_register("15_dagger_384", **_15, tokenizer="conv", size=384)
_register("18_dagger_384", **_18, tokenizer="conv", size=384)
