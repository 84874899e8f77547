"""What PyTorch does with functions must work with ours: compile, export, transforms, and the rest.

Each test runs for every operator; `SMALL` is a case with padding, shift, biases and odd sizes.
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import cpsa, ipsa
from support.cases import BACKENDS, Case, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from xattn_ops import CrossPatchAttention, InnerPatchAttention, _library
from xattn_ops._registration import autocast

OPERATORS = {"ipsa": ipsa.SMALL, "cpsa": cpsa.SMALL}
WITH_DROPOUT = {name: case.with_options(dropout_p=0.4) for name, case in OPERATORS.items()}
MODULES = {
    "ipsa": lambda **options: InnerPatchAttention(8, 2, (2, 3), (1, 2), **options),
    "cpsa": lambda **options: CrossPatchAttention((2, 3), **options),
}

operators = pytest.mark.parametrize("op", list(OPERATORS))
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif(not _library.NATIVE, reason=f"no CPU kernels: {_library.REASON}")


def positional(case: Case, **options: Any) -> tuple[Callable[..., Tensor], list[str]]:
    """The function of its tensors alone, by position, and their names."""
    names = list(case.shapes)

    def function(*tensors: Tensor) -> Tensor:
        return case.function(**dict(zip(names, tensors, strict=True)), **case.options, **options)

    return function, names


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


# --------------------------------------------------------------------------------------- leaf ops


def leaf_arguments(op: str, dropout: bool) -> tuple[list[Tensor], list[Any]]:
    """Tensors and sizes of the leaf op, as the interface would pass them."""
    case = OPERATORS[op]
    tensors = list(case.tensors(torch.float32, requires_grad=False).values())
    p, seed = (0.4, torch.tensor(9)) if dropout else (0.0, None)
    sizes = {"ipsa": [2, 2, 3, 1, 2, 0.5, p], "cpsa": [2, 3, 1, 0.1, p]}[op]
    return tensors, [seed, *sizes]


@native
@operators
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_opcheck(op: str, dropout: bool) -> None:
    tensors, rest = leaf_arguments(op, dropout)
    forward, backward = (getattr(torch.ops.xattn_ops, f"{op}_{way}") for way in ("fwd", "bwd"))
    torch.library.opcheck(forward.default, (*tensors, *rest))
    grad_out = OPERATORS[op].grad_out(torch.float32)
    torch.library.opcheck(backward.default, (grad_out, *tensors, *rest))


@native
@pytest.mark.parametrize(
    ("op", "absent"),
    [("ipsa", (1,)), ("ipsa", (2,)), ("ipsa", (1, 2)), ("cpsa", (2,)), ("cpsa", (2, 4))],
)
def test_opcheck_without_optional_tensors(op: str, absent: tuple[int, ...]) -> None:
    tensors, rest = leaf_arguments(op, dropout=False)
    given = [None if i in absent else t for i, t in enumerate(tensors)]
    backward = getattr(torch.ops.xattn_ops, f"{op}_bwd").default
    grad_out = OPERATORS[op].grad_out(torch.float32)
    torch.library.opcheck(backward, (grad_out, *given, *rest))
    grads = backward(grad_out, *given, *rest)
    assert [i for i, grad in enumerate(grads) if grad.numel() == 0] == list(absent)


@native
@operators
def test_leaf_op_casts_under_autocast(op: str) -> None:
    tensors, rest = leaf_arguments(op, dropout=False)
    forward = getattr(torch.ops.xattn_ops, f"{op}_fwd")
    with torch.autocast("cpu", torch.bfloat16):
        got = forward(*tensors, *rest)
    assert torch.equal(got, forward(*(t.bfloat16() for t in tensors), *rest))


# --------------------------------------------------------------------------------------- autograd


@native
@operators
def test_second_derivative_raises(op: str) -> None:
    """Also where the incoming gradient is a constant, as in a gradient penalty."""
    function, _ = positional(OPERATORS[op], backend="cpu")
    tensors = list(OPERATORS[op].tensors(torch.float32).values())
    (grad,) = torch.autograd.grad(function(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*backend='reference'"):
        grad.square().sum().backward()


@operators
def test_second_derivative_of_the_reference(op: str) -> None:
    function, _ = positional(OPERATORS[op], backend="reference")
    tensors = list(OPERATORS[op].tensors(torch.float32).values())
    (grad,) = torch.autograd.grad(function(*tensors).sum(), tensors[0], create_graph=True)
    grad.square().sum().backward()
    assert tensors[0].grad.abs().max() > 0


@native
@operators
def test_only_inputs_are_saved(op: str) -> None:
    """Training keeps no intermediate: nothing of the size of the attention weights."""
    case, saved = OPERATORS[op], []
    tensors = case.tensors(torch.float32)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.function(**tensors, **case.options, backend="cpu")
    assert set(saved) == {t.data_ptr() for t in tensors.values()}


@operators
@backends
def test_inputs_are_left_alone(op: str, backend: str) -> None:
    case = OPERATORS[op]
    tensors, grad_out = case.tensors(torch.float32), case.grad_out(torch.float32)
    before = [t.detach().clone() for t in (*tensors.values(), grad_out)]
    run(case.function, tensors, grad_out, backend=backend, **case.options)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (*tensors.values(), grad_out), strict=True)
    )


@operators
@backends
def test_checkpoint_recomputes_the_same_dropout(op: str, backend: str) -> None:
    case = WITH_DROPOUT[op]
    function, _ = positional(case, backend=backend)
    tensors, grad_out = list(case.tensors(torch.float64).values()), case.grad_out(torch.float64)
    torch.manual_seed(2)
    want = torch.autograd.grad(function(*tensors), tensors, grad_out)
    torch.manual_seed(2)
    got = torch.autograd.grad(
        checkpoint(function, *tensors, use_reentrant=False), tensors, grad_out
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------- compile and export


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
@operators
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


@native
@pytest.mark.usefixtures("fresh_compiler")
@operators
def test_compile_dynamic_shapes(op: str) -> None:
    """One graph for any batch and any map."""
    compiled = torch.compile(OPERATORS[op].function, fullgraph=True, backend="aot_eager")
    for sizes, stance in [((3, 9, 7), "default"), ((5, 4, 12), "fail_on_recompile")]:
        make = {"ipsa": ipsa.ipsa(*sizes, 2, 4, (2, 3)), "cpsa": cpsa.cpsa(*sizes, 8, (2, 3))}
        case = make[op]
        tensors = {
            name: t.detach().contiguous().requires_grad_()
            for name, t in case.tensors(torch.float32).items()
        }
        for axis in range(3):
            torch._dynamo.mark_dynamic(next(iter(tensors.values())), axis)
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
    sizes = {axis: torch.export.Dim(name) for axis, name in enumerate(["batch", "rows", "columns"])}
    program = torch.export.export(module, (torch.randn(2, 5, 8, 8),), dynamic_shapes=(sizes,))
    x = torch.randn(3, 7, 13, 8)
    torch.testing.assert_close(program.module()(x), module(x))


# ------------------------------------------------------------------------------------- transforms


def mapped(case: Case, names: list[str], size: int = 3) -> tuple[list[Tensor], list[int | None]]:
    """The tensors, those of these names `size` times and different, and their mapped axes."""
    tensors, dims = [], []
    for name, tensor in case.tensors(torch.float64, requires_grad=False).items():
        several = torch.stack([tensor * (1 + i) for i in range(size)], dim=-1)
        tensors.append(several if name in names else tensor)
        dims.append(tensor.dim() if name in names else None)
    return tensors, dims


def by_loop(
    function: Callable, tensors: list[Tensor], dims: list[int | None], size: int = 3
) -> Any:
    """What vmap promises: the function of each slice, stacked."""
    slices = [
        function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices)
    return tuple(torch.stack(parts) for parts in zip(*slices, strict=True))


MAPPED = [
    pytest.param("ipsa", ["qkv"], id="ipsa_activation"),
    pytest.param("ipsa", ["bias_table"], id="ipsa_weight"),
    pytest.param("ipsa", ["qkv", "bias_table", "pad_qkv"], id="ipsa_all"),
    pytest.param("cpsa", ["x"], id="cpsa_activation"),
    pytest.param("cpsa", ["proj_weight", "qkv_bias"], id="cpsa_weights"),
    pytest.param("cpsa", ["x", "qkv_weight"], id="cpsa_both"),
]


@pytest.mark.parametrize(("op", "names"), MAPPED)
@backends
def test_vmap(op: str, names: list[str], backend: str) -> None:
    function, _ = positional(OPERATORS[op], backend=backend)
    tensors, dims = mapped(OPERATORS[op], names)
    got = torch.vmap(function, tuple(dims))(*tensors)
    torch.testing.assert_close(got, by_loop(function, tensors, dims))


@pytest.mark.parametrize(("op", "names"), MAPPED)
@backends
def test_vmap_of_grad(op: str, names: list[str], backend: str) -> None:
    """Gradients of each sample, those of the shared weights too."""
    function, arguments = positional(OPERATORS[op], backend=backend)
    every = tuple(range(len(arguments)))
    grad = torch.func.grad(lambda *tensors: function(*tensors).square().sum(), every)
    tensors, dims = mapped(OPERATORS[op], names)
    for got, want in zip(
        torch.vmap(grad, tuple(dims))(*tensors), by_loop(grad, tensors, dims), strict=True
    ):
        torch.testing.assert_close(got, want)


@operators
@backends
def test_vmap_twice(op: str, backend: str) -> None:
    function, _ = positional(OPERATORS[op], backend=backend)
    x, *weights = OPERATORS[op].tensors(torch.float64, requires_grad=False).values()
    grid = torch.stack([x * i for i in range(6)]).unflatten(0, (2, 3))
    dims = (0, *[None] * len(weights))
    got = torch.vmap(torch.vmap(function, dims), dims)(grid, *weights)
    want = torch.stack([function(x, *weights) for x in grid.flatten(0, 1)])
    torch.testing.assert_close(got.flatten(0, 1), want)


@native
@operators
def test_vmap_folds_activations_into_one_call(op: str) -> None:
    function, _ = positional(OPERATORS[op], backend="cpu")
    tensors, dims = mapped(OPERATORS[op], list(OPERATORS[op].shapes)[:1])
    with torch.profiler.profile() as profile, torch.no_grad():
        torch.vmap(function, tuple(dims))(*tensors)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls[f"xattn_ops::{op}_fwd"] == 2  # the mapped call and the folded one


@operators
@backends
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_dropout(op: str, backend: str, randomness: str) -> None:
    case = WITH_DROPOUT[op]
    function, names = positional(case, backend=backend)
    tensors = list(case.tensors(torch.float64, requires_grad=False).values())
    tensors[0] = tensors[0].expand(2, *tensors[0].shape)
    dims = (0, *[None] * (len(names) - 1))
    first, second = torch.vmap(function, dims, randomness=randomness)(*tensors)
    assert torch.equal(first, second) == (randomness == "same")


@operators
@backends
def test_func_grad_and_functional_call(op: str, backend: str) -> None:
    module, x = MODULES[op](backend=backend).double(), torch.randn(2, 5, 8, 8).double()
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    loss(parameters).backward()
    assert_same(got, {name: p.grad for name, p in parameters.items()})


# --------------------------------------------------------------------------------------- autocast


@operators
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(op: str, backend: str, dtype: torch.dtype) -> None:
    """As if all had been cast by hand; gradients come back in the dtypes of the inputs."""
    case = OPERATORS[op]
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", dtype):
        out = case.function(**tensors, **case.options, backend=backend)
    assert out.dtype == dtype
    cast = {name: t.to(dtype) for name, t in tensors.items()}
    want = case.function(**cast, **case.options, backend=backend)
    torch.testing.assert_close(out, want)
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())


@operators
def test_autocast_takes_mixed_dtypes(op: str) -> None:
    """As after a linear layer, which has cast the activation and not the weights."""
    case = OPERATORS[op]
    tensors = case.tensors(torch.float32)
    activation = next(iter(tensors))
    with torch.autocast("cpu", torch.bfloat16):
        want = case.function(**tensors, **case.options)
        mixed = tensors | {activation: tensors[activation].bfloat16()}
        assert torch.equal(case.function(**mixed, **case.options), want)


@operators
def test_autocast_leaves_float64(op: str) -> None:
    case = OPERATORS[op]
    with torch.autocast("cpu", torch.bfloat16):
        out = case.function(**case.tensors(torch.float64), **case.options)
    assert out.dtype == torch.float64


def test_autocast_is_off() -> None:
    tensors = (torch.zeros(2), None, torch.zeros(2, dtype=torch.int64))
    assert autocast(*tensors) == tensors
    with torch.autocast("cpu", enabled=False):
        assert autocast(*tensors) == tensors


@operators
def test_autocast_module(op: str) -> None:
    module, x = MODULES[op](), torch.randn(2, 5, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.usefixtures("fresh_compiler")
@operators
def test_autocast_compiled(op: str) -> None:
    case = OPERATORS[op]
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = compiled(**tensors, **case.options)
        want = case.function(**tensors, **case.options)
    torch.testing.assert_close(got, want)
    got.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())


# ------------------------------------------------------------------------------------------ FLOPs


@native
@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # 2 images x 3 x 3 padded windows x 6 x 6 pairs x 8 channels; 2 products, then 5
        pytest.param(ipsa.SMALL, 4 * 2 * 9 * 36 * 8, 10 * 2 * 9 * 36 * 8, id="ipsa"),
        # 2 x 3 channels x 9 patches of 6: projections 6 x 6, products 9 x 6 a patch
        pytest.param(
            cpsa.SMALL,
            2 * 54 * (4 * 36 + 2 * 54),
            2 * 54 * (11 * 36 + 6 * 54),
            id="cpsa",
        ),
    ],
)
def test_flops(case: Case, forward: int, backward: int) -> None:
    """2 to a multiply-add; what backward computes again counts, as for torch's own attention."""
    tensors = case.tensors(torch.float32)
    with FlopCounterMode(display=False) as counter:
        out = case.function(**tensors, **case.options, backend="cpu")
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == backward


