"""Our modules with the official formulations inside, for blocks and whole models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from xattn_ops import (
    ClsCrossAttention,
    ConvPositionEncoding,
    ConvRelativeAttention,
    CrossPatchAttention,
    InnerPatchAttention,
    _linear,
)
from xattn_ops.benchmarks.baselines.cabvit import PLAIN_CABVIT
from xattn_ops.benchmarks.baselines.clsattn import cls_eager
from xattn_ops.benchmarks.baselines.convpos import convpos_eager
from xattn_ops.benchmarks.baselines.convrel import convrel_eager
from xattn_ops.benchmarks.baselines.cpsa import attend_eager, cpsa
from xattn_ops.benchmarks.baselines.ipsa import eager_core, ipsa_table
from xattn_ops.benchmarks.baselines.plain import Plain


def with_linears(core: Plain) -> Plain:
    """A core on (qkv, rest...) between the two linears of its module.

    Takes (x, qkv_weight, qkv_bias, proj_weight, proj_bias, rest...).
    """

    def module(
        x: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        return F.linear(core(F.linear(x, qkv_weight, qkv_bias), *rest), proj_weight, proj_bias)

    return module


class PlainInnerPatch(InnerPatchAttention):
    """IPSA as the official code has it; takes over a module that `plain_copy` made."""

    formulation: Plain

    def prepare(self) -> None:
        core = ipsa_table(eager_core, self.num_heads, self.window)
        self.formulation = with_linears(core)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.formulation(x, *linears_of(self), self.relative_position_bias_table)


class PlainCrossPatch(CrossPatchAttention):
    """CPSA, likewise."""

    formulation: Plain

    def prepare(self) -> None:
        self.formulation = cpsa(attend_eager, self.patch)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.formulation(x, *linears_of(self))


class PlainConvRelative(ConvRelativeAttention):
    """Conv-relative attention, likewise."""

    def prepare(self) -> None:
        """Nothing: the formulation depends on the grid of the call."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        core = convrel_eager(self.num_heads, grid, self.num_prefix_tokens)
        return with_linears(core)(x, *linears_of(self), *convolutions_of(self))


class PlainConvPosition(ConvPositionEncoding):
    """The conv position encoding, likewise."""

    def prepare(self) -> None:
        """Nothing, likewise."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        plain = convpos_eager(grid, self.num_prefix_tokens)
        return plain(x, self.proj.weight, self.proj.bias)


class PlainClsCross(ClsCrossAttention):
    """CLS cross attention, likewise: the norm, if there is one, has CrossViT's eps."""

    def prepare(self) -> None:
        """Nothing, likewise."""

    def forward(
        self, cls_token: Tensor, patches: Tensor, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        layers = (self.wq, self.wk, self.wv, *(() if norm is None else (norm,)))
        weights = [t for layer in layers for t in (layer.weight, layer.bias)]
        out = cls_eager(self.num_heads)(cls_token, patches, *weights)
        return F.linear(out, self.proj.weight, self.proj.bias)


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    InnerPatchAttention: PlainInnerPatch,
    CrossPatchAttention: PlainCrossPatch,
    ConvRelativeAttention: PlainConvRelative,
    ConvPositionEncoding: PlainConvPosition,
    ClsCrossAttention: PlainClsCross,
    **PLAIN_CABVIT,
}


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a block or model with every operator in the official formulation.

    Run it within `plain_linears`, or the other linears stay the library's.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
            module.prepare()  # type: ignore[operator]
    return twin


def linears_of(module: nn.Module) -> tuple[Tensor, ...]:
    """Weight and bias of `qkv`, then of `proj`."""
    assert isinstance(module.qkv, nn.Linear)
    assert isinstance(module.proj, nn.Linear)
    return module.qkv.weight, module.qkv.bias, module.proj.weight, module.proj.bias


def convolutions_of(module: ConvRelativeAttention) -> tuple[Tensor, ...]:
    """Weights, then biases, of the relative term, which must be there."""
    assert module.crpe is not None
    weights, biases = module.crpe.tensors()
    return (*weights, *biases)


@contextmanager
def plain_linears() -> Iterator[None]:
    """Let the models' linears and MLPs be F.linear and F.gelu, as the official code has them."""
    before = _linear.PLAIN
    _linear.PLAIN = True
    try:
        yield
    finally:
        _linear.PLAIN = before
