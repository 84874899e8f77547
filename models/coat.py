"""CoaT: Co-Scale Conv-Attentional Image Transformers (arXiv 2104.06399), classifier and backbone.

Scales are numbered 1 to 4, as in the paper and in the keys of the official state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops import ConvPositionEncoding, ConvRelativeAttention
from xattn_ops._linear import linear
from xattn_ops.convrel import ConvRelativePosition, conv_relative_attention_map
from xattn_ops.models.coat_blocks import (
    PARALLEL,
    Grid,
    ParallelBlock,
    Rates,
    SerialBlock,
    as_map,
    relative_term,
)
from xattn_ops.models.layers import (
    Linear,
    PatchEmbed,
    check_image,
    image_size,
    init_weights,
    norm_layer,
    run,
)
from xattn_ops.models.registry import register

SCALES = (1, 2, 3, 4)
HEADS = 8
PATCHES = (4, 2, 2, 2)  # of the patch embeddings
SMALLEST = 32  # sides from which on no scale is empty: the product of PATCHES
CO_SCALE = ("interpolation", "direct", "none")


class CoaT(nn.Module):
    """CoaT, or CoaT-Lite without a parallel group, as a classifier or a backbone.

    Args:
        dims: channels of each scale; those of scales 2 to 4 are equal where there is a parallel
            group.
        depths: serial blocks of each scale.
        mlp_ratios: width of the MLPs of each scale, in dims.
        parallel_depth: blocks of the parallel group; 0 for CoaT-Lite.
        num_classes, features_only, backend: see `create_model`. A backbone gives scale 1 from its
            serial blocks, scales 2 to 4 from the parallel group, un-normalised; CoaT-Lite all from
            its serial blocks.
        img_size: of no effect, for a CoaT takes images of any size: its patch embeddings leave out
            what is beyond a whole patch to the right and at the bottom, as the official code does,
            and sides below 32 are padded with zeros to 32.
        conv_position: whether there is the conv position encoding (tables 5 and 6).
        conv_relative: whether there is the conv relative position encoding (tables 5 and 6).
        co_scale: how the parallel group mixes its scales: "interpolation", "direct" for direct
            cross-layer attention, "none" (table 7).
        drop_path: stochastic depth rate of all blocks; the paper trains without.
        drop: dropout on the output of the attention and in the MLPs; the paper trains without.
        checkpoint: whether training recomputes each block in backward instead of keeping its
            activations.

    As in the official state, a classifier has a norm for each scale but uses those that its head
    reads alone; the others take no gradient.
    """

    def __init__(
        self,
        dims: tuple[int, int, int, int],
        depths: tuple[int, int, int, int],
        mlp_ratios: tuple[int, int, int, int],
        parallel_depth: int = 0,
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        img_size: int | tuple[int, int] | None = None,
        backend: str | None = None,
        conv_position: bool = True,
        conv_relative: bool = True,
        co_scale: str = "interpolation",
        drop_path: float = 0.0,
        drop: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check_co_scale(co_scale, dims, parallel_depth)
        image_size(img_size)
        self.dims = dims
        self.features_only = features_only
        self.checkpoint = checkpoint
        rates = Rates(drop, drop_path)

        def attention(scale: int) -> ConvRelativeAttention:
            dim, crpe = dims[scale - 1], self._at("crpe", scale)
            return ConvRelativeAttention(
                dim, HEADS, windows={}, relative=crpe, proj_drop=drop, backend=backend
            )

        for scale, dim, channels, patch in zip(SCALES, dims, (3, *dims), PATCHES, strict=False):
            cpe = ConvPositionEncoding(dim, backend=backend) if conv_position else None
            crpe = ConvRelativePosition(dim, HEADS) if conv_relative else None
            self.register_parameter(f"cls_token{scale}", nn.Parameter(torch.empty(1, 1, dim)))
            self.add_module(f"patch_embed{scale}", PatchEmbed(channels, dim, patch))
            self.add_module(f"cpe{scale}", cpe)
            self.add_module(f"crpe{scale}", crpe)
        for scale, dim, depth, ratio in zip(SCALES, dims, depths, mlp_ratios, strict=True):
            cpe = self._at("cpe", scale)
            blocks = (SerialBlock(dim, ratio, attention(scale), cpe, rates) for _ in range(depth))
            self.add_module(f"serial_blocks{scale}", nn.ModuleList(blocks))
        self.parallel_blocks = nn.ModuleList(
            ParallelBlock(dims[-1], mlp_ratios[-1], list(map(attention, PARALLEL)), co_scale, rates)
            for _ in range(parallel_depth)
        )
        if not features_only:
            self._add_head(num_classes)
        self.apply(init_weights)
        for scale in SCALES:
            nn.init.trunc_normal_(self._at("cls_token", scale), std=0.02)

    def _add_head(self, num_classes: int) -> None:
        for scale, dim in zip(SCALES, self.dims, strict=True):
            read = scale in self._read_scales()
            self.add_module(f"norm{scale}", norm_layer(dim).requires_grad_(read))
        if self.parallel_blocks:
            self.aggregate = nn.Conv1d(len(PARALLEL), 1, 1)
        self.head = Linear(self.dims[-1], num_classes) if num_classes else nn.Identity()

    def _read_scales(self) -> tuple[int, ...]:
        """Whose CLS tokens a classifier's head reads."""
        return PARALLEL if self.parallel_blocks else (4,)

    def _at(self, name: str, scale: int) -> Any:
        """The parameter or module `name` of a scale."""
        return getattr(self, f"{name}{scale}")

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """image [B, 3, H, W] -> logits [B, num_classes], or the four maps [B, C_i, H_i, W_i]."""
        tokens, grids = self.tokens(image)
        if self.features_only:
            return [as_map(x, grid) for x, grid in zip(tokens, grids, strict=True)]
        if not self.parallel_blocks:
            return self.head(self._at("norm", 4)(tokens[3][:, 0]))
        cls = [self._at("norm", s)(tokens[s - 1][:, 0]) for s in PARALLEL]
        return self.head(self.aggregate(torch.stack(cls, 1)).squeeze(1))

    def tokens(self, image: Tensor) -> tuple[list[Tensor], list[Grid]]:
        """image [B, 3, H, W] -> each scale's tokens [B, 1 + h w, C], and its grid (h, w)."""
        height, width = check_image(image)
        pad = (0, max(SMALLEST - width, 0), 0, max(SMALLEST - height, 0))
        image = F.pad(image, pad) if any(pad) else image
        recompute = self.checkpoint and self.training
        xs, grids = [], []
        for scale in SCALES:
            embedded = self._at("patch_embed", scale)(image)  # [B, h, w, C]
            grid = (embedded.shape[1], embedded.shape[2])
            cls = self._at("cls_token", scale).expand(embedded.shape[0], -1, -1)
            x = torch.cat([cls, embedded.flatten(1, 2)], 1)
            for block in self._at("serial_blocks", scale):
                x = run(block, x, grid, recompute=recompute)
            image = as_map(x, grid)  # the CLS token stays behind
            xs.append(x)
            grids.append(grid)
        cpes = [self._at("cpe", s) for s in PARALLEL if self._at("cpe", s) is not None]
        for block in self.parallel_blocks:
            xs[1:] = run(block, xs[1:], grids[1:], cpes, recompute=recompute)
        return xs, grids

    def attentions(self, stage: int) -> list[tuple[nn.Module, ConvRelativeAttention]]:
        """(norm before it, conv-attention) of a scale's blocks: the serial, then the parallel."""
        if stage not in SCALES:
            raise ValueError(f"stage is {stage}; it must be 1, 2, 3 or 4")
        parallel: Any = self.parallel_blocks if stage in PARALLEL else ()
        serial = [(b.norm1, b.factoratt_crpe) for b in self._at("serial_blocks", stage)]
        return serial + [b.attention(stage) for b in parallel]

    def adapt_official(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A state in this model's layout, and the prefixes of keys it need not fit.

        The official layout is the model's own; timm's lacks the norms that the head does not read.
        """
        norms = {scale: f"norm{scale}." for scale in SCALES}
        if self.features_only:
            return state, (*norms.values(), "aggregate.", "head.")
        return state, tuple(norms[scale] for scale in SCALES if scale not in self._read_scales())


@torch.no_grad()
def cls_attention(model: CoaT, image: Tensor, stage: int, block: int = -1) -> Tensor:
    """How much the CLS token takes of each place of the image, in one block (paper, section 7).

    The CLS row of the map scale * Q softmax(K)^T, which the factorised form never stores; entries
    may be negative. With co_scale "direct" it is the row of the scale's attention to itself.

    Args:
        model: a CoaT, best in eval mode.
        image: [B, 3, H, W].
        stage: scale 1 to 4.
        block: which of the stage's blocks, its serial ones first, then the parallel group's; from
            the end where negative.

    Returns:
        [B, heads, h, w].

    Raises:
        ValueError: no such stage or block.
    """
    found = model.attentions(stage)
    if not -len(found) <= block < len(found):
        raise ValueError(f"block is {block}; stage {stage} has {len(found)} blocks")
    norm, attention = found[block]
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        grid = model.tokens(image)[1][stage - 1]
    finally:
        handle.remove()
    row = conv_relative_attention_map(
        linear(seen[0], attention.qkv.weight, attention.qkv.bias),
        *relative_term(attention),
        num_heads=attention.num_heads,
        grid=grid,
        scale=attention.scale,
    )
    return row[..., 1:].unflatten(-1, grid)


def _check_co_scale(co_scale: str, dims: Sequence[int], parallel_depth: int) -> None:
    if co_scale not in CO_SCALE:
        raise ValueError(f"co_scale is '{co_scale}'; allowed are {', '.join(CO_SCALE)}")
    if parallel_depth == 0 and co_scale != "interpolation":
        raise ValueError(f"co_scale is '{co_scale}'; CoaT-Lite has no parallel group")
    if parallel_depth and len(set(dims[1:])) > 1:
        raise ValueError(f"dims are {dims}; those of scales 2 to 4 must be equal")


def _register(name: str, *architecture: Any) -> None:
    register(name, functools.partial(CoaT, *architecture))


# Table 1; coat_lite_medium and coat_small came with the official code.
_register("coat_lite_tiny", (64, 128, 256, 320), (2, 2, 2, 2), (8, 8, 4, 4))
_register("coat_lite_mini", (64, 128, 320, 512), (2, 2, 2, 2), (8, 8, 4, 4))
_register("coat_lite_small", (64, 128, 320, 512), (3, 4, 6, 3), (8, 8, 4, 4))
_register("coat_lite_medium", (128, 256, 320, 512), (3, 6, 10, 8), (4, 4, 4, 4))
_register("coat_tiny", (152, 152, 152, 152), (2, 2, 2, 2), (4, 4, 4, 4), 6)
_register("coat_mini", (152, 216, 216, 216), (2, 2, 2, 2), (4, 4, 4, 4), 6)
_register("coat_small", (152, 320, 320, 320), (2, 2, 2, 2), (4, 4, 4, 4), 6)
