"""Inner-patch self-attention (IPSA), CAT 3.1.1."""

from .interface import inner_patch_attention
from .module import InnerPatchAttention
from .reference import inner_patch_attention_reference

__all__ = ["InnerPatchAttention", "inner_patch_attention", "inner_patch_attention_reference"]
