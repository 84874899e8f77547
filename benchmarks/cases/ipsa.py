"""IPSA at the stages of CAT-S: the attention itself, and the module with its linears."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xattn_ops import InnerPatchAttention, flops, inner_patch_attention
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.baselines import Plain
from xattn_ops.benchmarks.cases.case import FORWARD, STEP, Case, Maker, Variant, oracle
from xattn_ops.benchmarks.cases.shapes import Stage


def ipsa_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """The attention itself: qkv and table in, [B, H, W, C] out."""
    make = Maker(dtype, direction)
    qkv = make(batch, stage.height, stage.width, 3 * stage.channels)
    table = make(*_table_shape(stage))

    def fused(qkv: Tensor, table: Tensor) -> Tensor:
        return inner_patch_attention(qkv, table, num_heads=stage.heads, window=stage.window)

    attention = flops.ipsa(stage.height, stage.width, stage.channels, stage.window)
    linears = 4 * stage.height * stage.width * stage.channels**2
    return Case(
        operator="ipsa",
        shape=str(stage),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, (qkv, table), (qkv, table))},
        plain=_ipsa_baselines(stage, direction, (qkv,), table, lambda core: core, flex=True),
        oracle=oracle(_table_ipsa(stage), (qkv, table)),
        macs=batch * (attention - linears),
        dense_bytes=_dense_bytes(stage, batch, dtype),
        tokens=stage.height * stage.width,
    )


def ipsa_module_case(stage: Stage, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """InnerPatchAttention with its two linears."""
    make = Maker(dtype, direction)
    x = make(batch, stage.height, stage.width, stage.channels)
    module = InnerPatchAttention(stage.channels, stage.heads, stage.window).to(dtype)
    with torch.no_grad():  # a fresh table is near zero: make the bias matter to the check
        module.relative_position_bias_table.copy_(make(*_table_shape(stage)))
    module.train(direction == STEP)
    linears = (module.qkv.weight, module.qkv.bias, module.proj.weight, module.proj.bias)
    table = module.relative_position_bias_table
    operands = (x, *linears, table)
    plain = _ipsa_baselines(stage, direction, (x, *linears), table, baselines.with_linears)
    return Case(
        operator="ipsa_module",
        shape=str(stage),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(module, (x,), operands)},
        plain=plain,
        oracle=oracle(baselines.with_linears(_table_ipsa(stage)), operands),
        macs=batch * flops.ipsa(stage.height, stage.width, stage.channels, stage.window),
        dense_bytes=_dense_bytes(stage, batch, dtype),
        tokens=stage.height * stage.width,
    )


def _ipsa_baselines(
    stage: Stage,
    direction: str,
    operands: tuple[Tensor, ...],
    table: Tensor,
    wrap: Callable[[Plain], Plain],
    *,
    flex: bool = False,
) -> dict[str, Variant]:
    """Forward: on a bias gathered beforehand, as a careful user would. A step: from the table."""
    if direction == FORWARD:
        index = baselines.relative_index(*stage.window)
        last = baselines.gather_bias(table.detach(), index).contiguous()
        formulation = baselines.ipsa_dense
    else:
        last, formulation = table, baselines.ipsa_table
    operands = (*operands, last)

    def variant(make_core: Callable[[Tensor], baselines.Core]) -> Variant:
        function = wrap(formulation(make_core, stage.heads, stage.window))
        return Variant(function, operands, operands)

    plain = {
        "eager": variant(baselines.eager_core),
        "sdpa": variant(baselines.sdpa_core),
        "compile": variant(baselines.eager_core).compiled(),
    }
    if flex and (direction == FORWARD or table.is_cuda):  # no backward on the CPU
        plain["flex"] = variant(baselines.flex_core).compiled()
    return plain


def _table_ipsa(stage: Stage) -> Plain:
    return baselines.ipsa_table(baselines.eager_core, stage.heads, stage.window)


def _table_shape(stage: Stage) -> tuple[int, int]:
    rows, columns = stage.window
    return (2 * rows - 1) * (2 * columns - 1), stage.heads


def _dense_bytes(stage: Stage, batch: int, dtype: torch.dtype) -> int:
    tokens = stage.window[0] * stage.window[1]
    units = batch * (stage.height * stage.width // tokens) * stage.heads
    return units * tokens**2 * dtype.itemsize
