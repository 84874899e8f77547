"""CabViT's token merge and enhancement at the stages of the models."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_ops import token_merge_enhance
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.cases.case import Case, Maker, Variant, on, oracle
from xattn_ops.benchmarks.cases.shapes import Merge

ENHANCE = 3  # window of the enhancement


def merge_case(shape: Merge, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """Two depthwise convolutions of the same tokens, one of them with a stride."""
    make, channels = Maker(dtype, direction), shape.channels
    operands = (
        make(batch, shape.tokens, channels),
        make(channels, 1, shape.window, shape.window, scale=1 / shape.window),
        make(channels, 1, ENHANCE, ENHANCE, scale=1 / ENHANCE),
        make(channels, scale=0.1),
    )

    def fused(
        x: Tensor, merge_weight: Tensor, enhance_weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        weights = merge_weight, enhance_weight, bias
        digests, enhanced = token_merge_enhance(x, *weights, grid=shape.size, stride=shape.stride)
        assert digests is not None
        return digests, enhanced

    eager = baselines.merge_eager(shape.size, shape.stride)
    nhwc = baselines.merge_nhwc(shape.size, shape.stride)
    taps = shape.digests * shape.window**2 + shape.tokens * ENHANCE**2
    return Case(
        operator="merge",
        shape=str(shape),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, operands, operands)},
        plain=on(operands, compile="nhwc", eager=eager, nhwc=nhwc),
        oracle=oracle(eager, operands),
        macs=batch * channels * taps,
        dense_bytes=0,
        tokens=shape.tokens,
    )
