"""As test_bad_input.py, for cls_cross_attention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.cases import DENSE, wrong
from support.clsattn import SMALL

from xattn_ops import cls_cross_attention
from xattn_ops.clsattn import cls_cross_attention_map

f32, f64 = torch.float32, torch.float64
GOOD = SMALL.tensors(f32, requires_grad=False) | SMALL.options  # 2 images, 7 patches, 2 heads of 4


def _of(name: str, layout: str, *sizes: int) -> list[Any]:
    """What every weight and bias refuses alike."""
    size = f"{layout} = {list(sizes)}"
    wider = [s + 1 for s in sizes]
    return [
        wrong(
            f"{name}_list",
            TypeError,
            f"{name} must be a tensor {layout}, got list",
            **{name: [1.0]},
        ),
        wrong(
            f"{name}_rank",
            ValueError,
            f"{name} must be {layout}, got shape {[1, *sizes]}",
            **{name: torch.zeros(1, *sizes)},
        ),
        wrong(
            f"{name}_size",
            ValueError,
            f"{name} must be {size}, got shape {wider}",
            **{name: torch.zeros(wider)},
        ),
        wrong(
            f"{name}_dtype",
            TypeError,
            f"{name} must have the dtype of cls_token, torch.float32, got torch.float64",
            **{name: torch.zeros(sizes, dtype=f64)},
        ),
        wrong(
            f"{name}_device",
            ValueError,
            f"{name} must be on the device of cls_token, cpu, got meta",
            **{name: torch.zeros(sizes, device="meta")},
        ),
    ]


KEYS = [  # what the map refuses too
    wrong("list", TypeError, "cls_token must be a tensor [B, 1, C], got list", cls_token=[1.0]),
    wrong(
        "int64",
        TypeError,
        f"cls_token must be {DENSE}, got torch.int64",
        cls_token=torch.zeros(2, 1, 8, dtype=torch.int64),
    ),
    wrong(
        "sparse",
        TypeError,
        "cls_token must be a dense (strided) tensor, got torch.sparse_coo",
        cls_token=torch.zeros(2, 1, 8).to_sparse(),
    ),
    wrong(
        "rank",
        ValueError,
        "cls_token must be [B, 1, C], got shape [2, 8]",
        cls_token=torch.zeros(2, 8),
    ),
    wrong(
        "two_tokens",
        ValueError,
        "cls_token must be [B, 1, C], got shape [2, 2, 8]",
        cls_token=torch.zeros(2, 2, 8),
    ),
    wrong(
        "no_token",
        ValueError,
        "cls_token must be [B, 1, C] with every size but the first at least 1, got shape [2, 0, 8]",
        cls_token=torch.zeros(2, 0, 8),
    ),
    wrong("patches_none", TypeError, "patches must be a tensor [B, N, C], got No", patches=None),
    wrong(
        "patches_rank",
        ValueError,
        "patches must be [B, N, C], got shape [2, 7, 1, 8]",
        patches=torch.zeros(2, 7, 1, 8),
    ),
    wrong(
        "patches_dtype",
        TypeError,
        "patches must have the dtype of cls_token, torch.float32, got torch.bfloat16",
        patches=torch.zeros(2, 7, 8, dtype=torch.bfloat16),
    ),
    wrong(
        "patches_device",
        ValueError,
        "patches must be on the device of cls_token, cpu, got meta",
        patches=torch.zeros(2, 7, 8, device="meta"),
    ),
    *(
        wrong(
            f"patches_{id}",
            ValueError,
            "patches must be [B, N, C] with B = 2, N at least 1 and C = 8, "
            f"got shape {list(shape)}",
            patches=torch.zeros(shape),
        )
        for id, shape in {
            "batch": (3, 7, 8),
            "of_one_image": (1, 7, 8),
            "none": (2, 0, 8),
            "channels": (2, 7, 12),
        }.items()
    ),
    wrong(
        "heads_do_not_divide",
        ValueError,
        "num_heads must divide the channels of cls_token, 8, got 3",
        num_heads=3,
    ),
    wrong("heads_zero", ValueError, "num_heads must be at least 1, got 0", num_heads=0),
    wrong("heads_float", TypeError, "num_heads must be an int, got float", num_heads=2.0),
    wrong("heads_bool", TypeError, "num_heads must be an int, got bool", num_heads=True),
    *_of("q_weight", "[C, C]", 8, 8),
    *_of("k_weight", "[C, C]", 8, 8),
    *_of("q_bias", "[C]", 8),
    *_of("k_bias", "[C]", 8),
    *_of("norm_weight", "[C]", 8),
    *_of("norm_bias", "[C]", 8),
    wrong(
        "norm_bias_alone",
        ValueError,
        "norm_bias must be None where norm_weight is None, got a tensor",
        norm_weight=None,
    ),
    wrong("eps_text", TypeError, "eps must be a float, got str", eps="1e-6"),
    wrong("eps_bool", TypeError, "eps must be a float, got bool", eps=True),
    wrong("eps_negative", ValueError, "eps must be at least 0, got -1e-06", eps=-1e-6),
    wrong("eps_nan", ValueError, "eps must be at least 0, got nan", eps=float("nan")),
    wrong("scale_text", TypeError, "scale must be a float or None, got str", scale="1"),
    wrong("scale_bool", TypeError, "scale must be a float or None, got bool", scale=True),
]

ATTENTION = [
    *_of("v_weight", "[C, C]", 8, 8),
    *_of("v_bias", "[C]", 8),
    wrong("v_weight_none", TypeError, "v_weight must be a tensor [C, C], got No", v_weight=None),
    wrong("dropout_one", ValueError, "dropout_p must be in [0, 1), got 1.0", dropout_p=1.0),
    wrong("dropout_negative", ValueError, "dropout_p must be in [0, 1), got -0.1", dropout_p=-0.1),
    wrong("dropout_text", TypeError, "dropout_p must be a float, got str", dropout_p="0.1"),
    wrong(
        "backend_unknown",
        ValueError,
        "backend must be one of cuda, triton, cpu, reference, got 'gpu'",
        backend="gpu",
    ),
    wrong(
        "backend_that_cannot",
        ValueError,
        "backend 'cuda' cannot serve cls_cross_attention: "
        "cls_cross_attention has no cuda kernel in this version",
        backend="cuda",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), KEYS + ATTENTION)
def test_cls_cross_attention(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cls_cross_attention(**GOOD | arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), KEYS)
def test_attention_map(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {name: value for name, value in GOOD.items() if not name.startswith("v_")}
    with pytest.raises(error, match=re.escape(message)):
        cls_cross_attention_map(**good | arguments)


def test_options_told_apart_by_their_spelling() -> None:
    """A good call before must not let a wrong one of equal value pass."""
    cls_cross_attention(**GOOD | {"scale": 1.0})
    with pytest.raises(TypeError, match="num_heads must be an int, got float"):
        cls_cross_attention(**GOOD | {"num_heads": 2.0})
    with pytest.raises(TypeError, match="scale must be a float or None, got bool"):
        cls_cross_attention(**GOOD | {"scale": True})
