"""The operators as the tests of PyTorch's rules see them: one small case and one module each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import cpsa, digest, ipsa
from support.cases import BACKENDS, Case
from xattn_ops import CrossPatchAttention, DigestAttention, InnerPatchAttention

OPERATORS = {"ipsa": ipsa.SMALL, "cpsa": cpsa.SMALL, "digest": digest.SMALL}
WITH_DROPOUT = {name: case.with_options(dropout_p=0.4) for name, case in OPERATORS.items()}


class DigestOnMap(nn.Module):
    """DigestAttention as a module of maps [B, 5, 8, 8]: makes the prefix token and the digests."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.module = DigestAttention(8, 2, (5, 8), 4, num_prefix_tokens=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([x.mean((1, 2))[:, None], x.flatten(1, 2)], 1)
        return self.module(tokens, tokens[:, 3::10])[:, 1:].unflatten(1, (5, 8))


MODULES: dict[str, Callable[..., nn.Module]] = {  # all take [B, 5, 8, 8]
    "ipsa": lambda **options: InnerPatchAttention(8, 2, (2, 3), (1, 2), **options),
    "cpsa": lambda **options: CrossPatchAttention((2, 3), **options),
    "digest": DigestOnMap,
}
OF_ONE_SIZE = {"digest"}  # modules with a parameter for each token of the map

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
