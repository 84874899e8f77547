"""Fused attention operators for vision transformers."""

from ._backend import available_backends, explain
from ._version import __version__
from .clsattn import ClsCrossAttention, cls_cross_attention
from .convrel import (
    ConvPositionEncoding,
    ConvRelativeAttention,
    conv_position_encoding,
    conv_relative_attention,
)
from .cpsa import CrossPatchAttention, cross_patch_attention
from .digest import (
    DigestAttention,
    TokenMergeEnhance,
    digest_attention,
    token_merge_enhance,
)
from .ipsa import InnerPatchAttention, inner_patch_attention

__all__ = [
    "ClsCrossAttention",
    "ConvPositionEncoding",
    "ConvRelativeAttention",
    "CrossPatchAttention",
    "DigestAttention",
    "InnerPatchAttention",
    "TokenMergeEnhance",
    "__version__",
    "available_backends",
    "cls_cross_attention",
    "conv_position_encoding",
    "conv_relative_attention",
    "cross_patch_attention",
    "digest_attention",
    "explain",
    "inner_patch_attention",
    "token_merge_enhance",
]
