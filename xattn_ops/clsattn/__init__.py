"""Cross attention whose only query is the CLS token, CrossViT 3.3."""

from .attention_map import cls_cross_attention_map
from .interface import cls_cross_attention
from .module import ClsCrossAttention
from .reference import cls_cross_attention_reference

__all__ = [
    "ClsCrossAttention",
    "cls_cross_attention",
    "cls_cross_attention_map",
    "cls_cross_attention_reference",
]
