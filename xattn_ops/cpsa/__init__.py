"""Cross-patch self-attention (CPSA), CAT 3.1.2."""

from .interface import cross_patch_attention
from .module import CrossPatchAttention
from .reference import cross_patch_attention_reference

__all__ = ["CrossPatchAttention", "cross_patch_attention", "cross_patch_attention_reference"]
