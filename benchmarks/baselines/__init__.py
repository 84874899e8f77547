"""The same operators as a user would write them in plain PyTorch: what the fused kernels must beat.

Each function takes the operands of its case and nothing else, so that it can be run as it is, put
through torch.compile and differentiated. CAT's maps here are whole windows (the models' shapes), so
no formulation pays for padding that it would not need.

ipsa, cpsa          CAT's operators
convrel, convpos    CoaT's
digest, merge       CabViT's
cabvit              its blocks
clsattn             CrossViT's
modules             our modules with the official formulations inside, for blocks and whole models
plain               what they share
"""

from xattn_ops.benchmarks.baselines.cabvit import (
    PlainCaBlock,
    PlainConvNeXtBlock,
    PlainConvNorm,
)
from xattn_ops.benchmarks.baselines.clsattn import CLS_EPS, cls_absorbed, cls_eager, cls_sdpa
from xattn_ops.benchmarks.baselines.convpos import convpos_eager, convpos_nhwc
from xattn_ops.benchmarks.baselines.convrel import convrel_eager, convrel_nhwc
from xattn_ops.benchmarks.baselines.cpsa import attend_eager, attend_sdpa, cpsa
from xattn_ops.benchmarks.baselines.digest import (
    dense_digest_bias,
    digest_dense,
    digest_table,
    offset_index,
)
from xattn_ops.benchmarks.baselines.ipsa import (
    Core,
    eager_core,
    flex_core,
    gather_bias,
    ipsa_dense,
    ipsa_table,
    relative_index,
    sdpa_core,
)
from xattn_ops.benchmarks.baselines.merge import merge_eager, merge_nhwc
from xattn_ops.benchmarks.baselines.modules import (
    PlainClsCross,
    PlainConvPosition,
    PlainConvRelative,
    PlainCrossPatch,
    PlainInnerPatch,
    convolutions_of,
    linears_of,
    plain_copy,
    plain_linears,
    with_linears,
)
from xattn_ops.benchmarks.baselines.plain import Plain, Several, compiled

__all__ = [
    "CLS_EPS",
    "Core",
    "Plain",
    "PlainCaBlock",
    "PlainClsCross",
    "PlainConvNeXtBlock",
    "PlainConvNorm",
    "PlainConvPosition",
    "PlainConvRelative",
    "PlainCrossPatch",
    "PlainInnerPatch",
    "Several",
    "attend_eager",
    "attend_sdpa",
    "cls_absorbed",
    "cls_eager",
    "cls_sdpa",
    "compiled",
    "convolutions_of",
    "convpos_eager",
    "convpos_nhwc",
    "convrel_eager",
    "convrel_nhwc",
    "cpsa",
    "dense_digest_bias",
    "digest_dense",
    "digest_table",
    "eager_core",
    "flex_core",
    "gather_bias",
    "ipsa_dense",
    "ipsa_table",
    "linears_of",
    "merge_eager",
    "merge_nhwc",
    "offset_index",
    "plain_copy",
    "plain_linears",
    "relative_index",
    "sdpa_core",
    "with_linears",
]
