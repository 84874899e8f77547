"""What a case is: one problem, computed in several ways on the same operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xattn_ops.benchmarks import baselines
from xattn_ops.benchmarks.baselines import Plain, Several
from xattn_ops.benchmarks.options import DIRECTIONS

FORWARD, STEP = DIRECTIONS


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. Leaves correspond, in order, between the variants of a case."""

    function: Plain | Several
    arguments: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def forward(self) -> tuple[Tensor, ...]:
        """Every output."""
        with torch.no_grad(), self.within():
            return self._outputs()

    def step(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every output and, of these gradients of theirs, the gradient of every leaf."""
        with self.within():
            outputs = self._outputs()
            gradients = torch.autograd.grad(outputs, self.leaves, grads)
            return (*(out.detach() for out in outputs), *gradients)

    def _outputs(self) -> tuple[Tensor, ...]:
        out = self.function(*self.arguments)
        return (out,) if isinstance(out, Tensor) else out

    def compiled(self) -> Variant:
        return replace(self, function=baselines.compiled(self.function))

    def in_float32(self) -> Variant:
        """The same on float32 copies of the arguments, results rounded to the dtype that came."""

        def function(*arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
            dtype = arguments[0].dtype
            out = self.function(*(t.float() for t in arguments))
            return out.to(dtype) if isinstance(out, Tensor) else tuple(t.to(dtype) for t in out)

        return replace(self, function=function)


Variants = dict[str, Variant]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark before it is measured."""

    operator: str
    shape: str
    batch: int
    dtype: torch.dtype
    direction: str
    ours: Variants  # the first is the row itself
    plain: Variants  # the first, "eager", sets the tolerance
    oracle: Variant  # float64
    macs: int  # of the paper's algorithm, forward, whole batch
    dense_bytes: int  # what an attention matrix of all units would take; 0 where it makes no sense
    tokens: int  # of one image; 0 where it makes no sense
    apart: tuple[str, ...] = ()  # plain ones that nobody writes, reported beside the best of others

    def baselines(self) -> Variants:
        """The plain formulations, and for short formats on the CPU the first one in float32 too:
        many processors multiply those formats slowly, and a user would know.

        Not where parameters lie inside the function: they keep their dtype.
        """
        first = next(iter(self.plain.values()))
        inside = {id(leaf) for leaf in first.leaves} - {id(t) for t in first.arguments}
        if self.device != "cpu" or self.dtype.itemsize != 2 or inside:
            return self.plain
        return {**self.plain, "float32": first.in_float32()}

    @property
    def device(self) -> str:
        """Type of the device that the operands lie on."""
        return next(iter(self.ours.values())).leaves[0].device.type

    @property
    def name(self) -> str:
        return f"{self.operator} {self.shape} B={self.batch}"


class Maker:
    """Reproducible normal operands; for a step they require gradients.

    They lie on torch's default device, so that `cases.build` alone says which, and are the same on
    every device.
    """

    def __init__(self, dtype: torch.dtype, direction: str) -> None:
        self.dtype = dtype
        self.requires_grad = direction == STEP
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device="cpu") * scale
        values = values.to(torch.get_default_device(), self.dtype)
        return values.requires_grad_(self.requires_grad)


def oracle(function: Plain | Several, operands: tuple[Tensor, ...]) -> Variant:
    """`function` on float64 copies of the operands."""
    exact = tuple(t.detach().double().requires_grad_() for t in operands)
    return Variant(function, exact, exact)


def on(
    operands: tuple[Tensor, ...], *, compile: str = "eager", **functions: Plain | Several
) -> Variants:
    """The functions as variants on the same operands, all of which are leaves.

    compile: which of them is a variant once more, under torch.compile: the one that gains most.
    """
    variants = {name: Variant(f, operands, operands) for name, f in functions.items()}
    return {**variants, "compile": variants[compile].compiled()}
