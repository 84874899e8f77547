"""Digest attention and the CabViT block at the stages of the hybrid models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xattn_ops import digest_attention
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.baselines import Plain
from xattn_ops.benchmarks.cases.case import FORWARD, Case, Maker, Variant, oracle
from xattn_ops.benchmarks.cases.shapes import WithDigests

MakeCore = Callable[[Tensor], baselines.Core]


def digest_case(shape: WithDigests, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """The attention itself: qkv, keys and values of digests and both biases in, [B, N, C] out."""
    make = Maker(dtype, direction)
    qkv = make(batch, shape.tokens, 3 * shape.channels)
    digest_kv = make(batch, shape.digests, 2 * shape.channels)
    biases = make(shape.heads, shape.tokens), make(shape.heads, shape.digests)
    operands = (qkv, digest_kv, *biases)

    def fused(qkv: Tensor, digest_kv: Tensor, table: Tensor, digest_bias: Tensor) -> Tensor:
        heads, grid = shape.heads, shape.size
        return digest_attention(qkv, digest_kv, table, digest_bias, num_heads=heads, grid=grid)

    products = shape.tokens * (shape.tokens + shape.digests)
    return Case(
        operator="digest",
        shape=str(shape),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, operands, operands)},
        plain=_baselines(shape, direction, operands),
        oracle=oracle(_from_tables(baselines.eager_core, shape), operands),
        macs=2 * batch * products * shape.channels,
        dense_bytes=batch * shape.heads * products * dtype.itemsize,
        tokens=shape.tokens,
    )


def _from_tables(make_core: MakeCore, shape: WithDigests) -> Plain:
    return baselines.digest_table(make_core, shape.heads, shape.size)


def _baselines(
    shape: WithDigests, direction: str, operands: tuple[Tensor, ...]
) -> dict[str, Variant]:
    """Forward: on a bias gathered beforehand, as a careful user would. A step: from the tables."""
    if direction == FORWARD:
        index = baselines.offset_index(shape.size)
        table, digest_bias = operands[2:]
        dense = baselines.dense_digest_bias(table, digest_bias, index).detach()
        operands = (*operands[:2], dense)

    def variant(make_core: MakeCore) -> Variant:
        if direction == FORWARD:
            return Variant(baselines.digest_dense(make_core, shape.heads), operands, operands)
        return Variant(_from_tables(make_core, shape), operands, operands)

    eager, sdpa = variant(baselines.eager_core), variant(baselines.sdpa_core)
    return {
        "eager": eager,
        "sdpa": sdpa,
        "compile": eager.compiled(),
        "sdpa + compile": sdpa.compiled(),
    }
