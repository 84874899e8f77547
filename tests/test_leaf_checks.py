"""The second line of checks, behind a direct call of torch.ops: either backend refuses tensors that
do not belong together, before a kernel reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.emulator import emulated, emulator, module_name
from support.leaf_calls import Calls
from support.operators import SMALL, WITH_DROPOUT, operators
from torch import Tensor

from xattn_ops import _library

NAMESPACES = {"cpu": "xattn_ops", "cuda": module_name("plain")}
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not _library.NATIVE, reason="needs the native library"),
        ),
        pytest.param("cuda", marks=emulated),
    ],
)
ANY_CHANNELS = {("cpsa_fwd", "x")}  # each is a sequence of its own


def changed(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a tensor must not be, given the others."""
    yield "dtype", t.to(torch.float16 if t.is_floating_point() else torch.int32)
    if t.dim() > 0:
        yield "shape", t[..., :-1]


def leaf_calls(op: str, backend: str) -> list[tuple[Any, tuple[Any, ...], Any]]:
    """Those of a training step, with every optional tensor that the operator takes."""
    case = WITH_DROPOUT.get(op, SMALL[op])
    tensors, grad_outs = case.tensors(torch.float32), case.grad_outs(torch.float32)
    with Calls(NAMESPACES[backend]) as calls:
        case.run(tensors, grad_outs, backend=backend)
    return calls.seen


def refused(op: str, func: Any, args: tuple[Any, ...]) -> bool:
    """By the checks of the operator itself, not by something further down."""
    try:
        func(*args)
    except RuntimeError as error:
        return f"{op}: " in str(error) or "xattn_ops: " in str(error)
    return False


@backends
@operators
def test_what_does_not_belong_together_is_refused(op: str, backend: str) -> None:
    with emulator("plain") if backend == "cuda" else nullcontext():
        seen = leaf_calls(op, backend)
        names = [func._schema.name.split("::")[1] for func, _, _ in seen]
        assert names == [f"{op}_fwd", f"{op}_bwd"]
        for name, (func, args, _) in zip(names, seen, strict=True):
            for i, parameter in enumerate(func._schema.arguments):
                if not isinstance(args[i], Tensor):
                    continue
                for what, wrong in changed(args[i]):
                    if what == "shape" and (name, parameter.name) in ANY_CHANNELS:
                        continue
                    with_it = (*args[:i], wrong, *args[i + 1 :])
                    assert refused(op, func, with_it), f"{name}: {parameter.name}, {what}"


@backends
@operators
def test_grad_out_of_another_batch_is_refused(op: str, backend: str) -> None:
    with emulator("plain") if backend == "cuda" else nullcontext():
        func, args, _ = leaf_calls(op, backend)[1]
        assert refused(op, func, (torch.cat([args[0], args[0]]), *args[1:]))
