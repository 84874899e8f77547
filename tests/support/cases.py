"""Cases: the shapes and options of one call, and the tensors for it."""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_ops import _library

# A build without kernels is a supported installation; test_backends.py fails where they should be.
native = pytest.mark.skipif(not _library.NATIVE, reason=f"no CPU kernels: {_library.REASON}")
# Triton kernels on the tensors of these tests, which are on the CPU.
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter: Triton installed, and no GPU on which kernels run",
)
BACKENDS = ["reference", "cpu"] if _library.NATIVE else ["reference"]
DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
    pytest.param(torch.float64, id="f64"),
]
backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call: `function(**tensors, **options)`; the first tensor is an activation.

    outs: the shape of each output, in order; those that the call leaves None are not among them.
    zero: inputs on which nothing depends; their gradients are zero but for rounding.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    outs: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    zero: tuple[str, ...] = ()

    def tensors(self, dtype: torch.dtype, requires_grad: bool = True, draw: str = "") -> Tensors:
        """Random inputs, the same for every dtype but for rounding; none is contiguous.

        draw: names another draw of them.
        """
        return {
            name: sliced(shape, name + draw, dtype).requires_grad_(requires_grad)
            for name, shape in self.shapes.items()
        }

    def grad_outs(self, dtype: torch.dtype, draw: str = "") -> list[Tensor]:
        """A random gradient of each output."""
        return [sliced(shape, f"grad_{name}{draw}", dtype) for name, shape in self.outs.items()]

    def with_options(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)

    def outputs(
        self, tensors: Tensors, function: Callable[..., Any] | None = None, **options: Any
    ) -> list[Tensor]:
        """What the call gives, less what it leaves None; function: another than the case's own."""
        given = self.options | options
        return present((self.function if function is None else function)(**tensors, **given))

    def run(
        self,
        tensors: Tensors,
        grad_outs: Sequence[Tensor],
        function: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Tensors:
        """The outputs and the gradient of every tensor, by name."""
        outs = self.outputs(tensors, function, **options)
        inputs = list(tensors.values())
        grads = torch.autograd.grad(outs, inputs, list(grad_outs), materialize_grads=True)
        named = zip(self.outs, (out.detach() for out in outs), strict=True)
        return dict(named) | dict(zip(tensors, grads, strict=True))


def present(result: Tensor | Iterable[Tensor | None]) -> list[Tensor]:
    """The tensors of what a function returns: one, or several of which some may be None."""
    several = [result] if isinstance(result, Tensor) else result
    return [out for out in several if out is not None]


def total(result: Tensor | Iterable[Tensor | None], power: int = 1) -> Tensor:
    """The sum of all that a function returns, or of a power of it: something to differentiate."""
    return torch.stack([out.pow(power).sum() for out in present(result)]).sum()


def leaves(tensors: Tensors) -> Tensors:
    """The same tensors, in the same memory, as leaves that ask for gradients."""
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def sliced(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> Tensor:
    """A random tensor cut out of a larger one, so that no stride is that of a dense tensor.

    The values are rounded to bfloat16, so that every dtype but float16 holds the same ones.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn([size + 2 for size in shape], generator=generator).bfloat16().to(dtype)
    return whole[tuple(slice(1, size + 1) for size in shape)].detach()


def assert_same(got: Tensors, want: Tensors, **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def assert_equal(got: Tensors, want: Tensors) -> None:
    """Bit for bit."""
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
