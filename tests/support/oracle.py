"""The tolerance of the project: against float64, and against what PyTorch itself would err.

A result passes where its largest error is at most 2 times (gradients: 3 times) the error of the
reference in the same dtype, plus a floor for cases in which the reference happens to be exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.cases import Case, run


def check_against_float64(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    seed: int | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Forward and all gradients of one case.

    seed: of the dropout, where the case has some. tensors: other inputs than the case's own.
    """
    tensors, grad_out = tensors or case.tensors(dtype), case.grad_out(dtype)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    calls: dict[str, Any] = {
        "exact": lambda: run(case.reference, wide, grad_out.double(), **case.options),
        "formula": lambda: run(case.reference, tensors, grad_out, **case.options),
        "got": lambda: run(case.function, tensors, grad_out, backend=backend, **case.options),
    }
    results = {}
    for name, call in calls.items():
        torch.manual_seed(0 if seed is None else seed)  # the same dropout in all three
        results[name] = call()
    for name, exact in results["exact"].items():
        exact = torch.zeros_like(exact) if name in case.zero else exact
        check_close(name, results["got"][name], results["formula"][name], exact)


def check_close(name: str, got: Tensor, formula: Tensor, exact: Tensor) -> None:
    """One tensor under the tolerance; infinities and NaN must stand in the same places."""
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, not {exact.shape}"
    assert got.dtype == formula.dtype, f"{name}: dtype {got.dtype}, not {formula.dtype}"
    if exact.numel() == 0:
        return
    strange = ~got.isfinite()
    assert torch.equal(strange, ~formula.isfinite()), f"{name}: not finite at {strange.nonzero()}"
    keep = ~strange
    if not keep.any():
        return
    error = ((got.double() - exact)[keep]).abs()
    allowed = ((formula.double() - exact)[keep]).abs().max().item()
    allowed = allowed * (2 if name == "out" else 3) + floor(got.dtype, exact[keep])
    worst = error.max().item()
    where = keep.nonzero()[error.argmax()].tolist()
    assert worst <= allowed, f"{name}{where}: error {worst:.3g} is above {allowed:.3g}"


def floor(dtype: torch.dtype, exact: Tensor) -> float:
    """A few units in the last place of the largest value.

    float64 judges itself, so it needs dozens; float32 needs 4 where sums happen to round well in
    the reference; for the short formats one unit is large already.
    """
    units = {torch.float64: 64, torch.float32: 4}.get(dtype, 1)
    return units * torch.finfo(dtype).eps * exact.abs().max().item()
