"""The operators, and how a test runs for each of them or for each of their cases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
from torch import Tensor

from support import clsattn, convpos, convrel, cpsa, digest, ipsa, merge
from support.cases import Case
from support.description import Description

OPERATORS: dict[str, Description] = {
    operator.name: operator
    for operator in (
        ipsa.DESCRIPTION,
        cpsa.DESCRIPTION,
        digest.DESCRIPTION,
        merge.DESCRIPTION,
        convrel.DESCRIPTION,
        convpos.DESCRIPTION,
        clsattn.DESCRIPTION,
    )
}
SMALL = {name: operator.small for name, operator in OPERATORS.items()}
WITH_DROPOUT = {
    name: operator.small.with_options(dropout_p=0.4)
    for name, operator in OPERATORS.items()
    if operator.dropout
}
MODULES = {name: operator.module for name, operator in OPERATORS.items()}

operators = pytest.mark.parametrize("op", list(OPERATORS))
droppers = pytest.mark.parametrize("op", list(WITH_DROPOUT))


def of(
    *fields: str,
    among: Iterable[str] = OPERATORS,
    few: bool = False,
    without: Collection[str] = (),
) -> pytest.MarkDecorator:
    """A test of (op, case): for each operator, each case in these fields of its description.

    among: the operators. few: only the cases that run under every ISA. without: ids, "op-case".
    """
    return pytest.mark.parametrize(
        ("op", "case"),
        [
            pytest.param(name, *given.values, id=f"{name}-{given.id}")
            for name in among
            for field in fields
            for given in getattr(OPERATORS[name], field)
            if not few or given.id in OPERATORS[name].isa
            if f"{name}-{given.id}" not in without
        ],
    )


def positional(
    case: Case, function: Callable[..., Any] | None = None, **options: Any
) -> tuple[Callable[..., Any], list[str]]:
    """The function of its tensors alone, by position, and their names.

    It returns a tensor, or a tuple of them where the operator has several outputs.
    """
    names = list(case.shapes)

    def call(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        outs = case.outputs(dict(zip(names, tensors, strict=True)), function, **options)
        return outs[0] if len(outs) == 1 else tuple(outs)

    return call, names
