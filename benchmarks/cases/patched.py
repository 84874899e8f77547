"""timm's models before and after `xattn_ops.integrations.timm.patch`."""

from __future__ import annotations

import copy
from types import ModuleType

import torch

from xattn_ops.benchmarks.cases.case import FORWARD, STEP, Case, Maker
from xattn_ops.benchmarks.cases.whole import compare_modules
from xattn_ops.integrations.timm import patch

PREFIX = "timm/"  # of a model's name where an operator's could stand


def is_timm(operator: str) -> bool:
    return operator.startswith(PREFIX)


def check_timm(name: str) -> None:
    """Raise ValueError unless timm is there and has such a model."""
    if not _timm().is_model(name):
        raise ValueError(f"timm has no model {name!r}; see timm.list_models()")


def timm_case(operator: str, batch: int, dtype: torch.dtype, direction: str) -> Case:
    """A classifier at its own image size, without stochastic depth: patched against as it was.

    Raises:
        ValueError: timm is missing, or no such model, or one that `patch` refuses.
    """
    name = operator.removeprefix(PREFIX)
    check_timm(name)
    torch.manual_seed(0)
    before = _timm().create_model(name, drop_path_rate=0.0)
    before.to(dtype).train(direction == STEP)
    after = copy.deepcopy(before)
    patch(after)
    channels, height, width = before.pretrained_cfg["input_size"]
    image = Maker(dtype, FORWARD)(batch, channels, height, width)
    return compare_modules(operator, f"{height}x{width}", after, before, image, direction)


def _timm() -> ModuleType:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
        raise ValueError(f"--timm needs timm, which cannot be imported: {error}") from error
    return timm
