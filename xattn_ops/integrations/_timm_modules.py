"""timm's modules of attention with our operators inside, and how one becomes the other.

Importing this needs timm. Each class derives from the timm module whose place it takes and adds
nothing to its state: a module changes its class and is otherwise what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm import __version__ as timm_version
from timm.models.coat import ConvPosEnc, ConvRelPosEnc, FactorAttnConvRelPosEnc
from timm.models.crossvit import CrossAttention, CrossAttentionBlock
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from .. import cls_cross_attention, conv_position_encoding, conv_relative_attention
from .._linear import apply_linear, is_plain
from ..ipsa.block import PackedWeights
from ..ipsa.module import WindowAttentionLayers

if not hasattr(SwinTransformerBlock, "_attn"):
    raise ImportError(f"timm {timm_version} is older than 1.0")


# ---- The modules -------------------------------------------------------------------------------


class FusedCrossAttention(CrossAttention):
    """CrossViT's, on tokens [B, 1 + N, C] -> [B, 1, C]; norm: a LayerNorm to be done inside."""

    backend: str | None

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        if x.shape[1] == 1:  # CLS alone, as behind another cross attention in the same stage
            return super().forward(x if norm is None else norm(x))
        out = cls_cross_attention(
            x[:, :1],
            x[:, 1:],
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
            dropout_p=_rate(self.attn_drop),
            backend=self.backend,
        )
        return self.proj_drop(apply_linear(self.proj, out))


class FusedCrossAttentionBlock(CrossAttentionBlock):
    """The block around it, which leaves its norm to the attention."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.attn(x, self.norm1) if _takes_norm(self) else self.attn(self.norm1(x))
        return x[:, :1] + self.drop_path(out)


class FusedFactorAttnConvRelPosEnc(FactorAttnConvRelPosEnc):
    """CoaT's, on tokens [B, 1 + h w, C]; the kernels stay in `crpe`, which computes nothing."""

    backend: str | None
    crpe: ConvRelPosEnc

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        convolutions: list[Any] = [*self.crpe.conv_list]
        out = conv_relative_attention(
            apply_linear(self.qkv, x),
            [conv.weight for conv in convolutions],
            [conv.bias for conv in convolutions],
            num_heads=self.num_heads,
            grid=(size[0], size[1]),
            scale=self.scale,
            backend=self.backend,
        )
        return self.proj_drop(apply_linear(self.proj, out))


class FusedConvPosEnc(ConvPosEnc):
    """CoaT's, on tokens [B, 1 + h w, C]."""

    backend: str | None

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return conv_position_encoding(
            x, self.proj.weight, self.proj.bias, grid=(size[0], size[1]), backend=self.backend
        )


class FusedWindowAttention(WindowAttentionLayers, WindowAttention):
    """Swin's, on maps [B, H, W, C]; windows [B nW, N, C], as timm's own blocks pass, go to timm."""

    backend: str | None

    def forward(
        self, x: Tensor, mask: Tensor | None = None, shift: tuple[int, int] = (0, 0)
    ) -> Tensor:
        if x.dim() == 3:
            return super().forward(x, mask)
        # timm's call of scaled_dot_product_attention leaves the scale to torch
        scale = None if self.fused_attn else self.scale
        window = (self.window_size[0], self.window_size[1])
        return self.proj_drop(self._attend(x, window, shift, scale, _rate(self.attn_drop)))


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """The block around it, which leaves roll, padding, partition and mask to the attention."""

    def _attn(self, x: Tensor) -> Tensor:
        (rows, columns), (down, along) = self.window_size, self.shift_size
        height, width = x.shape[1:3]
        below, right = -height % rows, -width % columns
        shift = (down, along)
        if not any(shift) or not (below or right):
            return self.attn(x, shift=shift)
        # timm pads the map that it has rolled, the operator rolls the map that it has padded: here
        # the padding goes to the places that the operator's roll brings to the end
        back = (-down, -along)
        x = F.pad(x.roll(back, (1, 2)), (0, 0, 0, right, 0, below)).roll(shift, (1, 2))
        out = self.attn(x, shift=shift).roll(back, (1, 2))
        return out[:, :height, :width].roll(shift, (1, 2))


