"""Digest-token attention, and the token merge and enhancement that makes digests, CabViT 3.1."""

from .attention_map import digest_attention_map
from .interface import digest_attention
from .merge_interface import token_merge_enhance
from .merge_module import TokenMergeEnhance
from .merge_reference import token_merge_enhance_reference
from .module import DigestAttention
from .reference import digest_attention_reference

__all__ = [
    "DigestAttention",
    "TokenMergeEnhance",
    "digest_attention",
    "digest_attention_map",
    "digest_attention_reference",
    "token_merge_enhance",
    "token_merge_enhance_reference",
]
