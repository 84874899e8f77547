"""`torch.func` transforms and autocast of every operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import digest, merge
from support.cases import Case, assert_same, backends, native, present, total
from support.operators import (
    MODULES,
    SMALL,
    WITH_DROPOUT,
    droppers,
    operators,
    positional,
)
from torch import Tensor

from xattn_ops._registration import autocast


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
    pytest.param("convrel", ["qkv"], id="convrel_activation"),
    pytest.param("convrel", ["weight_1"], id="convrel_weight"),
    pytest.param("convrel", ["qkv", "weight_0", "bias_1"], id="convrel_both"),
    pytest.param("convpos", ["x"], id="convpos_activation"),
    pytest.param("convpos", ["weight", "bias"], id="convpos_weights"),
    pytest.param("convpos", ["x", "bias"], id="convpos_both"),
    pytest.param("clsattn", ["cls_token", "patches"], id="clsattn_activations"),
    pytest.param("clsattn", ["patches"], id="clsattn_patches"),
    pytest.param("clsattn", ["k_weight", "k_bias", "norm_bias"], id="clsattn_weights"),
    pytest.param("clsattn", ["cls_token", "v_weight", "q_bias"], id="clsattn_both"),
    pytest.param("digest", ["qkv"], id="digest_activation"),
    pytest.param("digest", ["digest_kv"], id="digest_other_activation"),
    pytest.param("digest", ["qkv", "digest_kv"], id="digest_activations"),
    pytest.param("digest", ["bias_table", "digest_bias"], id="digest_weights"),
    pytest.param("digest", ["qkv", "digest_kv", "digest_bias"], id="digest_both"),
    pytest.param("merge", ["x"], id="merge_activation"),
    pytest.param("merge", ["merge_weight", "enhance_bias"], id="merge_weights"),
    pytest.param("merge", ["x", "enhance_weight"], id="merge_both"),
]


@pytest.mark.parametrize(("op", "names"), MAPPED)
@backends
def test_vmap(op: str, names: list[str], backend: str) -> None:
    function, _ = positional(SMALL[op], backend=backend)
    tensors, dims = mapped(SMALL[op], names)
    got = torch.vmap(function, tuple(dims))(*tensors)
    torch.testing.assert_close(got, by_loop(function, tensors, dims))


@pytest.mark.parametrize(("op", "names"), MAPPED)
@backends
def test_vmap_of_grad(op: str, names: list[str], backend: str) -> None:
    """Gradients of each sample, those of the shared weights too."""
    function, arguments = positional(SMALL[op], backend=backend)
    every = tuple(range(len(arguments)))
    grad = torch.func.grad(lambda *tensors: total(function(*tensors), power=2), every)
    tensors, dims = mapped(SMALL[op], names)
    for got, want in zip(
        torch.vmap(grad, tuple(dims))(*tensors), by_loop(grad, tensors, dims), strict=True
    ):
        torch.testing.assert_close(got, want)


@operators
@backends
def test_vmap_twice(op: str, backend: str) -> None:
    function, _ = positional(SMALL[op], backend=backend)
    x, *weights = SMALL[op].tensors(torch.float64, requires_grad=False).values()
    grid = torch.stack([x * i for i in range(6)]).unflatten(0, (2, 3))
    dims = (0, *[None] * len(weights))
    got = torch.vmap(torch.vmap(function, dims), dims)(grid, *weights)
    want = by_loop(function, [grid.flatten(0, 1), *weights], dims, size=6)
    flat = [out.flatten(0, 1) for out in present(got)]
    torch.testing.assert_close(flat, present(want))


@backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(digest.digest(2, (3, 5), 2, 4), id="digest_without_digests"),
        pytest.param(merge.merge(2, (3, 5), 4, window=None), id="merge_without_a_merge"),
    ],
)
def test_vmap_without_optional_activations_and_weights(case: Case, backend: str) -> None:
    function, names = positional(case, backend=backend)
    tensors, dims = mapped(case, names[:1])
    got = torch.vmap(function, tuple(dims))(*tensors)
    torch.testing.assert_close(got, by_loop(function, tensors, dims))


@native
@operators
def test_vmap_folds_activations_into_one_call(op: str) -> None:
    function, _ = positional(SMALL[op], backend="cpu")
    tensors, dims = mapped(SMALL[op], list(SMALL[op].shapes)[:1])
    with torch.profiler.profile() as profile, torch.no_grad():
        torch.vmap(function, tuple(dims))(*tensors)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls[f"xattn_ops::{op}_fwd"] == 2  # the mapped call and the folded one


@droppers
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
    """In eval mode: a batch norm in training moves its statistics, which torch.func forbids."""
    module = MODULES[op](backend=backend).double().eval()
    x = torch.randn(2, 5, 8, 8).double()
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
    case = SMALL[op]
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", dtype):
        outs = case.outputs(tensors, backend=backend)
    assert {out.dtype for out in outs} == {dtype}
    cast = {name: t.to(dtype) for name, t in tensors.items()}
    torch.testing.assert_close(outs, case.outputs(cast, backend=backend))
    total(out.float() for out in outs).backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())


@operators
@backends
def test_autocast_around_the_backward(op: str, backend: str) -> None:
    """A loss differentiated inside the region: the gradients are those of outside."""
    case = SMALL[op]
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs, inputs = case.outputs(tensors, backend=backend), list(tensors.values())
        grad_outs = case.grad_outs(outs[0].dtype)
        inside = torch.autograd.grad(outs, inputs, grad_outs, retain_graph=True)
    outside = torch.autograd.grad(outs, inputs, grad_outs)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


@operators
def test_autocast_takes_mixed_dtypes(op: str) -> None:
    """As after a linear layer, which has cast the activation and not the weights."""
    case = SMALL[op]
    tensors = case.tensors(torch.float32)
    activation = next(iter(tensors))
    with torch.autocast("cpu", torch.bfloat16):
        want = case.outputs(tensors)
        got = case.outputs(tensors | {activation: tensors[activation].bfloat16()})
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@operators
def test_autocast_leaves_float64(op: str) -> None:
    case = SMALL[op]
    with torch.autocast("cpu", torch.bfloat16):
        outs = case.outputs(case.tensors(torch.float64))
    assert {out.dtype for out in outs} == {torch.float64}


def test_autocast_is_off() -> None:
    tensors = (torch.zeros(2), None, torch.zeros(2, dtype=torch.int64))
    assert autocast(*tensors) == tensors
    with torch.autocast("cpu", enabled=False):
        assert autocast(*tensors) == tensors


def test_autocast_reaches_into_lists() -> None:
    values = (torch.zeros(2), [torch.zeros(2), None, 3], (torch.zeros(2, dtype=torch.int64),))
    with torch.autocast("cpu", torch.bfloat16):
        one, several, whole = autocast(*values)
    assert [one.dtype, several[0].dtype, whole[0].dtype] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.int64,
    ]
    assert several[1:] == [None, 3]


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
    case = SMALL[op]
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.outputs(tensors, compiled)
        want = case.outputs(tensors)
    torch.testing.assert_close(got, want)
    total(out.float() for out in got).backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
