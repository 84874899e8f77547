"""Cases: the shapes and options of one call, and the tensors for it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xattn_ops import _library

# A build without kernels is a supported installation; test_backends.py fails where they should be.
native = pytest.mark.skipif(not _library.NATIVE, reason=f"no CPU kernels: {_library.REASON}")
BACKENDS = ["reference", "cpu"] if _library.NATIVE else ["reference"]
DENSE = "float32, bfloat16, float16 or float64"  # as messages put it
DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
    pytest.param(torch.float64, id="f64"),
]


@dataclass(frozen=True)
class Case:
    """One call: `function(**tensors, **options)`; the first tensor is an activation.

    zero: inputs on which nothing depends; their gradients are zero but for rounding.
    """

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    out_shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    zero: tuple[str, ...] = ()

    def tensors(self, dtype: torch.dtype, requires_grad: bool = True) -> dict[str, Tensor]:
        """Random inputs, the same for every dtype but for rounding; none is contiguous."""
        return {
            name: sliced(shape, name, dtype).requires_grad_(requires_grad)
            for name, shape in self.shapes.items()
        }

    def grad_out(self, dtype: torch.dtype) -> Tensor:
        return sliced(self.out_shape, "grad_out", dtype)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)


def sliced(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> Tensor:
    """A random tensor cut out of a larger one, so that no stride is that of a dense tensor.

    The values are rounded to bfloat16, so that every dtype but float16 holds the same ones.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn([size + 2 for size in shape], generator=generator).bfloat16().to(dtype)
    return whole[tuple(slice(1, size + 1) for size in shape)].detach()


def wrong(id: str, error: type[Exception], message: str, **arguments: Any) -> Any:
    """Arguments that a function must refuse, and what it must say."""
    return pytest.param(arguments, error, message, id=id)


def run(
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    grad_out: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    """The output and the gradient of every tensor, by name."""
    out = function(**tensors, **options)
    grads = torch.autograd.grad(out, list(tensors.values()), grad_out, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}
