"""As test_bad_input.py, for conv_relative_attention and conv_position_encoding."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.convpos import SMALL as POSITION
from support.wrong import (
    Wrong,
    activation,
    backend,
    companion,
    depthwise,
    heads_of,
    integer,
    of_type,
    of_value,
    probability,
    refuses,
    scale,
    token_grid,
)

from xattn_ops import (
    ConvPositionEncoding,
    ConvRelativeAttention,
    conv_position_encoding,
    conv_relative_attention,
)
from xattn_ops.convrel import ConvRelativePosition, conv_relative_attention_map

f32, f64 = torch.float32, torch.float64

GOOD = {  # 2 images, one prefix token and 5 x 8, 2 heads of 4
    "qkv": torch.zeros(2, 41, 24),
    "conv_weights": [torch.zeros(3, 1, 3, 3), torch.zeros(5, 1, 5, 5)],
    "conv_biases": [torch.zeros(3), torch.zeros(5)],
    "num_heads": 2,
    "grid": (5, 8),
}


def in_list(name: str, place: int, cases: list[Wrong]) -> list[Wrong]:
    """The cases of the tensor `name[place]`, in a list whose other tensors are right."""

    def changed(value: Any) -> list[Any]:
        return [value if i == place else good for i, good in enumerate(GOOD[name])]

    return [
        (id, error, message, {name: changed(value)})
        for id, error, message, arguments in cases
        for value in arguments.values()
    ]


ATTENTION = [  # what the map refuses too
    *activation("qkv", "[B, N, 3C]", 2, 41, 24),
    of_value(
        "qkv must have 3 * num_heads * D channels with num_heads=2, got 27",
        qkv=torch.zeros(2, 41, 27),
    ),
    *heads_of("qkv", 24),
    *token_grid("qkv", 1, 5, 8),
    *(
        of_type(f"{name} must be a list of tensors {layout}, got {kind}", **{name: value})
        for name, layout in (("conv_weights", "[C_g, 1, k, k]"), ("conv_biases", "[C_g]"))
        for kind, value in (("Tensor", torch.zeros(8, 1, 3, 3)), ("float", 1.0))
    ),
    of_type(
        "conv_weights must be a list of tensors [C_g, 1, k, k], got NoneType", conv_weights=None
    ),
    *(
        given
        for i, (size, k) in enumerate([(3, 3), (5, 5)])
        for given in (
            *in_list(
                "conv_weights",
                i,
                depthwise(f"conv_weights[{i}]", "[C_g, 1, k, k]", size, k, of="qkv", exact=False),
            ),
            *in_list("conv_biases", i, companion(f"conv_biases[{i}]", "[C_g]", size, of="qkv")),
        )
    ),
    of_value(
        "conv_weights must have C = 8 channels in all, got [3, 4]",
        conv_weights=[torch.zeros(3, 1, 3, 3), torch.zeros(4, 1, 5, 5)],
    ),
    of_value("conv_biases must be as many as conv_weights, 2, got 1", conv_biases=[torch.zeros(8)]),
    of_value("conv_biases must be as many as conv_weights, 2, got 0", conv_biases=[]),
    of_value("conv_biases must be as many as conv_weights, 0, got 2", conv_weights=[]),
    of_type(
        "conv_biases[1] must be a tensor [C_g], got NoneType", conv_biases=[torch.zeros(3), None]
    ),
    *scale(),
]

test_conv_relative_attention = refuses(
    conv_relative_attention, GOOD, *ATTENTION, *backend(conv_relative_attention)
)

test_attention_map = refuses(
    conv_relative_attention_map,
    GOOD,
    *ATTENTION,
    *integer("query", 0),
    of_value("query must be less than the number of tokens, 41, got 41", query=41),
)

test_conv_position_encoding = refuses(
    conv_position_encoding,
    POSITION.tensors(f32, requires_grad=False) | POSITION.options,
    *activation("x", "[B, N, C]", 2, 41, 8),
    *depthwise("weight", "[C, 1, k, k]", 8, 3, of="x"),
    *companion("bias", "[C]", 8, of="x"),
    *token_grid("x", 1, 5, 8),
    *backend(conv_position_encoding),
)

test_attention_module = refuses(
    ConvRelativeAttention,
    {"dim": 16},
    *integer("dim", 1),
    *integer("num_heads", 1),
    of_value("num_heads must divide dim, 16, got 3", num_heads=3),
    of_value("windows must be odd, got 4", windows={4: 8}),
    of_type("windows must be an int, got str", windows={"3": 8}),
    of_value("windows[3] must be at least 1, got 0", windows={3: 0, 5: 8}),
    of_value("windows must share out num_heads = 8 heads, got {3: 2, 5: 3}", windows={3: 2, 5: 3}),
    *integer("num_prefix_tokens", 0),
    *probability("proj_drop"),
)

test_position_module = refuses(
    ConvPositionEncoding,
    {"dim": 8},
    *integer("dim", 1),
    *integer("window", 1),
    of_value("window must be odd, got 2", window=2),
    *integer("num_prefix_tokens", 0),
)


def test_kernels_shared_by_modules_of_other_widths() -> None:
    module = ConvRelativeAttention(16, relative=ConvRelativePosition(24))
    message = "conv_weights must have C = 16 channels in all, got [6, 9, 9]"
    with pytest.raises(ValueError, match=re.escape(message)):
        module(torch.zeros(2, 41, 16), (5, 8))


def test_options_told_apart_by_their_spelling() -> None:
    """A good call before must not let a wrong one of equal value pass."""
    conv_relative_attention(**GOOD)
    with pytest.raises(TypeError, match=re.escape("grid[0] must be an int, got float")):
        conv_relative_attention(**GOOD | {"grid": (5.0, 8.0)})
    with pytest.raises(TypeError, match="num_prefix_tokens must be an int, got bool"):
        conv_relative_attention(**GOOD, num_prefix_tokens=True)


def test_lists_told_apart_by_what_they_hold() -> None:
    """As above, where only a tensor inside a list differs."""
    conv_relative_attention(**GOOD)
    other = [torch.zeros(3, 1, 3, 3), torch.zeros(5, 1, 5, 5, dtype=f64)]
    with pytest.raises(TypeError, match=re.escape("conv_weights[1] must have the dtype of qkv")):
        conv_relative_attention(**GOOD | {"conv_weights": other})
    with pytest.raises(ValueError, match="conv_biases must be as many"):
        conv_relative_attention(**GOOD | {"conv_biases": GOOD["conv_biases"] * 2})
