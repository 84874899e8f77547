"""Every wrong argument raises, and the message names it, what came and what is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.cases import DENSE, wrong
from support.cpsa import SMALL as CPSA
from support.ipsa import SMALL as IPSA

from xattn_ops import (
    CrossPatchAttention,
    InnerPatchAttention,
    cross_patch_attention,
    inner_patch_attention,
)

f32, f64 = torch.float32, torch.float64

IPSA_CASES = [
    wrong("list", TypeError, "qkv must be a tensor [B, H, W, 3C], got list", qkv=[1.0]),
    wrong("none", TypeError, "qkv must be a tensor [B, H, W, 3C], got NoneType", qkv=None),
    wrong(
        "sparse",
        TypeError,
        "qkv must be a dense (strided) tensor, got torch.sparse_coo",
        qkv=torch.zeros(2, 5, 8, 24).to_sparse(),
    ),
    wrong(
        "int64",
        TypeError,
        f"qkv must be {DENSE}, got torch.int64",
        qkv=torch.zeros(2, 5, 8, 24, dtype=torch.int64),
    ),
    wrong(
        "complex",
        TypeError,
        f"qkv must be {DENSE}, got torch.complex64",
        qkv=torch.zeros(2, 5, 8, 24, dtype=torch.complex64),
    ),
    wrong(
        "rank",
        ValueError,
        "qkv must be [B, H, W, 3C], got shape [2, 40, 24]",
        qkv=torch.zeros(2, 40, 24),
    ),
    wrong(
        "no_rows",
        ValueError,
        "qkv must be [B, H, W, 3C] with every size but the first at least 1, "
        "got shape [2, 0, 8, 24]",
        qkv=torch.zeros(2, 0, 8, 24),
    ),
    wrong(
        "no_channels",
        ValueError,
        "with every size but the first at least 1, got shape [2, 5, 8, 0]",
        qkv=torch.zeros(2, 5, 8, 0),
    ),
    wrong(
        "channels",
        ValueError,
        "qkv must have 3 * num_heads * D channels with num_heads=2, got 27",
        qkv=torch.zeros(2, 5, 8, 27),
    ),
    wrong(
        "heads_do_not_divide",
        ValueError,
        "qkv must have 3 * num_heads * D channels with num_heads=5, got 24",
        num_heads=5,
    ),
    wrong("heads_zero", ValueError, "num_heads must be at least 1, got 0", num_heads=0),
    wrong("heads_float", TypeError, "num_heads must be an int, got float", num_heads=2.0),
    wrong("heads_bool", TypeError, "num_heads must be an int, got bool", num_heads=True),
    wrong(
        "window_int", TypeError, "window must be a pair of ints (rows, columns), got 7", window=7
    ),
    wrong(
        "window_triple",
        ValueError,
        "window must be a pair of ints (rows, columns), got (7, 7, 7)",
        window=(7, 7, 7),
    ),
    wrong("window_zero", ValueError, "window[1] must be at least 1, got 0", window=(2, 0)),
    wrong("window_float", TypeError, "window[0] must be an int, got float", window=(2.0, 3)),
    wrong("shift_negative", ValueError, "shift[0] must be at least 0, got -1", shift=(-1, 0)),
    wrong("shift_bool", TypeError, "shift[1] must be an int, got bool", shift=(0, True)),
    wrong("shift_int", TypeError, "shift must be a pair of ints (rows, columns), got 1", shift=1),
    wrong(
        "shift_of_a_window",
        ValueError,
        "shift must be smaller than window (2, 3), got (1, 3)",
        shift=(1, 3),
    ),
    wrong(
        "table_list",
        TypeError,
        "bias_table must be a tensor [(2h-1)(2w-1), num_heads], got list",
        bias_table=[[0.0]],
    ),
    wrong(
        "table_rank",
        ValueError,
        "bias_table must be [(2h-1)(2w-1), num_heads], got shape [15]",
        bias_table=torch.zeros(15),
    ),
    wrong(
        "table_size",
        ValueError,
        "bias_table must be [(2h-1)(2w-1), num_heads] = [15, 2], got shape [169, 2]",
        bias_table=torch.zeros(169, 2),
    ),
    wrong(
        "table_heads",
        ValueError,
        "bias_table must be [(2h-1)(2w-1), num_heads] = [15, 2], got shape [15, 3]",
        bias_table=torch.zeros(15, 3),
    ),
    wrong(
        "table_dtype",
        TypeError,
        "bias_table must have the dtype of qkv, torch.float32, got torch.float64",
        bias_table=torch.zeros(15, 2, dtype=f64),
    ),
    wrong(
        "table_device",
        ValueError,
        "bias_table must be on the device of qkv, cpu, got meta",
        bias_table=torch.zeros(15, 2, device="meta"),
    ),
    wrong(
        "pad_size",
        ValueError,
        "pad_qkv must be [3C] = [24], got shape [8]",
        pad_qkv=torch.zeros(8),
    ),
    wrong(
        "pad_rank",
        ValueError,
        "pad_qkv must be [3C], got shape [1, 24]",
        pad_qkv=torch.zeros(1, 24),
    ),
    wrong(
        "pad_dtype",
        TypeError,
        "pad_qkv must have the dtype of qkv, torch.float32, got torch.bfloat16",
        pad_qkv=torch.zeros(24, dtype=torch.bfloat16),
    ),
    wrong(
        "pad_device",
        ValueError,
        "pad_qkv must be on the device of qkv, cpu, got meta",
        pad_qkv=torch.zeros(24, device="meta"),
    ),
    wrong("scale_text", TypeError, "scale must be a float or None, got str", scale="0.1"),
    wrong("scale_bool", TypeError, "scale must be a float or None, got bool", scale=True),
    wrong(
        "scale_tensor", TypeError, "scale must be a float or None, got Tensor", scale=torch.ones(())
    ),
    wrong("dropout_text", TypeError, "dropout_p must be a float, got str", dropout_p="0.1"),
    wrong("dropout_bool", TypeError, "dropout_p must be a float, got bool", dropout_p=True),
    wrong("dropout_negative", ValueError, "dropout_p must be in [0, 1), got -0.1", dropout_p=-0.1),
    wrong("dropout_one", ValueError, "dropout_p must be in [0, 1), got 1.0", dropout_p=1.0),
    wrong(
        "dropout_nan", ValueError, "dropout_p must be in [0, 1), got nan", dropout_p=float("nan")
    ),
    wrong(
        "backend_unknown",
        ValueError,
        "backend must be one of cuda, triton, cpu, reference, got 'gpu'",
        backend="gpu",
    ),
    wrong(
        "backend_cannot",
        ValueError,
        "backend 'cuda' cannot serve inner_patch_attention: "
        "inner_patch_attention has no cuda kernel in this version",
        backend="cuda",
    ),
]

CPSA_CASES = [
    wrong("list", TypeError, "x must be a tensor [B, H, W, C], got list", x=[1.0]),
    wrong(
        "rank", ValueError, "x must be [B, H, W, C], got shape [2, 40, 3]", x=torch.zeros(2, 40, 3)
    ),
    wrong(
        "dtype",
        TypeError,
        f"x must be {DENSE}, got torch.bool",
        x=torch.zeros(2, 5, 8, 3, dtype=torch.bool),
    ),
    wrong(
        "no_columns",
        ValueError,
        "x must be [B, H, W, C] with every size but the first at least 1, got shape [2, 5, 0, 3]",
        x=torch.zeros(2, 5, 0, 3),
    ),
    wrong(
        "qkv_weight_size",
        ValueError,
        "qkv_weight must be [3P, P] = [18, 6], got shape [6, 18]",
        qkv_weight=torch.zeros(6, 18),
    ),
    wrong(
        "qkv_weight_rank",
        ValueError,
        "qkv_weight must be [3P, P], got shape [3, 6, 6]",
        qkv_weight=torch.zeros(3, 6, 6),
    ),
    wrong(
        "qkv_weight_none",
        TypeError,
        "qkv_weight must be a tensor [3P, P], got NoneType",
        qkv_weight=None,
    ),
    wrong(
        "qkv_weight_dtype",
        TypeError,
        "qkv_weight must have the dtype of x, torch.float32, got torch.float64",
        qkv_weight=torch.zeros(18, 6, dtype=f64),
    ),
    wrong(
        "qkv_weight_device",
        ValueError,
        "qkv_weight must be on the device of x, cpu, got meta",
        qkv_weight=torch.zeros(18, 6, device="meta"),
    ),
    wrong(
        "qkv_bias_size",
        ValueError,
        "qkv_bias must be [3P] = [18], got shape [6]",
        qkv_bias=torch.zeros(6),
    ),
    wrong(
        "qkv_bias_dtype",
        TypeError,
        "qkv_bias must have the dtype of x, torch.float32, got torch.float16",
        qkv_bias=torch.zeros(18, dtype=torch.float16),
    ),
    wrong(
        "qkv_bias_device",
        ValueError,
        "qkv_bias must be on the device of x, cpu, got meta",
        qkv_bias=torch.zeros(18, device="meta"),
    ),
    wrong(
        "proj_weight_size",
        ValueError,
        "proj_weight must be [P, P] = [6, 6], got shape [18, 6]",
        proj_weight=torch.zeros(18, 6),
    ),
    wrong(
        "proj_weight_none",
        TypeError,
        "proj_weight must be a tensor [P, P], got NoneType",
        proj_weight=None,
    ),
    wrong(
        "proj_weight_dtype",
        TypeError,
        "proj_weight must have the dtype of x, torch.float32, got torch.float64",
        proj_weight=torch.zeros(6, 6, dtype=f64),
    ),
    wrong(
        "proj_weight_device",
        ValueError,
        "proj_weight must be on the device of x, cpu, got meta",
        proj_weight=torch.zeros(6, 6, device="meta"),
    ),
    wrong(
        "proj_bias_size",
        ValueError,
        "proj_bias must be [P] = [6], got shape [7]",
        proj_bias=torch.zeros(7),
    ),
    wrong(
        "proj_bias_dtype",
        TypeError,
        f"proj_bias must be {DENSE}, got torch.int64",
        proj_bias=torch.zeros(6, dtype=torch.int64),
    ),
    wrong(
        "proj_bias_device",
        ValueError,
        "proj_bias must be on the device of x, cpu, got meta",
        proj_bias=torch.zeros(6, device="meta"),
    ),
    wrong("patch_int", TypeError, "patch must be a pair of ints (rows, columns), got 7", patch=7),
    wrong(
        "patch_single",
        ValueError,
        "patch must be a pair of ints (rows, columns), got (7,)",
        patch=(7,),
    ),
    wrong("patch_zero", ValueError, "patch[0] must be at least 1, got 0", patch=(0, 3)),
    wrong("patch_text", TypeError, "patch[1] must be an int, got str", patch=(2, "3")),
    wrong("heads_zero", ValueError, "num_heads must be at least 1, got 0", num_heads=0),
    wrong("heads_bool", TypeError, "num_heads must be an int, got bool", num_heads=True),
    wrong(
        "heads_do_not_divide",
        ValueError,
        "num_heads must divide the pixels of a patch, 6, got 4",
        num_heads=4,
    ),
    wrong("scale_text", TypeError, "scale must be a float or None, got str", scale="1"),
    wrong("dropout_negative", ValueError, "dropout_p must be in [0, 1), got -1", dropout_p=-1),
    wrong("dropout_none", TypeError, "dropout_p must be a float, got NoneType", dropout_p=None),
    wrong(
        "backend_cannot",
        ValueError,
        "backend 'triton' cannot serve cross_patch_attention: "
        "cross_patch_attention has no triton kernel in this version",
        backend="triton",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), IPSA_CASES)
def test_inner_patch_attention(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = IPSA.tensors(f32, requires_grad=False) | IPSA.options
    with pytest.raises(error, match=re.escape(message)):
        inner_patch_attention(**good | arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), CPSA_CASES)
def test_cross_patch_attention(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = CPSA.tensors(f32, requires_grad=False) | CPSA.options
    with pytest.raises(error, match=re.escape(message)):
        cross_patch_attention(**good | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        wrong("dim", ValueError, "num_heads must divide dim, 8, got 3", num_heads=3),
        wrong("dim_zero", ValueError, "dim must be at least 1, got 0", dim=0),
        wrong("dim_float", TypeError, "dim must be an int, got float", dim=8.0),
        wrong(
            "window", TypeError, "window must be a pair of ints (rows, columns), got 7", window=7
        ),
        wrong(
            "shift",
            ValueError,
            "shift must be smaller than window (7, 7), got (7, 0)",
            shift=(7, 0),
        ),
        wrong("attn_drop", ValueError, "attn_drop must be in [0, 1), got 1.0", attn_drop=1.0),
        wrong("proj_drop", ValueError, "proj_drop must be in [0, 1), got 2", proj_drop=2),
    ],
)
def test_inner_patch_module(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        InnerPatchAttention(**{"dim": 8, "num_heads": 2} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        wrong(
            "heads",
            ValueError,
            "num_heads must divide the pixels of a patch, 49, got 2",
            num_heads=2,
        ),
        wrong("patch", ValueError, "patch[1] must be at least 1, got 0", patch=(7, 0)),
        wrong("attn_drop", TypeError, "attn_drop must be a float, got str", attn_drop="0"),
        wrong("proj_drop", ValueError, "proj_drop must be in [0, 1), got -0.5", proj_drop=-0.5),
    ],
)
def test_cross_patch_module(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        CrossPatchAttention(**arguments)


def test_a_list_is_a_pair() -> None:
    tensors = IPSA.tensors(f32, requires_grad=False)
    options = IPSA.options | {"window": [2, 3], "shift": [1, 2]}
    want = inner_patch_attention(**tensors, **IPSA.options)
    assert torch.equal(inner_patch_attention(**tensors, **options), want)


def test_an_int_is_a_scale() -> None:
    tensors = IPSA.tensors(f32, requires_grad=False)
    outs = [inner_patch_attention(**tensors, **IPSA.options, scale=scale) for scale in (1, 1.0)]
    assert torch.equal(*outs)
