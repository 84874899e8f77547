"""As test_bad_input.py, for conv_relative_attention and conv_position_encoding."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.cases import DENSE, wrong
from support.convpos import SMALL as POSITION

from xattn_ops import (
    ConvPositionEncoding,
    ConvRelativeAttention,
    conv_position_encoding,
    conv_relative_attention,
)
from xattn_ops.convrel import ConvRelativePosition, conv_relative_attention_map

f32, f64 = torch.float32, torch.float64

ATTENTION = {  # right in everything
    "qkv": torch.zeros(2, 41, 24),
    "conv_weights": [torch.zeros(3, 1, 3, 3), torch.zeros(5, 1, 5, 5)],
    "conv_biases": [torch.zeros(3), torch.zeros(5)],
    "num_heads": 2,
    "grid": (5, 8),
}

# ---------------------------------------------------------------- what both functions refuse alike

GRID = [
    wrong("grid_int", TypeError, "grid must be a pair of ints (rows, columns), got 40", grid=40),
    wrong(
        "grid_triple",
        ValueError,
        "grid must be a pair of ints (rows, columns), got (5, 8, 1)",
        grid=(5, 8, 1),
    ),
    wrong("grid_zero", ValueError, "grid[1] must be at least 1, got 0", grid=(40, 0)),
    wrong("grid_float", TypeError, "grid[0] must be an int, got float", grid=(5.0, 8)),
    wrong(
        "grid_of_other_tokens",
        ValueError,
        "must have num_prefix_tokens + rows * columns tokens, 1 + 5 * 7 = 36, got 41",
        grid=(5, 7),
    ),
    wrong(
        "prefix_of_other_tokens",
        ValueError,
        "must have num_prefix_tokens + rows * columns tokens, 0 + 5 * 8 = 40, got 41",
        num_prefix_tokens=0,
    ),
    wrong(
        "prefix_negative",
        ValueError,
        "num_prefix_tokens must be at least 0, got -1",
        num_prefix_tokens=-1,
    ),
    wrong(
        "prefix_bool",
        TypeError,
        "num_prefix_tokens must be an int, got bool",
        num_prefix_tokens=True,
    ),
    wrong(
        "backend_unknown",
        ValueError,
        "backend must be one of cuda, triton, cpu, reference, got 'gpu'",
        backend="gpu",
    ),
]

ATTENTION_CASES = [
    wrong("list", TypeError, "qkv must be a tensor [B, N, 3C], got list", qkv=[1.0]),
    wrong(
        "int64",
        TypeError,
        f"qkv must be {DENSE}, got torch.int64",
        qkv=torch.zeros(2, 41, 24, dtype=torch.int64),
    ),
    wrong(
        "sparse",
        TypeError,
        "qkv must be a dense (strided) tensor, got torch.sparse_coo",
        qkv=torch.zeros(2, 41, 24).to_sparse(),
    ),
    wrong(
        "rank",
        ValueError,
        "qkv must be [B, N, 3C], got shape [2, 5, 8, 24]",
        qkv=torch.zeros(2, 5, 8, 24),
    ),
    wrong(
        "no_tokens",
        ValueError,
        "qkv must be [B, N, 3C] with every size but the first at least 1, got shape [2, 0, 24]",
        qkv=torch.zeros(2, 0, 24),
    ),
    wrong(
        "channels",
        ValueError,
        "qkv must have 3 * num_heads * D channels with num_heads=2, got 27",
        qkv=torch.zeros(2, 41, 27),
    ),
    wrong("heads_zero", ValueError, "num_heads must be at least 1, got 0", num_heads=0),
    wrong("heads_float", TypeError, "num_heads must be an int, got float", num_heads=2.0),
    wrong(
        "heads_do_not_divide",
        ValueError,
        "qkv must have 3 * num_heads * D channels with num_heads=5, got 24",
        num_heads=5,
    ),
    wrong(
        "weights_tensor",
        TypeError,
        "conv_weights must be a list of tensors [C_g, 1, k, k], got Tensor",
        conv_weights=torch.zeros(8, 1, 3, 3),
    ),
    wrong(
        "weights_none",
        TypeError,
        "conv_weights must be a list of tensors [C_g, 1, k, k], got NoneType",
        conv_weights=None,
    ),
    wrong(
        "weight_number",
        TypeError,
        "conv_weights[1] must be a tensor [C_g, 1, k, k], got float",
        conv_weights=[torch.zeros(3, 1, 3, 3), 1.0],
    ),
    wrong(
        "weight_rank",
        ValueError,
        "conv_weights[0] must be [C_g, 1, k, k], got shape [8, 3, 3]",
        conv_weights=[torch.zeros(8, 3, 3)],
    ),
    wrong(
        "weight_dense",
        ValueError,
        "conv_weights[0] must be [C_g, 1, k, k] with odd k, got shape [8, 8, 3, 3]",
        conv_weights=[torch.zeros(8, 8, 3, 3)],
    ),
    wrong(
        "weight_rectangular",
        ValueError,
        "conv_weights[0] must be [C_g, 1, k, k] with odd k, got shape [8, 1, 3, 5]",
        conv_weights=[torch.zeros(8, 1, 3, 5)],
    ),
    wrong(
        "weight_even",
        ValueError,
        "conv_weights[1] must be [C_g, 1, k, k] with odd k, got shape [5, 1, 4, 4]",
        conv_weights=[torch.zeros(3, 1, 3, 3), torch.zeros(5, 1, 4, 4)],
    ),
    wrong(
        "weight_empty",
        ValueError,
        "conv_weights[1] must be [C_g, 1, k, k] with odd k, got shape [0, 1, 3, 3]",
        conv_weights=[torch.zeros(8, 1, 3, 3), torch.zeros(0, 1, 3, 3)],
    ),
    wrong(
        "weights_of_few_channels",
        ValueError,
        "conv_weights must have C = 8 channels in all, got [3, 4]",
        conv_weights=[torch.zeros(3, 1, 3, 3), torch.zeros(4, 1, 5, 5)],
    ),
    wrong(
        "weight_dtype",
        TypeError,
        "conv_weights[0] must have the dtype of qkv, torch.float32, got torch.float64",
        conv_weights=[torch.zeros(8, 1, 3, 3, dtype=f64)],
    ),
    wrong(
        "weight_device",
        ValueError,
        "conv_weights[0] must be on the device of qkv, cpu, got meta",
        conv_weights=[torch.zeros(8, 1, 3, 3, device="meta")],
    ),
    wrong(
        "biases_tensor",
        TypeError,
        "conv_biases must be a list of tensors [C_g], got Tensor",
        conv_biases=torch.zeros(8),
    ),
    wrong(
        "biases_few",
        ValueError,
        "conv_biases must be as many as conv_weights, 2, got 1",
        conv_biases=[torch.zeros(8)],
    ),
    wrong(
        "biases_without_weights",
        ValueError,
        "conv_biases must be as many as conv_weights, 0, got 2",
        conv_weights=[],
    ),
    wrong(
        "biases_some",
        TypeError,
        "conv_biases[1] must be a tensor [C_g], got NoneType",
        conv_biases=[torch.zeros(3), None],
    ),
    wrong(
        "bias_size",
        ValueError,
        "conv_biases[1] must be [C_g] = [5], got shape [3]",
        conv_biases=[torch.zeros(3), torch.zeros(3)],
    ),
    wrong(
        "bias_dtype",
        TypeError,
        "conv_biases[0] must have the dtype of qkv, torch.float32, got torch.float16",
        conv_biases=[torch.zeros(3, dtype=torch.float16), torch.zeros(5)],
    ),
    wrong(
        "bias_device",
        ValueError,
        "conv_biases[1] must be on the device of qkv, cpu, got meta",
        conv_biases=[torch.zeros(3), torch.zeros(5, device="meta")],
    ),
    wrong("scale_text", TypeError, "scale must be a float or None, got str", scale="0.1"),
    wrong("scale_bool", TypeError, "scale must be a float or None, got bool", scale=True),
    *GRID,
]

POSITION_CASES = [
    wrong("none", TypeError, "x must be a tensor [B, N, C], got NoneType", x=None),
    wrong(
        "bool",
        TypeError,
        f"x must be {DENSE}, got torch.bool",
        x=torch.zeros(2, 41, 8, dtype=torch.bool),
    ),
    wrong("rank", ValueError, "x must be [B, N, C], got shape [41, 8]", x=torch.zeros(41, 8)),
    wrong(
        "no_channels",
        ValueError,
        "x must be [B, N, C] with every size but the first at least 1, got shape [2, 41, 0]",
        x=torch.zeros(2, 41, 0),
    ),
    wrong("weight_list", TypeError, "weight must be a tensor [C, 1, k, k], got list", weight=[1.0]),
    wrong(
        "weight_even",
        ValueError,
        "weight must be [C, 1, k, k] with odd k, got shape [8, 1, 2, 2]",
        weight=torch.zeros(8, 1, 2, 2),
    ),
    wrong(
        "weight_channels",
        ValueError,
        "weight must be [C, 1, k, k] with C = 8, got shape [7, 1, 3, 3]",
        weight=torch.zeros(7, 1, 3, 3),
    ),
    wrong(
        "weight_dtype",
        TypeError,
        "weight must have the dtype of x, torch.float32, got torch.bfloat16",
        weight=torch.zeros(8, 1, 3, 3, dtype=torch.bfloat16),
    ),
    wrong(
        "weight_device",
        ValueError,
        "weight must be on the device of x, cpu, got meta",
        weight=torch.zeros(8, 1, 3, 3, device="meta"),
    ),
    wrong("bias_rank", ValueError, "bias must be [C], got shape [8, 1]", bias=torch.zeros(8, 1)),
    wrong("bias_size", ValueError, "bias must be [C] = [8], got shape [3]", bias=torch.zeros(3)),
    wrong(
        "bias_dtype",
        TypeError,
        "bias must have the dtype of x, torch.float32, got torch.float64",
        bias=torch.zeros(8, dtype=f64),
    ),
    wrong(
        "bias_device",
        ValueError,
        "bias must be on the device of x, cpu, got meta",
        bias=torch.zeros(8, device="meta"),
    ),
    *GRID,
]


@pytest.mark.parametrize(("arguments", "error", "message"), ATTENTION_CASES)
def test_conv_relative_attention(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        conv_relative_attention(**ATTENTION | arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), POSITION_CASES)
def test_conv_position_encoding(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = POSITION.tensors(f32, requires_grad=False) | POSITION.options
    with pytest.raises(error, match=re.escape(message)):
        conv_position_encoding(**good | arguments)


@pytest.mark.parametrize(
    ("function", "good"),
    [
        (conv_relative_attention, ATTENTION),
        (conv_position_encoding, POSITION.tensors(f32, requires_grad=False) | POSITION.options),
    ],
    ids=["attention", "position"],
)
def test_backend_that_cannot(function, good: dict[str, Any]) -> None:
    name = function.__name__
    message = f"backend 'cuda' cannot serve {name}: {name} has no cuda kernel in this version"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**good, backend="cuda")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        wrong("query_float", TypeError, "query must be an int, got float", query=0.0),
        wrong("query_negative", ValueError, "query must be at least 0, got -1", query=-1),
        wrong(
            "query_beyond",
            ValueError,
            "query must be less than the number of tokens, 41, got 41",
            query=41,
        ),
        wrong("heads_zero", ValueError, "num_heads must be at least 1, got 0", num_heads=0),
        wrong("grid_zero", ValueError, "grid[0] must be at least 1, got 0", grid=(0, 40)),
        wrong(
            "biases_few",
            ValueError,
            "conv_biases must be as many as conv_weights, 2, got 0",
            conv_biases=[],
        ),
    ],
)
def test_attention_map(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        conv_relative_attention_map(**ATTENTION | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        wrong("dim", ValueError, "num_heads must divide dim, 16, got 3", num_heads=3),
        wrong("dim_zero", ValueError, "dim must be at least 1, got 0", dim=0),
        wrong("window_even", ValueError, "windows must be odd, got 4", windows={4: 8}),
        wrong("window_text", TypeError, "windows must be an int, got str", windows={"3": 8}),
        wrong(
            "window_of_no_head",
            ValueError,
            "windows[3] must be at least 1, got 0",
            windows={3: 0, 5: 8},
        ),
        wrong(
            "windows_of_few_heads",
            ValueError,
            "windows must share out num_heads = 8 heads, got {3: 2, 5: 3}",
            windows={3: 2, 5: 3},
        ),
        wrong(
            "prefix",
            ValueError,
            "num_prefix_tokens must be at least 0, got -1",
            num_prefix_tokens=-1,
        ),
        wrong("proj_drop", ValueError, "proj_drop must be in [0, 1), got 1.0", proj_drop=1.0),
    ],
)
def test_attention_module(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ConvRelativeAttention(**{"dim": 16} | arguments)


def test_kernels_shared_by_modules_of_other_widths() -> None:
    module = ConvRelativeAttention(16, relative=ConvRelativePosition(24))
    message = "conv_weights must have C = 16 channels in all, got [6, 9, 9]"
    with pytest.raises(ValueError, match=re.escape(message)):
        module(torch.zeros(2, 41, 16), (5, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        wrong("dim", TypeError, "dim must be an int, got float", dim=8.0),
        wrong("window_even", ValueError, "window must be odd, got 2", window=2),
        wrong("window_zero", ValueError, "window must be at least 1, got 0", window=0),
        wrong(
            "prefix", TypeError, "num_prefix_tokens must be an int, got str", num_prefix_tokens="1"
        ),
    ],
)
def test_position_module(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ConvPositionEncoding(**{"dim": 8} | arguments)


def test_options_told_apart_by_their_spelling() -> None:
    """A good call before must not let a wrong one of equal value pass."""
    conv_relative_attention(**ATTENTION)
    with pytest.raises(TypeError, match=re.escape("grid[0] must be an int, got float")):
        conv_relative_attention(**ATTENTION | {"grid": (5.0, 8.0)})
    with pytest.raises(TypeError, match="num_prefix_tokens must be an int, got bool"):
        conv_relative_attention(**ATTENTION, num_prefix_tokens=True)


def test_lists_told_apart_by_what_they_hold() -> None:
    """As above, where only a tensor inside a list differs."""
    conv_relative_attention(**ATTENTION)
    other = [torch.zeros(3, 1, 3, 3), torch.zeros(5, 1, 5, 5, dtype=f64)]
    with pytest.raises(TypeError, match=re.escape("conv_weights[1] must have the dtype of qkv")):
        conv_relative_attention(**ATTENTION | {"conv_weights": other})
    with pytest.raises(ValueError, match="conv_biases must be as many"):
        conv_relative_attention(**ATTENTION | {"conv_biases": ATTENTION["conv_biases"] * 2})
