"""CLS-query cross attention at the branches of CrossViT, projections and LayerNorm included."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn_ops import cls_cross_attention
from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.cases.case import Case, Maker, Variant, on, oracle
from xattn_ops.benchmarks.cases.shapes import Tokens

K_BIAS = 5  # among the operands: the absorbed form, which it does not change, leaves it out


def clsattn_case(tokens: Tokens, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A CLS token and the other branch's patches, the weights of q, k, v and the norm.

    The usual formulations project every token to k and v; "absorbed", which never does, is reported
    apart. macs are the absorbed form's: counted by the paper's equation, the kernels would stand
    far above the roofline.
    """
    make = Maker(dtype, direction)
    patches, channels, heads = tokens.patches, tokens.channels, tokens.heads
    operands = [make(batch, 1, channels), make(batch, patches, channels)]
    for _ in ("q", "k", "v"):
        operands.append(make(channels, channels, scale=channels**-0.5))
        operands.append(make(channels, scale=0.1))
    operands += [make(channels), make(channels, scale=0.1)]  # of the norm

    def fused(cls_token: Tensor, patches: Tensor, *weights: Tensor) -> Tensor:
        *projections, norm_weight, norm_bias = weights
        return cls_cross_attention(
            cls_token,
            patches,
            *projections,  # type: ignore[arg-type]
            num_heads=heads,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=baselines.CLS_EPS,
        )

    given = tuple(operands)
    eager = baselines.cls_eager(heads)
    plain = on(given, eager=eager, sdpa=baselines.cls_sdpa(heads))
    read = (*given[:K_BIAS], *given[K_BIAS + 1 :])
    plain["absorbed"] = Variant(baselines.cls_absorbed(heads), given, read)
    return Case(
        operator="clsattn",
        shape=str(tokens),
        batch=batch,
        dtype=dtype,
        direction=direction,
        ours={"fused": Variant(fused, given, given)},
        plain=plain,
        oracle=oracle(eager, given),
        macs=batch * (3 * channels**2 + 2 * heads * (1 + patches) * channels),
        dense_bytes=0,
        tokens=1 + patches,
        apart=("absorbed",),
    )
