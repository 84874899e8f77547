"""The operators as the tests of PyTorch's rules see them: one small case and one module each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import clsattn, convrel, cpsa, digest, ipsa
from support.cases import BACKENDS, Case
from xattn_ops import (
    ClsCrossAttention,
    ConvPositionEncoding,
    ConvRelativeAttention,
    CrossPatchAttention,
    DigestAttention,
    InnerPatchAttention,
)

OPERATORS = {
    "ipsa": ipsa.SMALL,
    "cpsa": cpsa.SMALL,
    "digest": digest.SMALL,
    "convrel": convrel.SMALL,
    "convpos": convrel.SMALL_POSITION,
    "clsattn": clsattn.SMALL,
}
WITH_DROPOUT = {
    name: OPERATORS[name].with_options(dropout_p=0.4)
    for name in ("ipsa", "cpsa", "digest", "clsattn")
}


class OnMap(nn.Module):
    """A module of tokens as one of maps [B, H, W, C]: puts a prefix token first, drops it after."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([x.mean((1, 2))[:, None], x.flatten(1, 2)], 1)
        grid = x.shape[1], x.shape[2]
        return self.attend(tokens, grid)[:, 1:].unflatten(1, grid)

    def attend(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.module(tokens, grid)


class OfCls(nn.Module):
    """A module of a CLS token and patches as one of maps: every pixel is what CLS takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        cls = x.mean((1, 2))[:, None]
        return self.module(cls, x.flatten(1, 2), self.norm)[:, None].expand(x.shape)


class DigestOnMap(OnMap):
    """DigestAttention, which has a size of its own, with some of the tokens as digests."""

    def __init__(self, **options: Any) -> None:
        super().__init__(DigestAttention(8, 2, (5, 8), 4, num_prefix_tokens=1, **options))

    def attend(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.module(tokens, tokens[:, 3::10])


MODULES: dict[str, Callable[..., nn.Module]] = {  # all take [B, 5, 8, 8]
    "ipsa": lambda **options: InnerPatchAttention(8, 2, (2, 3), (1, 2), **options),
    "cpsa": lambda **options: CrossPatchAttention((2, 3), **options),
    "digest": DigestOnMap,
    "convrel": lambda **options: OnMap(
        ConvRelativeAttention(8, 2, windows={3: 1, 5: 1}, **options)
    ),
    "convpos": lambda **options: OnMap(ConvPositionEncoding(8, **options)),
    "clsattn": lambda **options: OfCls(ClsCrossAttention(8, 2, **options)),
}
OF_ONE_SIZE = {"digest"}  # modules with a parameter for each token of the map

operators = pytest.mark.parametrize("op", list(OPERATORS))
droppers = pytest.mark.parametrize("op", list(WITH_DROPOUT))
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
