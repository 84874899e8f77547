"""Every operator under every layout in memory, of each input, of its gradients and of all."""

from __future__ import annotations

import pytest
import torch
from support.cases import Case, backends, native
from support.layouts import LAYOUTS, changed, check_as_dense, layouts
from support.operators import OPERATORS, of

ONE_CHANGED = [
    pytest.param(op, name, layout, id=f"{op}-{name}-{layout}")
    for op, operator in OPERATORS.items()
    for case in [operator.strided[0].values[0]]
    for name, shape in [*case.shapes.items(), *((f"grad_{n}", s) for n, s in case.outs.items())]
    for layout, (rank, _) in LAYOUTS.items()
    if rank <= len(shape)
]


@backends
@pytest.mark.parametrize(("op", "name", "layout"), ONE_CHANGED)
def test_one_laid_out_otherwise(op: str, name: str, layout: str, backend: str) -> None:
    case = OPERATORS[op].strided[0].values[0]
    check_as_dense(case, *changed(case, torch.float64, layout, name), backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [  # how the reference rounds a short format depends on the strides
        pytest.param("reference", torch.float64, id="reference"),
        pytest.param("cpu", torch.float64, id="cpu-f64", marks=native),
        pytest.param("cpu", torch.float32, id="cpu-f32", marks=native),
        pytest.param("cpu", torch.bfloat16, id="cpu-bf16", marks=native),
    ],
)
@layouts
@of("strided")
def test_all_laid_out_otherwise(
    op: str, case: Case, layout: str, dtype: torch.dtype, backend: str
) -> None:
    check_as_dense(case, *changed(case, dtype, layout), backend)


@backends
@layouts
@of("strided")
def test_outputs_are_contiguous(op: str, case: Case, layout: str, backend: str) -> None:
    tensors, _ = changed(case, torch.float32, layout)
    assert all(out.is_contiguous() for out in case.outputs(tensors, backend=backend))
