"""What PyTorch does with functions must work with ours: autograd, FLOP counts, DTensor, modules.

Each test runs for every operator; `SMALL` is a case with padding, shift, biases and odd sizes.
"""

import copy
import os
import pickle
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import clsattn, convpos, convrel, cpsa, digest, ipsa, merge
from support.cases import Case, assert_equal, assert_same, backends, native, total
from support.operators import (
    MODULES,
    SMALL,
    WITH_DROPOUT,
    operators,
    positional,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# --------------------------------------------------------------------------------------- leaf ops


SIZES: dict[str, list[Any]] = {  # what follows the tensors of a leaf op
    "ipsa": [None, 2, 2, 3, 1, 2, 0.5, 0.0],
    "ipsa_dropout": [torch.tensor(9), 2, 2, 3, 1, 2, 0.5, 0.4],
    "cpsa": [None, 2, 3, 1, 0.1, 0.0],
    "cpsa_dropout": [torch.tensor(9), 2, 3, 1, 0.1, 0.4],
    "convrel": [[3, 5], [3, 5], 2, 5, 8, 1, 0.5],
    "convpos": [5, 8, 1],
    "clsattn": [None, 2, 1e-6, 0.5, 0.0],
    "clsattn_dropout": [torch.tensor(9), 2, 1e-6, 0.5, 0.4],
    "digest": [None, 2, 3, 5, 1, 0.5, 0.0],
    "digest_dropout": [torch.tensor(9), 2, 3, 5, 1, 0.5, 0.4],
    "merge": [5, 8, 4, 1],
}


def leaf_arguments(kind: str) -> tuple[str, list[Tensor], list[Any]]:
    """The leaf op's name, its tensors and its sizes, as the interface would pass them."""
    op = kind.split("_")[0]
    tensors = list(SMALL[op].tensors(torch.float32, requires_grad=False).values())
    if op == "convrel":  # qkv, two weights, two biases -> qkv, weight, bias
        tensors = [
            tensors[0],
            *(torch.cat([t.flatten() for t in tensors[i : i + 2]]) for i in (1, 3)),
        ]
    if op == "clsattn":
        del tensors[5]  # k_bias
    return op, tensors, SIZES[kind]


def backward_arguments(op: str, tensors: list[Any], sizes: list[Any]) -> list[Any]:
    """Gradients, the forward's tensors, what the forward made for the backward, and the sizes."""
    made = getattr(torch.ops.xattn_ops, f"{op}_fwd")(*tensors, *sizes)
    kept = made[len(SMALL[op].outs) :] if isinstance(made, tuple) else ()
    return [*SMALL[op].grad_outs(torch.float32), *tensors, *kept, *sizes]


@native
@pytest.mark.parametrize("kind", list(SIZES))
def test_opcheck(kind: str) -> None:
    op, tensors, sizes = leaf_arguments(kind)
    forward, backward = (getattr(torch.ops.xattn_ops, f"{op}_{way}") for way in ("fwd", "bwd"))
    torch.library.opcheck(forward.default, (*tensors, *sizes))
    torch.library.opcheck(backward.default, backward_arguments(op, tensors, sizes))


@native
@pytest.mark.parametrize(
    ("op", "absent"),
    [
        ("ipsa", (1,)),
        ("ipsa", (2,)),
        ("ipsa", (1, 2)),
        ("cpsa", (2,)),
        ("cpsa", (2, 4)),
        ("convrel", (2,)),
        ("convpos", (2,)),
        ("clsattn", (3,)),
        ("clsattn", (6,)),
        ("clsattn", (8,)),
        ("clsattn", (7, 8)),
        ("clsattn", (3, 6, 7, 8)),
        ("digest", (2,)),
        ("digest", (3,)),
        ("digest", (1, 3)),
        ("digest", (1, 2, 3)),
        ("merge", (3,)),
    ],
)
def test_opcheck_without_optional_tensors(op: str, absent: tuple[int, ...]) -> None:
    _, tensors, sizes = leaf_arguments(op)
    given = [None if i in absent else t for i, t in enumerate(tensors)]
    backward = getattr(torch.ops.xattn_ops, f"{op}_bwd").default
    arguments = backward_arguments(op, given, sizes)
    torch.library.opcheck(backward, arguments)
    grads = backward(*arguments)
    assert [i for i, grad in enumerate(grads) if grad.numel() == 0] == list(absent)


@native
def test_opcheck_without_a_relative_term() -> None:
    qkv, none = SMALL["convrel"].tensors(torch.float32)["qkv"].detach(), torch.zeros(0)
    sizes = [[], [], *SIZES["convrel"][2:]]
    torch.library.opcheck(torch.ops.xattn_ops.convrel_fwd.default, (qkv, none, None, *sizes))
    arguments = backward_arguments("convrel", [qkv, none, None], sizes)
    torch.library.opcheck(torch.ops.xattn_ops.convrel_bwd.default, arguments)


@native
def test_opcheck_without_a_merge() -> None:
    """Its output is empty, and so is its weight's gradient."""
    _, (x, _, *enhance), sizes = leaf_arguments("merge")
    grad = SMALL["merge"].grad_outs(torch.float32)[1]
    torch.library.opcheck(torch.ops.xattn_ops.merge_fwd.default, (x, None, *enhance, *sizes))
    arguments = (None, grad, x, None, *enhance, *sizes)
    torch.library.opcheck(torch.ops.xattn_ops.merge_bwd.default, arguments)
    assert torch.ops.xattn_ops.merge_fwd(x, None, *enhance, *sizes)[0].shape == (2, 0, 8)
    assert torch.ops.xattn_ops.merge_bwd(*arguments)[1].shape == (0,)


@native
@pytest.mark.parametrize("absent", [0, 1], ids=["enhanced", "digests"])
def test_opcheck_with_one_gradient_alone(absent: int) -> None:
    _, tensors, sizes = leaf_arguments("merge")
    grads: list[Any] = SMALL["merge"].grad_outs(torch.float32)
    grads[absent] = None
    torch.library.opcheck(torch.ops.xattn_ops.merge_bwd.default, (*grads, *tensors, *sizes))


@native
@operators
def test_leaf_ops_cast_under_autocast(op: str) -> None:
    """All but what the forward made for the backward, which is in float32 anyway."""
    _, tensors, sizes = leaf_arguments(op)
    cast = [t.bfloat16() for t in tensors]
    forward, backward = (getattr(torch.ops.xattn_ops, f"{op}_{way}") for way in ("fwd", "bwd"))
    arguments, outs = backward_arguments(op, cast, sizes), len(SMALL[op].outs)
    grad_outs, rest = arguments[:outs], arguments[outs:]
    wide = [*grad_outs, *tensors, *rest[len(tensors) :]]
    with torch.autocast("cpu", torch.bfloat16):
        got = [forward(*tensors, *sizes), backward(*wide)]
    want = [forward(*cast, *sizes), backward(*(g.bfloat16() for g in grad_outs), *rest)]
    for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --------------------------------------------------------------------------------------- autograd


@native
@operators
def test_second_derivative_raises(op: str) -> None:
    """Also where the incoming gradient is a constant, as in a gradient penalty."""
    function, _ = positional(SMALL[op], backend="cpu")
    tensors = list(SMALL[op].tensors(torch.float32).values())
    (grad,) = torch.autograd.grad(total(function(*tensors)), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*backend='reference'"):
        grad.square().sum().backward()


@operators
def test_second_derivative_of_the_reference(op: str) -> None:
    function, _ = positional(SMALL[op], backend="reference")
    tensors = list(SMALL[op].tensors(torch.float32).values())
    loss = total(function(*tensors), power=2)
    (grad,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    grad.square().sum().backward()
    assert tensors[0].grad.abs().max() > 0


# conv_relative_attention keeps its weights and biases in a row, and D x (D + 2) for each head;
# cls_cross_attention D + 2 C for each head, and a weight of each head and the LayerNorm's mean and
# deviation for each token; digest_attention the largest logit and the sum of each softmax row
KEPT = {
    "convrel": [3 * 9 + 5 * 25, 8, 2 * 2 * 4 * 6],
    "clsattn": [2 * 2 * (4 + 2 * 8), 2 * (2 + 2) * 8],
    "digest": [2 * 2 * 16 * 2],
}


@native
@operators
def test_only_inputs_are_saved(op: str) -> None:
    """Training keeps no intermediate: nothing of the size of the attention weights."""
    case, saved = SMALL[op], []
    tensors = case.tensors(torch.float32)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.function(**tensors, **case.options, backend="cpu")
    inputs = {t.data_ptr() for t in tensors.values()}
    assert [t.numel() for t in saved if t.data_ptr() not in inputs] == KEPT.get(op, [])
    assert next(iter(tensors.values())).data_ptr() in {t.data_ptr() for t in saved}


@operators
@backends
def test_inputs_are_left_alone(op: str, backend: str) -> None:
    case = SMALL[op]
    tensors, grad_outs = case.tensors(torch.float32), case.grad_outs(torch.float32)
    every = [*tensors.values(), *grad_outs]
    before = [t.detach().clone() for t in every]
    case.run(tensors, grad_outs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, every, strict=True))


@operators
@backends
def test_checkpoint_recomputes_the_same(op: str, backend: str) -> None:
    """The same dropout too, where there is some."""
    case = WITH_DROPOUT.get(op, SMALL[op])
    tensors, grad_outs = case.tensors(torch.float64), case.grad_outs(torch.float64)

    def recomputed(**tensors: Tensor) -> Any:
        function, _ = positional(case, backend=backend)
        return checkpoint(function, *tensors.values(), use_reentrant=False)

    torch.manual_seed(2)
    want = case.run(tensors, grad_outs, backend=backend)
    torch.manual_seed(2)
    assert_equal(replace(case, options={}).run(tensors, grad_outs, recomputed), want)


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
        # 2 images; 41 tokens x 8 channels x 4 a head, 2 products, then 4; 40 pixels of 3 channels
        # under 9 weights and 5 under 25, once, then 3 times
        pytest.param(
            convrel.SMALL,
            2 * 2 * (2 * 41 * 32 + 40 * 152),
            2 * 2 * (4 * 41 * 32 + 3 * 40 * 152),
            id="convrel",
        ),
        pytest.param(convpos.SMALL, 2 * 2 * 40 * 8 * 9, 2 * 2 * 2 * 40 * 8 * 9, id="convpos"),
        # 2 images of 8 tokens: 17 projections of 8 x 8, 2 products of 8 x 8; twice that backward
        pytest.param(
            clsattn.SMALL, 2 * 2 * (17 * 64 + 2 * 64), 4 * 2 * (17 * 64 + 2 * 64), id="clsattn"
        ),
        # 2 images x 16 tokens x 19 keys x 8 channels; 2 products, then 5
        pytest.param(digest.SMALL, 4 * 2 * 16 * 19 * 8, 10 * 2 * 16 * 19 * 8, id="digest"),
        # 2 images x 8 channels: 4 digests under 49 weights, 40 pixels under 9; twice that backward
        pytest.param(
            merge.SMALL, 4 * 8 * (4 * 49 + 40 * 9), 2 * 4 * 8 * (4 * 49 + 40 * 9), id="merge"
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
        total(out).backward()
    assert counter.get_total_flops() == backward


@native
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ipsa.ipsa(2, 8, 9, 2, 4, (4, 3)), id="ipsa"),
        pytest.param(cpsa.cpsa(2, 8, 9, 3, (4, 3)), id="cpsa"),
        pytest.param(convrel.SMALL, id="convrel"),
        pytest.param(convrel.convrel(2, (4, 3), 2, 4), id="convrel_without_relative_term"),
        pytest.param(convpos.SMALL, id="convpos"),
        pytest.param(clsattn.SMALL, id="clsattn"),
        pytest.param(digest.SMALL, id="digest"),
        pytest.param(digest.digest(2, (3, 5), 2, 4), id="digest_without_digests"),
        pytest.param(merge.SMALL, id="merge"),
        pytest.param(merge.merge(2, (5, 7), 8, window=None), id="merge_without_a_merge"),
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
    for op, case in SMALL.items():
        names, tensors = list(case.shapes), case.tensors(torch.float64)
        grad_outs = case.grad_outs(torch.float64)
        split = {
            name: distribute_tensor(
                t.detach(), mesh, [Shard(0) if name == names[0] else Replicate()]
            )
            for name, t in tensors.items()
        }
        leaves = {name: t.requires_grad_() for name, t in split.items()}
        outs = case.outputs(leaves, backend="cpu")
        for out in outs:
            assert out.placements == (Shard(0),), f"{op}: {out.placements}"
            assert out.to_local().shape[0] == 1
        torch.autograd.backward(outs, [distribute_tensor(g, mesh, [Shard(0)]) for g in grad_outs])
        results = dict(zip(case.outs, outs, strict=True)) | {n: t.grad for n, t in leaves.items()}
        got = {name: t.full_tensor() for name, t in results.items()}
        assert_same(got, case.run(tensors, grad_outs, backend="cpu"))

        if op not in WITH_DROPOUT:
            continue
        torch.manual_seed(4)
        (whole,) = case.outputs(tensors, dropout_p=0.5, backend="cpu")
        torch.manual_seed(4)
        (dropped,) = case.outputs(leaves, dropout_p=0.5, backend="cpu")
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
