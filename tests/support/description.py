"""What the generic tests know of an operator: its cases, its definition, its module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis.strategies import SearchStrategy
from torch import nn

from support.cases import Case, Tensors


@dataclass(frozen=True)
class Description:
    """One operator, as tests/test_operators.py and the tests of PyTorch's rules take it.

    Lists hold `pytest.param(case, id=...)`; `support.operators.of` makes tests of them.
    """

    name: str  # of the leaf ops <name>_fwd and <name>_bwd, and in the tests' ids
    small: Case  # with every tensor, two images, and sizes that fit no vector or window

    cases: list[Any]  # against float64, in every dtype; an empty batch among them
    random: SearchStrategy[Case]  # the same, drawn by Hypothesis
    isa: list[str]  # ids of those above that run under each instruction set
    definition: Callable[[Case, Tensors], Any]  # by loops; shares nothing with the reference
    defined: list[Any]  # small enough for those loops
    gradcheck: list[Any]  # smaller still
    twice: Case  # and this for the second derivatives of the reference
    strided: list[Any]  # under every layout in memory
    steady: list[Any]  # large enough to be shared out over threads
    large: Case  # where what is never formed would outweigh all else
    scratch: int  # bytes that a training step of it may take beyond its results

    module: Callable[..., nn.Module]  # of options -> takes a map [B, 5, 8, 8]
    of_size: Callable[[int, int, int], Case]  # of batch, rows, columns

    dropout: list[Any] = field(default_factory=list)  # as `cases`, with dropout_p
    half: Case | None = None  # one whose scale is 1/2 by default
    extreme: list[Any] = field(default_factory=list)  # with logits of hundreds
    free_order: tuple[str, ...] = ()  # results whose rounding depends on the number of threads
    drops: tuple[str, ...] = ()  # options of the module that drop something in training
    idle: tuple[str, ...] = ()  # parameters of the module on which nothing depends
    unemulated: tuple[str, ...] = ()  # ids that would take the emulator of CUDA kernels too long
    one_size: bool = False  # the module has a parameter for each token of the map


def param(build: Callable[..., Case]) -> Callable[..., Any]:
    """`build` with an id before its arguments: a case as pytest takes it."""

    def case(id: str, *args: Any, **kwargs: Any) -> Any:
        return pytest.param(build(*args, **kwargs), id=id)

    return case
