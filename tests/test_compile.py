"""`torch.compile` and `torch.export` of every operator, forward and backward."""

from typing import Any

import pytest
import torch
from support import clsattn, convrel, cpsa, digest, ipsa
from support.cases import Case, native, run
from support.operators import (
    MODULES,
    OF_ONE_SIZE,
    OPERATORS,
    WITH_DROPOUT,
    assert_same,
    backends,
    droppers,
    operators,
)

from xattn_ops import _library


def compiled_run(case: Case, backend: str, compiler: Any, **options: Any) -> tuple[dict, dict]:
    """Results of the compiled and of the plain function."""
    tensors, grad_out = case.tensors(torch.float32), case.grad_out(torch.float32)
    compiled = torch.compile(case.function, fullgraph=True, backend=compiler, **options)
    got = run(compiled, tensors, grad_out, backend=backend, **case.options)
    return got, run(case.function, tensors, grad_out, backend=backend, **case.options)


@pytest.mark.usefixtures("fresh_compiler")
@operators
@backends
def test_compile(op: str, backend: str) -> None:
    assert_same(*compiled_run(OPERATORS[op], backend, "aot_eager"))


@native
@pytest.mark.usefixtures("fresh_compiler")
@operators
def test_compile_with_inductor(op: str) -> None:
    assert_same(*compiled_run(OPERATORS[op], "cpu", "inductor"))


@pytest.mark.usefixtures("fresh_compiler")
@operators
@backends
def test_compile_without_gradients(op: str, backend: str) -> None:
    case = OPERATORS[op]
    tensors = case.tensors(torch.float32, requires_grad=False)
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    got = compiled(**tensors, **case.options, backend=backend)
    torch.testing.assert_close(got, case.function(**tensors, **case.options, backend=backend))


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
        outs.append(function(**tensors, **case.options, backend=backend))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[0], outs[3])
    torch.autograd.backward(outs[0].sum())
    assert all(t.grad is not None for t in tensors.values())


OF_SIZE = {  # a case of any batch, rows and columns
    "ipsa": lambda B, H, W: ipsa.ipsa(B, H, W, 2, 4, (2, 3)),
    "cpsa": lambda B, H, W: cpsa.cpsa(B, H, W, 8, (2, 3)),
    "convrel": lambda B, H, W: convrel.convrel(B, (H, W), 2, 4, (3, 3), (5, 5)),
    "convpos": lambda B, H, W: convrel.convpos(B, (H, W), 8),
    "clsattn": lambda B, H, W: clsattn.clsattn(B, H * W, 2, 4),
    "digest": lambda B, H, W: digest.digest(B, (H, W), 2, 4, M=H + 3, prefix=1),
}


@native
@pytest.mark.usefixtures("fresh_compiler")
@operators
def test_compile_dynamic_shapes(op: str) -> None:
    """One graph for any batch and any map."""
    function = OPERATORS[op].function
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes, stance in [((7, 9, 11), "default"), ((5, 4, 12), "fail_on_recompile")]:
        case = OF_SIZE[op](*sizes)
        tensors = {
            name: t.detach().contiguous().requires_grad_()
            for name, t in case.tensors(torch.float32).items()
        }
        grad_out = case.grad_out(torch.float32)
        with torch.compiler.set_stance(stance):
            got = run(compiled, tensors, grad_out, backend="cpu", **case.options)
        assert_same(got, run(case.function, tensors, grad_out, backend="cpu", **case.options))


@pytest.mark.usefixtures("fresh_compiler", "no_native")
@operators
def test_compile_with_a_fallback(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning comes while the function is traced and does not break the graph."""
    monkeypatch.setattr("xattn_ops._backend._warned", set())
    case = OPERATORS[op]
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="falls back to the PyTorch reference"):
        out = compiled(**case.tensors(torch.float32), **case.options)
    assert out.shape == case.out_shape


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
    names = ["batch"] if op in OF_ONE_SIZE else ["batch", "rows", "columns"]
    sizes = {axis: torch.export.Dim(name) for axis, name in enumerate(names)}
    program = torch.export.export(module, (torch.randn(2, 5, 8, 8),), dynamic_shapes=(sizes,))
    x = torch.randn(3, 5, 8, 8) if op in OF_ONE_SIZE else torch.randn(3, 7, 13, 8)
    torch.testing.assert_close(program.module()(x), module(x))
