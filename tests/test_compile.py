"""`torch.compile` and `torch.export` of every operator, forward and backward."""

from typing import Any

import pytest
import torch
from support.cases import Case, assert_same, backends, leaves, native
from support.operators import (
    MODULES,
    OPERATORS,
    SMALL,
    WITH_DROPOUT,
    droppers,
    operators,
)

from xattn_ops import _library


def compiled_run(case: Case, backend: str, compiler: Any, **options: Any) -> tuple[dict, dict]:
    """Results of the compiled and of the plain function."""
    tensors, grad_outs = case.tensors(torch.float32), case.grad_outs(torch.float32)
    compiled = torch.compile(case.function, fullgraph=True, backend=compiler, **options)
    got = case.run(tensors, grad_outs, compiled, backend=backend)
    return got, case.run(tensors, grad_outs, backend=backend)


@pytest.mark.usefixtures("fresh_compiler")
@operators
@backends
def test_compile(op: str, backend: str) -> None:
    assert_same(*compiled_run(SMALL[op], backend, "aot_eager"))


@native
@pytest.mark.usefixtures("fresh_compiler")
@operators
def test_compile_with_inductor(op: str) -> None:
    assert_same(*compiled_run(SMALL[op], "cpu", "inductor"))


@pytest.mark.usefixtures("fresh_compiler")
@operators
@backends
def test_compile_without_gradients(op: str, backend: str) -> None:
    case = SMALL[op]
    tensors = case.tensors(torch.float32, requires_grad=False)
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    got = case.outputs(tensors, compiled, backend=backend)
    torch.testing.assert_close(got, case.outputs(tensors, backend=backend))


@pytest.mark.usefixtures("fresh_compiler")
@droppers
@backends
def test_compile_with_dropout(op: str, backend: str) -> None:
    """The seed is a tensor in the graph: every call drops anew, and manual_seed reproduces it."""
    case = WITH_DROPOUT[op]
    tensors = case.tensors(torch.float32)
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    outs = []
    for function, seed in [(compiled, 1), (compiled, 1), (compiled, 2), (case.function, 1)]:
        torch.manual_seed(seed)
        outs += case.outputs(tensors, function, backend=backend)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[0], outs[3])
    torch.autograd.backward(outs[0].sum())
    assert all(t.grad is not None for t in tensors.values())


@native
@pytest.mark.usefixtures("fresh_compiler")
@operators
def test_compile_dynamic_shapes(op: str) -> None:
    """One graph for any batch and any map."""
    function = SMALL[op].function
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes, stance in [((10, 9, 11), "default"), ((5, 4, 12), "fail_on_recompile")]:
        case = OPERATORS[op].of_size(*sizes)
        given = case.tensors(torch.float32, requires_grad=False)
        tensors = leaves({name: t.contiguous() for name, t in given.items()})
        grad_outs = case.grad_outs(torch.float32)
        with torch.compiler.set_stance(stance):
            got = case.run(tensors, grad_outs, compiled, backend="cpu")
        assert_same(got, case.run(tensors, grad_outs, backend="cpu"))


@pytest.mark.usefixtures("fresh_compiler", "no_native")
@operators
def test_compile_with_a_fallback(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning comes while the function is traced and does not break the graph."""
    monkeypatch.setattr("xattn_ops._backend._warned", set())
    case = SMALL[op]
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="falls back to the PyTorch reference"):
        outs = case.outputs(case.tensors(torch.float32), compiled)
    assert [out.shape for out in outs] == list(case.outs.values())


@pytest.mark.usefixtures("fresh_compiler")
@operators
def test_compile_module(op: str) -> None:
    module, x = MODULES[op](), torch.randn(2, 5, 8, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    got = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    module(x).sum().backward()
    assert_same(got, {name: p.grad for name, p in module.named_parameters()}, rtol=1e-4, atol=1e-4)


@operators
@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_export(op: str, strict: bool) -> None:
    module, x = MODULES[op]().eval(), torch.randn(2, 5, 8, 8)
    program = torch.export.export(module, (x,), strict=strict)
    if _library.NATIVE:
        assert f"xattn_ops.{op}_fwd.default" in str(program)
    torch.testing.assert_close(program.module()(x), module(x))


@operators
def test_export_dynamic_shapes(op: str) -> None:
    module = MODULES[op]().eval()
    names = ["batch"] if OPERATORS[op].one_size else ["batch", "rows", "columns"]
    sizes = {axis: torch.export.Dim(name) for axis, name in enumerate(names)}
    program = torch.export.export(module, (torch.randn(2, 5, 8, 8),), dynamic_shapes=(sizes,))
    x = torch.randn(3, 5, 8, 8) if OPERATORS[op].one_size else torch.randn(3, 7, 13, 8)
    torch.testing.assert_close(program.module()(x), module(x))
