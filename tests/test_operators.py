"""Values, gradients, dropout, determinism, memory and modules: what holds for every operator.

What an operator is tested on stands in its description, tests/support/<operator>.py; what is
particular to one stands in tests/test_<operator>.py, layouts in memory in test_layouts.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import isa, peak
from support.cases import (
    BACKENDS,
    DTYPES,
    Case,
    assert_equal,
    assert_same,
    backends,
    dtypes,
    native,
    present,
    total,
)
from support.operators import (
    MODULES,
    OPERATORS,
    SMALL,
    WITH_DROPOUT,
    droppers,
    of,
    operators,
    positional,
)
from support.oracle import (
    check_against_float64,
    check_draws_against_float64,
    check_nan_stays_in_its_image,
)
from torch import Tensor

X = (2, 5, 8, 8)  # what every module takes


@backends
@dtypes
@of("cases")
def test_against_float64(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(case, dtype, backend)


@backends
@dtypes
@of("dropout")
def test_dropout_against_float64(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """The backward drops what the forward has dropped."""
    check_against_float64(case, dtype, backend, seed=5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from([param.values[0] for param in DTYPES]))
@operators
def test_random_cases(op: str, data: st.DataObject, dtype: torch.dtype) -> None:
    check_against_float64(data.draw(OPERATORS[op].random), dtype, BACKENDS[-1])


@backends
@pytest.mark.parametrize("dtype", DTYPES[:3])  # float64 could not judge itself here
@of("extreme")
def test_extreme_logits(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """The softmax subtracts its maximum: logits beyond the range of exp give right weights."""
    check_draws_against_float64(case, dtype, backend)


@operators
def test_cases_hold_what_every_operator_owes(op: str) -> None:
    """An empty batch, one image, several; optional tensors given and absent; some for every ISA."""
    described = OPERATORS[op]
    cases = {param.id: param.values[0] for param in [*described.cases, *described.dropout]}
    batches = {next(iter(case.shapes.values()))[0] for case in cases.values()}
    assert {0, 1, 2} <= batches
    assert len({frozenset(case.shapes) for case in cases.values()}) > 1
    assert set(described.isa) <= cases.keys()
    assert all(param.values[0].options["dropout_p"] > 0 for param in described.dropout)
    assert set(described.free_order) <= {*described.small.shapes, *described.small.outs}


@backends
@dtypes
@operators
def test_nan_stays_in_its_image(op: str, dtype: torch.dtype, backend: str) -> None:
    check_nan_stays_in_its_image(SMALL[op], dtype, backend)


# ------------------------------------------------------------------------- the reference itself


@of("defined")
def test_reference_is_the_definition(op: str, case: Case) -> None:
    tensors = case.tensors(torch.float64, requires_grad=False)
    want = present(OPERATORS[op].definition(case, tensors))
    torch.testing.assert_close(case.outputs(tensors, case.reference), want)


@operators
def test_reference_twice_differentiable(op: str) -> None:
    case = OPERATORS[op].twice
    function, _ = positional(case, case.reference)
    assert torch.autograd.gradgradcheck(function, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize("op", [name for name, operator in OPERATORS.items() if operator.half])
def test_scale_default(op: str, backend: str) -> None:
    case = OPERATORS[op].half
    tensors = case.tensors(torch.float64)
    outs = [case.outputs(tensors, scale=scale, backend=backend) for scale in (None, 0.5)]
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


# ------------------------------------------------------------------------------------- gradients


@backends
@of("gradcheck")
def test_gradcheck(op: str, case: Case, backend: str) -> None:
    function, _ = positional(case, backend=backend)

    def seeded(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        torch.manual_seed(3)
        return function(*tensors)

    assert torch.autograd.gradcheck(seeded, list(case.tensors(torch.float64).values()))


@backends
@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        pytest.param(op, name, id=f"{op}-{name}")
        for op, case in SMALL.items()
        for name in case.shapes
    ],
)
def test_gradient_of_one_input_alone(op: str, wanted: str, backend: str) -> None:
    case = SMALL[op]
    tensors, grad_outs = case.tensors(torch.float64), case.grad_outs(torch.float64)
    every = case.run(tensors, grad_outs, backend=backend)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    outs = zip(case.outputs(tensors, backend=backend), grad_outs, strict=True)
    torch.autograd.backward(*zip(*((o, g) for o, g in outs if o.requires_grad), strict=True))
    torch.testing.assert_close(tensors[wanted].grad, every[wanted])
    assert all(tensors[name].grad is None for name in tensors if name != wanted)


@backends
@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[-1]])
@of("strided")
def test_grad_out_of_a_sum(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """`.sum().backward()` hands over a single expanded one."""
    tensors = case.tensors(dtype)
    ones = [torch.ones(shape, dtype=dtype) for shape in case.outs.values()]
    dense = case.run(tensors, ones, backend=backend)
    total(case.outputs(tensors, backend=backend)).backward()
    assert_same({name: t.grad for name, t in tensors.items()}, {n: dense[n] for n in tensors})


# --------------------------------------------------------------------------------------- dropout


@droppers
@backends
def test_dropout_follows_manual_seed(op: str, backend: str) -> None:
    case, outs = WITH_DROPOUT[op], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(case.outputs(case.tensors(torch.float32), backend=backend)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@droppers
def test_backends_drop_the_same_weights(op: str) -> None:
    case, results = WITH_DROPOUT[op], []
    for backend in BACKENDS:
        torch.manual_seed(4)
        results.append(
            case.run(case.tensors(torch.float64), case.grad_outs(torch.float64), backend=backend)
        )
    for other in results[1:]:
        assert_same(other, results[0])


# ---------------------------------------------------------------------- determinism and memory


@backends
@dtypes
@of("steady")
def test_twice_bitwise_equal(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors, grad_outs, results = case.tensors(dtype), case.grad_outs(dtype), []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(case.run(tensors, grad_outs, backend=backend))
    assert_equal(*results)


@native
@pytest.mark.usefixtures("threads")
@dtypes
@of("steady")
def test_threads_agree(op: str, case: Case, dtype: torch.dtype) -> None:
    """Bit for bit, but for results that the description exempts: those to two units."""
    tensors, grad_outs, results = case.tensors(dtype), case.grad_outs(dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append(case.run(tensors, grad_outs, backend="cpu"))
    for name, one in results[0].items():
        free = name in OPERATORS[op].free_order
        unit = torch.finfo(dtype).eps * one.abs().max().item() if free else 0
        for other in results[1:]:
            torch.testing.assert_close(other[name], one, msg=name, rtol=0, atol=2 * unit)


@native
@pytest.mark.skipif(not peak.CLEAR.exists(), reason="needs Linux's /proc/self/clear_refs")
@operators
def test_peak_memory(op: str) -> None:
    """A training step takes its results and a little scratch: nothing of the size of N x N."""
    taken, results = peak.peak_of_step(op)
    assert results >= sum(
        4 * torch.Size(shape).numel() for shape in OPERATORS[op].large.outs.values()
    )
    assert taken < results + OPERATORS[op].scratch


@pytest.fixture(scope="module", params=isa.ISAS)
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    with isa.process(request.param) as process:
        if isa.answer(process) != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield process


@native
@operators
def test_every_isa(op: str, process: subprocess.Popen) -> None:
    failure = isa.answer(process, op)
    assert not failure, failure


# --------------------------------------------------------------------------------------- modules


@operators
@backends
def test_module_gradients_reach_every_parameter(op: str, backend: str) -> None:
    module = MODULES[op](backend=backend)
    module(torch.randn(X)).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert (p.grad.abs().max() > 1e-6) == (name not in OPERATORS[op].idle), name


drops = pytest.mark.parametrize(
    ("op", "drop"), [(op, drop) for op, operator in OPERATORS.items() for drop in operator.drops]
)


@drops
def test_module_dropout_in_training_alone(op: str, drop: str) -> None:
    module, x = MODULES[op](**{drop: 0.5}), torch.randn(X)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@drops
def test_module_dropout_follows_manual_seed(op: str, drop: str) -> None:
    module, x, outs = MODULES[op](**{drop: 0.5}), torch.randn(X), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(module(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
