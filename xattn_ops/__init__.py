"""Fused attention operators for vision transformers."""

from ._backend import available_backends, explain
from ._version import __version__
from .cpsa import CrossPatchAttention, cross_patch_attention
from .digest import DigestAttention, digest_attention
from .ipsa import InnerPatchAttention, inner_patch_attention

__all__ = [
    "CrossPatchAttention",
    "DigestAttention",
    "InnerPatchAttention",
    "__version__",
    "available_backends",
    "cross_patch_attention",
    "digest_attention",
    "explain",
    "inner_patch_attention",
]
