"""Factorised attention with convolutional position encodings, CoaT 4."""

from .attention_map import conv_relative_attention_map
from .interface import conv_position_encoding, conv_relative_attention
from .module import ConvPositionEncoding, ConvRelativeAttention, ConvRelativePosition
from .reference import conv_position_encoding_reference, conv_relative_attention_reference

__all__ = [
    "ConvPositionEncoding",
    "ConvRelativeAttention",
    "ConvRelativePosition",
    "conv_position_encoding",
    "conv_position_encoding_reference",
    "conv_relative_attention",
    "conv_relative_attention_map",
    "conv_relative_attention_reference",
]
