"""On a card (`pytest -m gpu`): the whole matrix by CUDA and by Triton kernels, and what only a card
can show: streams, devices, graphs, determinism, the two backends against each other."""

from __future__ import annotations

import os

import pytest
import torch
from support.cases import Case, Tensors, assert_equal, leaves
from support.layouts import changed, check_as_dense, layouts
from support.operators import OPERATORS, SMALL, WITH_DROPOUT, of
from support.oracle import check_against_float64, check_nan_stays_in_its_image, floor
from torch import Tensor

from xattn_ops import _backend, available_backends

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as deterministic matmuls ask for
CARD = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CARD, reason="needs a GPU that this torch can use"),
]
BACKENDS = ("cuda", "triton")
FLOATS = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
]
backends = pytest.mark.parametrize("backend", BACKENDS)
floats = pytest.mark.parametrize("dtype", FLOATS)
operators = pytest.mark.parametrize("op", list(OPERATORS))


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references on the card must be of float32 where they say so."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def served(request: pytest.FixtureRequest) -> None:
    """Skip what this build does not have, with its reason."""
    if not CARD:
        return
    named = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    wanted = [named["backend"]] if "backend" in named else BACKENDS
    functions = [OPERATORS[named["op"]].small.function.__name__] if "op" in named else []
    for backend in wanted:
        for function in functions:
            call = _backend.Call("cuda", torch.float32)
            if why := _backend.refusal(function, backend, call):
                pytest.skip(f"{backend}: {why}")


def on_card(tensors: Tensors, device: str = "cuda") -> Tensors:
    """The same values and strides, on the card."""
    return {name: _moved(t, device).requires_grad_(t.requires_grad) for name, t in tensors.items()}


def _moved(t: Tensor, device: str) -> Tensor:
    """With the strides of `t`: `to` would make a tensor with gaps dense."""
    t = t.detach()
    spans = (size - 1 for size in t.shape)
    span = 1 + sum(s * stride for s, stride in zip(spans, t.stride(), strict=True))
    if t.numel() == 0:
        return t.to(device)
    whole = t.as_strided((span,), (1,), t.storage_offset()).to(device)
    return whole.as_strided(t.shape, t.stride())


def given(case: Case, dtype: torch.dtype, device: str = "cuda") -> tuple[Tensors, list[Tensor]]:
    grad_outs = [_moved(g, device) for g in case.grad_outs(dtype)]
    return on_card(case.tensors(dtype), device), grad_outs


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors, grad_outs = given(case, dtype)
    check_against_float64(case, dtype, backend, seed=5, tensors=tensors, grad_outs=grad_outs)


def run(case: Case, dtype: torch.dtype, backend: str, device: str = "cuda") -> Tensors:
    tensors, grad_outs = given(case, dtype, device)
    torch.manual_seed(5)
    return case.run(tensors, grad_outs, backend=backend)


def test_a_card_has_kernels() -> None:
    there = available_backends()
    assert there["cuda"] or there["triton"], "CUDA tensors would run on the reference"


@backends
@floats
@of("cases", "dropout")
def test_against_float64(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, dtype, backend)


@backends
@of("extreme", among=[op for op in OPERATORS if op != "digest"])
def test_extreme_logits(op: str, case: Case, backend: str) -> None:
    check(case, torch.float32, backend)


