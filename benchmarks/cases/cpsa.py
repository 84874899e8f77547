"""CPSA at the stages of CAT-S, projections included."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_ops import cross_patch_attention, flops
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.cases.case import Case, Maker, Variant, on, oracle
from xattn_ops.benchmarks.cases.shapes import Stage


def cpsa_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """Cross-patch attention, projections included."""
    make = Maker(dtype, direction)
    patch = stage.window
    length = patch[0] * patch[1]
    operands = (
        make(batch, stage.height, stage.width, stage.channels),
        make(3 * length, length, scale=length**-0.5),
        make(3 * length, scale=0.1),
        make(length, length, scale=length**-0.5),
        make(length, scale=0.1),
    )

    def fused(x: Tensor, *weights: Tensor) -> Tensor:
        return cross_patch_attention(x, *weights, patch=patch)

    eager = baselines.cpsa(baselines.attend_eager, patch)
    sdpa = baselines.cpsa(baselines.attend_sdpa, patch)
    tokens = (stage.height // patch[0]) * (stage.width // patch[1])
    return Case(
        operator="cpsa",
        shape=str(stage),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, operands, operands)},
        plain=on(operands, eager=eager, sdpa=sdpa),
        oracle=oracle(eager, operands),
        macs=batch * flops.cpsa(stage.height, stage.width, stage.channels, patch),
        dense_bytes=batch * stage.channels * tokens**2 * dtype.itemsize,
        tokens=stage.height * stage.width,
    )