@native
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ipsa.ipsa(2, 8, 9, 2, 4, (4, 3)), id="ipsa"),
        pytest.param(cpsa.cpsa(2, 8, 9, 3, (4, 3)), id="cpsa"),
    ],
)
def test_flops_are_those_of_the_reference(case: Case) -> None:
    counts = []
    for backend in ("cpu", "reference"):
        with FlopCounterMode(display=False) as counter:
            case.function(**case.tensors(torch.float32), **case.options, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# ---------------------------------------------------------------------------------------- DTensor


def distributed(rank: int, store: str) -> None:
    """One of two processes: the batch split, weights replicated, against the whole in one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for op, case in OPERATORS.items():
        names, tensors = list(case.shapes), case.tensors(torch.float64)
        grad_out = case.grad_out(torch.float64)
        split = {
            name: distribute_tensor(
                t.detach(), mesh, [Shard(0) if name == names[0] else Replicate()]
            )
            for name, t in tensors.items()
        }
        leaves = {name: t.requires_grad_() for name, t in split.items()}
        out = case.function(**leaves, **case.options, backend="cpu")
        assert out.placements == (Shard(0),), f"{op}: {out.placements}"
        assert out.to_local().shape[0] == 1
        out.backward(distribute_tensor(grad_out, mesh, [Shard(0)]))
        got = {"out": out.full_tensor(), **{n: t.grad.full_tensor() for n, t in leaves.items()}}
        assert_same(got, run(case.function, tensors, grad_out, backend="cpu", **case.options))

        torch.manual_seed(4)
        whole = case.function(**tensors, **case.options, dropout_p=0.5, backend="cpu")
        torch.manual_seed(4)
        dropped = case.function(**leaves, **case.options, dropout_p=0.5, backend="cpu")
        torch.testing.assert_close(dropped.full_tensor(), whole)
    dist.destroy_process_group()


@native
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without it")
def test_dtensor_over_the_batch(tmp_path) -> None:
    torch.multiprocessing.spawn(distributed, (str(tmp_path / "store"),), nprocs=2)


# ---------------------------------------------------------------------------------------- modules


@operators
def test_module_copies_and_pickles(op: str) -> None:
    module, x = MODULES[op]().eval(), torch.randn(2, 5, 8, 8)
    want = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), want)


@operators
def test_module_state_dict_round_trip(op: str) -> None:
    module, other, x = MODULES[op]().eval(), MODULES[op]().eval(), torch.randn(2, 5, 8, 8)
    other(x)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@operators
def test_module_on_meta(op: str) -> None:
    with torch.device("meta"):
        assert MODULES[op]()(torch.empty(2, 5, 8, 8)).shape == (2, 5, 8, 8)


@operators
def test_no_warning_in_ordinary_use(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XATTN_BACKEND", "XATTN_STRICT"):
        monkeypatch.delenv(name, raising=False)
    assert "XATTN_BACKEND" not in os.environ
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MODULES[op]()(torch.randn(2, 5, 8, 8)).sum().backward()