@backends
@pytest.mark.parametrize("dtype", FLOATS[1:])
@of("extreme", among=["digest"])
def test_extreme_logits_of_digest(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """In the short formats, see test_triton.py."""
    check(case, dtype, backend)


@backends
@pytest.mark.parametrize("dtype", FLOATS[:2])
@layouts
@of("strided")
def test_layouts(op: str, case: Case, layout: str, dtype: torch.dtype, backend: str) -> None:
    tensors, grad_outs = changed(case, dtype, layout)
    grad_outs = [_moved(g, "cuda") for g in grad_outs]
    check_as_dense(case, on_card(tensors), grad_outs, backend)


class OnCard(Case):
    """A case whose tensors are on the card."""

    def tensors(self, dtype: torch.dtype, requires_grad: bool = True, draw: str = "") -> Tensors:
        return on_card(super().tensors(dtype, requires_grad, draw))


@backends
@operators
def test_nan_stays_in_its_image(op: str, backend: str) -> None:
    case = OnCard(**vars(SMALL[op]))
    check_nan_stays_in_its_image(case, torch.float32, backend)


@backends
@floats
@of("steady", "dropout")
def test_twice_bitwise_equal(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    assert_equal(*(run(case, dtype, backend) for _ in range(2)))


@backends
@operators
def test_images_are_independent(op: str, backend: str) -> None:
    """An image's output is the same alone as among others."""
    case = SMALL[op]
    tensors = on_card(case.tensors(torch.bfloat16, requires_grad=False))
    whole = case.outputs(tensors, backend=backend)
    second = {name: t[1:] if _is_batched(case, name) else t for name, t in tensors.items()}
    for one, all_images in zip(case.outputs(second, backend=backend), whole, strict=True):
        torch.testing.assert_close(one[0], all_images[1])


def _is_batched(case: Case, name: str) -> bool:
    """Activations have the rank of the first tensor, which is one, and its batch."""
    first = next(iter(case.shapes.values()))
    shape = case.shapes[name]
    return len(shape) == len(first) and shape[0] == first[0]


@floats
@of("cases", "dropout", few=True)
def test_cuda_against_triton(op: str, case: Case, dtype: torch.dtype) -> None:
    """They err alike against float64, so they agree within the sum of what each may err."""
    tensors, grad_outs = given(case, dtype)
    wide = leaves({name: t.detach().double() for name, t in tensors.items()})
    torch.manual_seed(5)
    exact = case.run(wide, [g.double() for g in grad_outs], case.reference)
    torch.manual_seed(5)
    formula = case.run(tensors, grad_outs, case.reference)
    cuda, triton = (run(case, dtype, backend) for backend in BACKENDS)
    for name in case.outs:
        if exact[name].numel() == 0:
            continue
        difference = (cuda[name].double() - triton[name].double()).abs().max().item()
        error = (formula[name].double() - exact[name]).abs().max().item()
        assert difference <= 4 * error + 2 * floor(dtype, exact[name]), name


@backends
@floats
@of("cases", few=True)
def test_another_stream(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Kernels run on the current stream: behind what made their inputs, before what reads them."""
    want = run(case, dtype, backend)
    tensors, grad_outs = given(case, dtype)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms: whoever does not wait reads the zeros
        late = {name: torch.zeros_like(t).copy_(t.detach()) for name, t in tensors.items()}
        got = case.run(leaves(late), grad_outs, backend=backend)
    stream.synchronize()
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@backends
@operators
def test_another_device(op: str, backend: str) -> None:
    """The tensors' device counts, not the current one, which stays what it was."""
    want = run(SMALL[op], torch.bfloat16, backend)
    with torch.cuda.device(0):
        got = run(SMALL[op], torch.bfloat16, backend, "cuda:1")
        assert torch.cuda.current_device() == 0
    for name in want:
        assert got[name].device == torch.device("cuda:1")
        assert torch.equal(got[name].cpu(), want[name].cpu())


@backends
@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("op", list(WITH_DROPOUT))
def test_dropout_follows_the_generator(op: str, dtype: torch.dtype, backend: str) -> None:
    case = WITH_DROPOUT[op]
    first, again = (run(case, dtype, backend) for _ in range(2))
    assert_equal(first, again)
    tensors, grad_outs = given(case, dtype)
    other = case.run(tensors, grad_outs, backend=backend)  # the generator has moved on
    assert not torch.equal(other["out"], first["out"])


@backends
@floats
@of("cases", few=True)
def test_graph_capture(op: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """A captured step, replayed on other inputs, gives what a step on them gives."""
    tensors, grad_outs = given(case, dtype)
    static = {name: torch.empty_like(t).copy_(t.detach()) for name, t in tensors.items()}
    static = leaves(static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and allocates what is kept
        case.run(static, grad_outs, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(static, grad_outs, backend=backend)
    with torch.no_grad():
        for t in static.values():
            t.mul_(0.5)
    want = case.run(static, grad_outs, backend=backend)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, want)


@backends
@operators
def test_nothing_waits_for_the_device(op: str, backend: str) -> None:
    case = WITH_DROPOUT.get(op, SMALL[op])
    tensors, grad_outs = given(case, torch.bfloat16)
    case.run(tensors, grad_outs, backend=backend)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(tensors, grad_outs, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.usefixtures("fresh_compiler")
@backends
@operators
def test_compile(op: str, backend: str) -> None:
    case = SMALL[op]
    tensors, grad_outs = given(case, torch.float32)
    compiled = torch.compile(case.function, fullgraph=True)
    got = case.run(tensors, grad_outs, compiled, backend=backend)
    want = case.run(tensors, grad_outs, backend=backend)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@operators
def test_default_backend(op: str) -> None:
    """Where nobody names a backend the CUDA kernels serve."""
    function = SMALL[op].function.__name__
    assert _backend.choose(function, None, "cuda", torch.bfloat16) == "cuda"


@backends
@operators
def test_more_than_two_to_the_31_elements(op: str, backend: str) -> None:
    """The last image of a batch whose offsets need 64 bits."""
    case = OPERATORS[op].of_size(1, 56, 56)
    elements = max(torch.Size(shape).numel() for shape in case.shapes.values())
    batch = 2**31 // elements + 2
    if torch.cuda.mem_get_info()[0] < 12 * batch * elements:
        pytest.skip("needs more memory")
    large = OPERATORS[op].of_size(batch, 56, 56)
    one = on_card(case.tensors(torch.bfloat16, requires_grad=False))
    with torch.no_grad():
        tensors = {name: one[name].expand(shape).clone() for name, shape in large.shapes.items()}
        got = large.outputs(tensors, backend=backend)
        want = case.outputs(one, backend=backend)
    for out, expected in zip(got, want, strict=True):
        torch.testing.assert_close(out[-1], expected[0])
