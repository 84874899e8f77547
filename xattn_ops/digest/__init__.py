"""Digest-token attention, CabViT 3.1."""

from .interface import digest_attention
from .module import DigestAttention
from .reference import digest_attention_reference

__all__ = ["DigestAttention", "digest_attention", "digest_attention_reference"]