def _rate(dropout: nn.Module) -> float:
    """What is dropped now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _takes_norm(block: Any) -> bool:
    """Whether `norm1` of a block is a LayerNorm over its tokens and nothing else."""
    norm, dim = block.norm1, block.attn.wq.in_features
    return (
        isinstance(block.attn, FusedCrossAttention)
        and is_plain(norm, nn.LayerNorm)
        and norm.normalized_shape == (dim,)
        and norm.weight is not None
    )


# ---- From timm's class to ours, and back --------------------------------------------------------


class Found(NamedTuple):
    """A module that is, or looks like, one that we know."""

    module: nn.Module
    operator: str
    refused: str  # why it is not replaced; "" where it is
    block: nn.Module | None = None  # around it, to be replaced with it

    def replace(self, backend: str | None) -> None:
        module = self.module
        module.__class__ = OURS.get(type(module), type(module))
        module.backend = backend  # type: ignore[assignment]
        if isinstance(module, FusedWindowAttention):
            module._packed = PackedWeights()
        if self.block is not None:
            self.block.__class__ = OURS.get(type(self.block), type(self.block))


OURS: dict[type[nn.Module], type[nn.Module]] = {
    CrossAttention: FusedCrossAttention,
    CrossAttentionBlock: FusedCrossAttentionBlock,
    FactorAttnConvRelPosEnc: FusedFactorAttnConvRelPosEnc,
    ConvPosEnc: FusedConvPosEnc,
    WindowAttention: FusedWindowAttention,
    SwinTransformerBlock: FusedSwinTransformerBlock,
}
TIMMS = {ours: timms for timms, ours in OURS.items()}
OPERATORS: dict[type[nn.Module], str] = {
    CrossAttention: "cls_cross_attention",
    FactorAttnConvRelPosEnc: "conv_relative_attention",
    ConvPosEnc: "conv_position_encoding",
    WindowAttention: "inner_patch_attention",
}
# Not derived from the classes above, but taken for them: they compute something else.
OTHERS = {
    "timm.models.swin_transformer_v2.WindowAttention": "Swin v2's attention is by cosines",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": (
        "Swin v2's attention is by cosines"
    ),
}


def find(model: nn.Module) -> dict[str, Found]:
    """The modules of attention that we know, by name, in the model's order."""
    kinds = (CrossAttentionBlock, SwinTransformerBlock)
    around = [block for block in model.modules() if any(_is(block, kind) for kind in kinds)]
    blocks = {id(block.attn): block for block in around}
    found = {}
    for name, module in model.named_modules():
        known = next((kind for kind in OPERATORS if isinstance(module, kind)), None)
        if known is not None:
            block = blocks.get(id(module))
            operator, why = OPERATORS[known], _refusal(module, known, block)
            found[name] = Found(module, operator, why, block)
        elif why := OTHERS.get(f"{type(module).__module__}.{type(module).__qualname__}", ""):
            found[name] = Found(module, "", why)
    return found


def restore(model: nn.Module) -> list[str]:
    """Undo `Found.replace`; the names of the modules of attention."""
    names = []
    for name, module in model.named_modules():
        timms = TIMMS.get(type(module))
        if timms is None:
            continue
        module.__class__ = timms
        if timms in OPERATORS:
            names.append(name)
            module.__dict__.pop("backend")
            module.__dict__.pop("_packed", None)
    return names


def _is(module: nn.Module, timms: type[nn.Module]) -> bool:
    """Whether a module is of timm's class or of ours in its place, and of no other derived one."""
    return type(module) in (timms, OURS[timms])


def _refusal(module: Any, kind: type[nn.Module], block: nn.Module | None) -> str:
    """Why a module cannot be replaced; "" where it can."""
    if not _is(module, kind):
        return (
            f"{type(module).__name__} derives from timm's {kind.__name__} and may compute "
            "something else"
        )
    return _CHECKS[kind](module, block)


def _check_cls(module: Any, block: nn.Module | None) -> str:
    for name in ("wq", "wk", "wv"):
        if not is_plain(getattr(module, name)):
            return _no_plain(name, getattr(module, name), nn.Linear)
    return _check_dropout(module.attn_drop)


def _check_window(module: Any, block: Any) -> str:
    if block is None:
        return "no SwinTransformerBlock of timm is around it, to hand it the map"
    if tuple(module.window_size) != tuple(block.window_size):
        return f"its window {module.window_size} is not its block's, {block.window_size}"
    for name in ("qkv", "proj"):
        if not isinstance(getattr(module, name), nn.Linear):
            return _no_plain(name, getattr(module, name), nn.Linear)
    return _check_dropout(module.attn_drop)


def _check_factorised(module: Any, block: nn.Module | None) -> str:
    if not isinstance(module.crpe, ConvRelPosEnc):
        return f"crpe is {_kind(module.crpe)}; a ConvRelPosEnc is needed"
    for i, conv in enumerate(module.crpe.conv_list):
        if why := _check_depthwise(f"crpe.conv_list.{i}", conv):
            return why
    return ""


def _check_encoding(module: Any, block: nn.Module | None) -> str:
    return _check_depthwise("proj", module.proj)


_CHECKS: dict[type[nn.Module], Callable[[Any, Any], str]] = {
    CrossAttention: _check_cls,
    WindowAttention: _check_window,
    FactorAttnConvRelPosEnc: _check_factorised,
    ConvPosEnc: _check_encoding,
}


def _check_depthwise(name: str, conv: Any) -> str:
    if not is_plain(conv, nn.Conv2d):
        return _no_plain(name, conv, nn.Conv2d)
    rows, columns = conv.kernel_size
    if rows != columns or rows % 2 == 0:
        return f"the kernel of {name} is {conv.kernel_size}; a square one of odd size is needed"
    same = conv.stride == conv.dilation == (1, 1) and conv.padding == (rows // 2, rows // 2)
    if not same or conv.padding_mode != "zeros" or conv.groups != conv.in_channels:
        return f"{name} is {conv}; a depthwise one that keeps the size of the map is needed"
    return ""


def _check_dropout(dropout: Any) -> str:
    if isinstance(dropout, nn.Identity):
        return ""
    if type(dropout) is not nn.Dropout:
        return _no_plain("attn_drop", dropout, nn.Dropout)
    return "" if dropout.p < 1 else f"attn_drop drops with {dropout.p}; less than 1 is needed"


def _no_plain(name: str, layer: Any, kind: type[nn.Module]) -> str:
    hooked = " with hooks" if type(layer) is kind else ""
    return f"{name} is {_kind(layer)}{hooked}; a plain {kind.__name__} is needed"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
