"""The operators as the tests of PyTorch's rules see them: one small case and one module each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support import cpsa, ipsa
from support.cases import BACKENDS, Case
from xattn_ops import CrossPatchAttention, InnerPatchAttention

OPERATORS = {"ipsa": ipsa.SMALL, "cpsa": cpsa.SMALL}
WITH_DROPOUT = {name: case.with_options(dropout_p=0.4) for name, case in OPERATORS.items()}
MODULES = {
    "ipsa": lambda **options: InnerPatchAttention(8, 2, (2, 3), (1, 2), **options),
    "cpsa": lambda **options: CrossPatchAttention((2, 3), **options),
}

operators = pytest.mark.parametrize("op", list(OPERATORS))
backends = pytest.mark.parametrize("backend", BACKENDS)


def positional(case: Case, **options: Any) -> tuple[Callable[..., Tensor], list[str]]:
    """The function of its tensors alone, by position, and their names."""
    names = list(case.shapes)

    def function(*tensors: Tensor) -> Tensor:
        return case.function(**dict(zip(names, tensors, strict=True)), **case.options, **options)

    return function, names


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )
