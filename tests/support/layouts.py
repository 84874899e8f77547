"""The layouts in memory under which every operator must give the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.cases import Case, Tensors, assert_same, leaves

# name -> the rank that it needs, and the same shape laid out so; expanded ones hold other values
LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "every_other": (1, lambda t: torch.stack([t, t + 1], -1)[..., 0]),
    "offset": (1, lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t)),
    "expanded_first": (1, lambda t: t[:1].expand_as(t)),
    "wider_rows": (2, lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]]),
    "last_strided": (2, lambda t: t.mT.contiguous().mT),
    "expanded_last": (2, lambda t: t[..., :1].expand_as(t)),
    "second_first": (3, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "first_last": (3, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)),
    "longer_second": (3, lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]]),
    "expanded_second": (3, lambda t: t[:, :1].expand_as(t)),
    "third_second": (4, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "last_second": (4, lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1)),
    "expanded_third": (4, lambda t: t[:, :, :1].expand_as(t)),
}
layouts = pytest.mark.parametrize("layout", list(LAYOUTS))


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t itself where its rank is too low for the layout."""
    rank, change = LAYOUTS[layout]
    return change(t) if t.dim() >= rank else t


def changed(
    case: Case, dtype: torch.dtype, layout: str, *names: str
) -> tuple[Tensors, list[Tensor]]:
    """The tensors and output gradients of a case, some laid out otherwise; no names: all."""
    given = case.tensors(dtype, requires_grad=False)
    tensors = {n: laid_out(t, layout) if n in names or not names else t for n, t in given.items()}
    grad_outs = [
        laid_out(g, layout) if not names or f"grad_{n}" in names else g
        for n, g in zip(case.outs, case.grad_outs(dtype), strict=True)
    ]
    return tensors, grad_outs


def check_as_dense(case: Case, tensors: Tensors, grad_outs: list[Tensor], backend: str) -> None:
    """The same numbers as from the same values in dense tensors."""
    dense = leaves({name: t.contiguous() for name, t in tensors.items()})
    want = case.run(dense, [g.contiguous() for g in grad_outs], backend=backend)
    assert_same(case.run(leaves(tensors), grad_outs, backend=backend), want)
