"""The tolerance of the project: against float64, and against what PyTorch itself would err.

A result passes where its largest error is at most 2 times (gradients: 3 times) the error of the
reference in the same dtype, plus a floor for cases in which the reference happens to be exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.cases import Case, Tensors


def check_against_float64(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    seed: int = 0,
    tensors: Tensors | None = None,
    grad_outs: Sequence[Tensor] | None = None,
) -> None:
    """Forward and all gradients of one case.

    seed: of the dropout, where the case has some. tensors, grad_outs: others than the case's own.
    """
    tensors = tensors or case.tensors(dtype)
    grad_outs = grad_outs or case.grad_outs(dtype)
    results = _results(case, backend, seed, tensors, grad_outs)
    for name, exact in results["exact"].items():
        exact = torch.zeros_like(exact) if name in case.zero else exact
        times = 2 if name in case.outs else 3
        check_close(name, results["got"][name], results["formula"][name], exact, times)


def check_draws_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    """The same for the root mean square of the errors over several draws of the inputs.

    With logits of hundreds the largest error stands where two of them tie: there their last bits
    decide, the formula's as ours, so that one largest error says little about another.
    """
    draws = [
        _results(case, backend, 0, case.tensors(dtype, draw=d), case.grad_outs(dtype, d))
        for d in ("", " again", " once more", " finally")
    ]
    for name, shape in (case.outs | case.shapes).items():
        exact, formula, got = (
            torch.stack([draw[way][name].double() for draw in draws])
            for way in ("exact", "formula", "got")
        )
        if name in case.zero:
            exact = torch.zeros_like(exact)
        assert got.shape == (len(draws), *shape)
        times = 2 if name in case.outs else 3
        error, allowed = ((x - exact).square().mean().sqrt().item() for x in (got, formula))
        allowed = allowed * times + floor(dtype, exact)
        assert error <= allowed, f"{name}: error {error:.3g} is above {allowed:.3g}"  # NaN is not


def _results(
    case: Case, backend: str, seed: int, tensors: Tensors, grad_outs: Sequence[Tensor]
) -> dict[str, Tensors]:
    """The outputs and gradients, exact, by the formula in the same dtype, and by the backend."""
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    calls = {
        "exact": lambda: case.run(wide, [g.double() for g in grad_outs], case.reference),
        "formula": lambda: case.run(tensors, grad_outs, case.reference),
        "got": lambda: case.run(tensors, grad_outs, backend=backend),
    }
    results = {}
    for name, call in calls.items():
        torch.manual_seed(seed)  # the same dropout in all three
        results[name] = call()
    return results


def check_close(name: str, got: Tensor, formula: Tensor, exact: Tensor, times: int = 2) -> None:
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
    allowed = allowed * times + floor(got.dtype, exact[keep])
    worst = error.max().item()
    where = keep.nonzero()[error.argmax()].tolist()
    assert worst <= allowed, f"{name}{where}: error {worst:.3g} is above {allowed:.3g}"


def check_nan_stays_in_its_image(case: Case, dtype: torch.dtype, backend: str) -> None:
    """NaN in the second image of the activation leaves the first one's results as they are."""
    tensors = case.tensors(dtype, requires_grad=False)
    clean = case.outputs(tensors, backend=backend)
    next(iter(tensors.values()))[1] = torch.nan
    for out, before in zip(case.outputs(tensors, backend=backend), clean, strict=True):
        assert torch.equal(out[0], before[0])
        assert out[1].isnan().any()


def floor(dtype: torch.dtype, exact: Tensor) -> float:
    """A few units in the last place of the largest value.

    float64 judges itself, so it needs dozens; float32 needs 4 where sums happen to round well in
    the reference; for the short formats one unit is large already.
    """
    units = {torch.float64: 64, torch.float32: 4}.get(dtype, 1)
    return units * torch.finfo(dtype).eps * exact.abs().max().item()
