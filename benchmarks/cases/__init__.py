"""What is timed: the operators at the shapes of the models, whole blocks and whole models.

A case holds one problem in several variants that take the same operands: ours, the plain
formulations of `baselines`, and the plain one in float64 that says what is right.

shapes              the feature maps of the models
case                what a case is
ipsa, cpsa          CAT's operators
convrel, convpos    CoaT's
clsattn             CrossViT's
patched             timm's models before and after our patch
digest, merge       CabViT's
whole               blocks and models
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xattn_ops.benchmarks.cases.case import FORWARD, STEP, Case, Variant
from xattn_ops.benchmarks.cases.clsattn import clsattn_case
from xattn_ops.benchmarks.cases.convpos import convpos_case
from xattn_ops.benchmarks.cases.convrel import convrel_case, convrel_module_case
from xattn_ops.benchmarks.cases.cpsa import cpsa_case
from xattn_ops.benchmarks.cases.digest import digest_case
from xattn_ops.benchmarks.cases.ipsa import ipsa_case, ipsa_module_case
from xattn_ops.benchmarks.cases.merge import merge_case
from xattn_ops.benchmarks.cases.patched import check_timm, is_timm, timm_case
from xattn_ops.benchmarks.cases.shapes import (
    CABVIT,
    CABVIT_MERGE,
    CAT_SMALL,
    COAT,
    COAT_SMALL_SCALES,
    CROSSVIT_15,
    Grid,
    Merge,
    Stage,
    Tokens,
    WithDigests,
)
from xattn_ops.benchmarks.cases.whole import (
    OnGrid,
    cab_case,
    cabvit_block_case,
    check_model,
    coat_block_case,
    model_case,
)

__all__ = [
    "BLOCKS",
    "BUILDERS",
    "FORWARD",
    "MODELS",
    "OPERATORS",
    "SHAPES",
    "STEP",
    "SWEPT",
    "TIMM",
    "Case",
    "Grid",
    "Merge",
    "OnGrid",
    "Stage",
    "Tokens",
    "Variant",
    "WithDigests",
    "build",
    "check_model",
    "check_timm",
    "model_case",
]

BUILDERS: dict[str, Callable[[Any, int, torch.dtype, str], Case]] = {
    "ipsa": ipsa_case,
    "ipsa_module": ipsa_module_case,
    "cpsa": cpsa_case,
    "cab": cab_case,
    "convrel": convrel_case,
    "convrel_module": convrel_module_case,
    "convpos": convpos_case,
    "coat_block": coat_block_case,
    "digest": digest_case,
    "cabvit_block": cabvit_block_case,
    "merge": merge_case,
    "clsattn": clsattn_case,
}
SHAPES: dict[str, tuple[Any, ...]] = {
    "ipsa": CAT_SMALL,
    "ipsa_module": CAT_SMALL,
    "cpsa": CAT_SMALL,
    "cab": CAT_SMALL,
    "convrel": COAT,
    "convrel_module": COAT,
    "convpos": COAT,
    "coat_block": COAT_SMALL_SCALES,
    "digest": CABVIT,
    "cabvit_block": CABVIT,
    "merge": CABVIT_MERGE,
    "clsattn": CROSSVIT_15,
}
# argument of the command -> the cases, blocks and models that go with it
OPERATORS = {
    "ipsa": ("ipsa", "ipsa_module"),
    "cpsa": ("cpsa",),
    "convrel": ("convrel", "convrel_module"),
    "convpos": ("convpos",),
    "digest": ("digest",),
    "merge": ("merge",),
    "clsattn": ("clsattn",),
}
BLOCKS = {
    "ipsa": "cab",
    "cpsa": "cab",
    "convrel": "coat_block",
    "convpos": "coat_block",
    "digest": "cabvit_block",
    "merge": "cabvit_block",
}
_OF_COAT = ("coat_lite_small", "coat_mini")
MODELS = {
    "ipsa": ("cat_small",),
    "cpsa": ("cat_small",),
    "convrel": _OF_COAT,
    "convpos": _OF_COAT,
    "digest": ("cabvit_h_l2",),
    "merge": ("cabvit_h_l2",),
    "clsattn": ("crossvit_15",),
}
TIMM = ("swin_tiny_patch4_window7_224", "coat_lite_small", "crossvit_15_240")


# operators alone, whose shapes can be those of other image sizes
SWEPT = tuple(name for name in OPERATORS if hasattr(SHAPES[name][0], "at"))


def build(
    operator: str,
    stage: int,
    batch: int,
    dtype: torch.dtype,
    direction: str,
    device: str = "cpu",
    side: int | None = None,
) -> Case:
    """The case of one of the operator's `SHAPES`, or of a model or "timm/<model>", without any.

    A shape may have fewer images than `batch`. side: of the image that the shape is scaled to, for
    `SWEPT` operators; None: 224, as the shape stands.
    """
    with torch.device(device):
        if is_timm(operator):
            return timm_case(operator, batch, dtype, direction)
        if operator not in BUILDERS:
            return model_case(operator, batch, dtype, direction)
        shape = SHAPES[operator][stage]
        shape = shape if side is None else shape.at(side)
        return BUILDERS[operator](shape, batch, dtype, direction)
