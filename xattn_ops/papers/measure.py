"""Parameters and MACs of a model, in the ways in which the papers count them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xattn_ops import flops
from xattn_ops.models import create_model, list_models
from xattn_ops.models.layers import Mlp
from xattn_ops.papers.table import PLAIN, WITH_ELEMENTWISE, WITHOUT_EMBEDDINGS, Row

EMBEDDINGS = ("cls_token", "pos_embed")  # first part of a parameter's name


@dataclass(frozen=True)
class Measured:
    """Counts of one model on one image.

    embeddings: parameters of class tokens and position embeddings, among `params`.
    macs: of products and convolutions, padding included, as the paper's algorithm has them.
    normalised, activated: elements that leave LayerNorms and GELUs.
    """

    params: int
    embeddings: int
    macs: int
    normalised: int
    activated: int

    def params_on(self, basis: str = PLAIN) -> int:
        return self.params - (self.embeddings if basis == WITHOUT_EMBEDDINGS else 0)

    def macs_on(self, basis: str = PLAIN) -> int:
        if basis != WITH_ELEMENTWISE:
            return self.macs
        return self.macs + 5 * self.normalised + self.activated


def available(row: Row) -> bool:
    """Whether this version has the model of the row."""
    return row.model in list_models()


def side_of(name: str) -> int:
    """Side of the images that a model is for."""
    return 384 if name.endswith("_384") else 224


def measure(row: Row) -> Measured:
    """Count the model of a row, without memory for its weights."""
    return _measure(row.model, row.side, tuple(sorted(row.options.items())))


@functools.cache
def _measure(name: str, side: int, options: tuple[tuple[str, Any], ...]) -> Measured:
    model = on_meta(name, dict(options))
    named = [(key.split(".")[0], p.numel()) for key, p in model.named_parameters()]
    with _elements(model) as seen:
        macs = flops.count(model, (1, 3, side, side))[""]
    return Measured(
        params=sum(size for _, size in named),
        embeddings=sum(size for key, size in named if key in EMBEDDINGS),
        macs=macs,
        normalised=seen["normalised"],
        activated=seen["activated"],
    )


def on_meta(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model's shapes alone, on the references, whose products are the papers'."""
    with torch.device("meta"):
        return create_model(name, backend="reference", **options)


@contextmanager
def _elements(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count, while the model runs, what its LayerNorms and GELUs give."""
    seen = {"normalised": 0, "activated": 0}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, Mlp):  # its GELU is no module of its own
            hidden, width = module.fc1.out_features, module.fc1.in_features
            seen["activated"] += args[0].numel() // width * hidden
        else:
            kind = "normalised" if isinstance(module, nn.LayerNorm) else "activated"
            seen[kind] += output.numel()

    kinds = (nn.LayerNorm, nn.GELU, Mlp)
    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()
