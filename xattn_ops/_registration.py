"""Everything PyTorch wants to know about a leaf op, given in one place.

A leaf op is a native kernel without an autograd formula; an `autograd.Function` outside calls it.
All leaf ops follow one convention, from which the rules below are derived:

- an argument is batched (its first axis is the batch) or a weight, shared by the whole batch;
- a return is batched, or the gradient of a weight, summed over the batch, empty where the weight
  was None;
- a batched return may be there for the backward op alone, in a type wide enough for sums, whatever
  the dtype of the rest: autocast leaves such an argument as it is;
- `seed`, where given, numbers the attention matrices through the whole batch for dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import register_flop_formula

from . import _tiles
from ._library import NATIVE, REASON

# The kernels of C++ and CUDA are ops of the first library, those of Triton of the second, under
# the same names and with the same arguments.
_LIBRARY = torch.library.Library("xattn_ops", "FRAGMENT")
_TRITON = torch.library.Library("xattn_triton", "FRAGMENT")
_RULES: dict[str, Callable[[torch.library.Library], None]] = {}


def missing(*ops: str) -> str:
    """Why the native library cannot run these ops; "" where it can."""
    if not NATIVE:
        return REASON
    absent = [op for op in ops if not hasattr(torch.ops.xattn_ops, op)]
    return (
        f"the native library is older than this package: no {', '.join(absent)}" if absent else ""
    )


def register(
    name: str,
    *,
    batched: Sequence[str],
    returns_batched: Sequence[bool] = (True,),
    fake: Callable[..., Any],
    flops: Callable[..., int],
    wide: Sequence[str] = (),
) -> None:
    """Give the op `name` its fake kernel and its vmap, autocast, FLOP and sharding rules.

    batched: the names of its batched arguments. returns_batched: the same of its returns, in
    order. fake: its arguments -> empty outputs. flops: its arguments, shapes in place of tensors
    -> floating-point operations, 2 to a multiply-add. wide: the names of the arguments that the
    forward op made for this one. The native op gets them now, where there is one; the Triton op
    of this name when `register_triton` defines it.
    """

    def rules(library: torch.library.Library) -> None:
        packet = getattr(getattr(torch.ops, library.ns), name)
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        _register_vmap(library, packet.default, batched, returns_batched)
        _register_autocast(library, packet.default, name, wide)
        register_flop_formula(packet)(lambda *args, out_shape=None, **_: flops(*args))
        if torch.distributed.is_available():
            _register_sharding(packet.default, batched, returns_batched)

    _RULES[name] = rules
    if not missing(name):
        rules(_LIBRARY)


def register_triton(name: str, launch: Callable[..., Any]) -> None:
    """Define the op torch.ops.xattn_triton.<name>, which calls `launch`, with the rules of `name`.

    launch: annotated; its parameters have the names of the native op's.
    """
    _TRITON.define(name + torch.library.infer_schema(launch, mutates_args=()))
    for device in ("CPU", "CUDA"):  # on CPU tensors the interpreter runs it
        _TRITON.impl(name, _tiles.until_it_fits(launch), device)
    follow(name, _TRITON)


def leaf_ops() -> list[str]:
    """The names of all leaf ops."""
    return list(_RULES)


def follow(name: str, library: torch.library.Library) -> None:
    """Give the op `name` of another library, which takes the same arguments, the same rules."""
    _RULES[name](library)


class _Backward(torch.autograd.Function):
    """A leaf op that computes gradients and says so when someone differentiates it again.

    torch's `once_differentiable` keeps silent where grad_out needs no gradient, as in a gradient
    penalty: the second derivative would be missing without an error.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Callable[..., Any], *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op} cannot be differentiated: the kernels give first derivatives only. For "
            "second derivatives call the function with backend='reference'"
        )


def backward_once(op: Callable[..., Any], *args: Any) -> Any:
    """`op(*args)` inside a `backward`; differentiating its results raises."""
    if torch.compiler.is_compiling():  # compiled graphs refuse a second derivative themselves
        return op(*args)
    return apply(_Backward, op, *args)


def asked_for(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What a `backward` returns: the gradients that are asked for, and None for all else.

    grads: of the first inputs, in order; those after them have none.
    """
    needs = ctx.needs_input_grad
    asked = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return (*asked, *[None] * (len(needs) - len(grads)))


def transformed() -> bool:
    """Whether a call is being traced, or runs under a transform of torch.func or forward AD."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def untracked(*tensors: Any) -> bool:
    """Whether a call on these tensors runs eagerly and nobody can ask for its derivative."""
    return not transformed() and not _tracked(tensors)


def _tracked(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` by the shortest way there is.

    Its Python takes as long as a kernel on a small map, the more so with cold caches. Where no
    transform is active it binds the arguments to a signature and then calls its base class, which
    is called directly here; and where no gradient can be asked for, the forward is all of it.
    """
    if transformed():
        return function.apply(*args)
    if not _tracked(args):
        return function.forward(*args)
    # What `Function.apply` does with tensors that outlived a transform.
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def positions(op: torch._ops.OpOverload, names: Sequence[str]) -> list[int]:
    """Where the arguments of these names stand."""
    order = [argument.name for argument in op._schema.arguments]
    return [order.index(name) for name in names]


def drops(op: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """Whether this call has a seed, and so drops attention weights."""
    names = [argument.name for argument in op._schema.arguments]
    return "seed" in names and args[names.index("seed")] is not None


# ------------------------------------------------------------------------------------------ vmap


def _register_vmap(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    batched: Sequence[str],
    returns_batched: Sequence[bool],
) -> None:
    """Fold the mapped axis into the batch where that changes nothing; call once a slice otherwise.

    It changes the result where a weight is mapped too, where a return sums over the batch, and
    under dropout, whose counter numbers the batch.
    """
    places = positions(op, batched)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        # a list of sizes has a list of dims, None each
        mapped = [place for place, dim in enumerate(in_dims) if isinstance(dim, int)]
        if all(returns_batched) and not drops(op, args) and set(mapped) <= set(places):
            return _folded(op, info.batch_size, places, in_dims, args), _like(op, 0)
        pairs = list(zip(args, in_dims, strict=True))
        calls = [
            op(*(a.select(d, i) if p in mapped else a for p, (a, d) in enumerate(pairs)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(slices) for slices in zip(*calls, strict=True)), _like(op, 0)

    torch.library.register_vmap(op, rule, lib=library)


def _folded(
    op: torch._ops.OpOverload,
    size: int,
    places: Sequence[int],
    in_dims: Sequence[Any],
    args: Sequence[Any],
) -> Any:
    """One call on [size * B, ...] in place of `size` calls on [B, ...]."""
    flat = list(args)
    for place in places:
        if args[place] is None:
            continue
        dim = in_dims[place]
        whole = args[place].expand(size, *args[place].shape) if dim is None else args[place]
        flat[place] = whole.movedim(dim or 0, 0).flatten(0, 1)
    out = op(*flat)
    if isinstance(out, Tensor):
        return out.unflatten(0, (size, -1))
    return tuple(part.unflatten(0, (size, -1)) for part in out)


def _like(op: torch._ops.OpOverload, dim: int) -> Any:
    """`dim` in the structure of the op's returns."""
    returns = len(op._schema.returns)
    return dim if returns == 1 else (dim,) * returns


# -------------------------------------------------------------------------------------- autocast


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, all floating tensors in its dtype, as for linear layers and SDPA.

    Also those in lists. A float64 among them keeps them all as they are, as autocast does. The
    public functions cast before anything else, so that gradients return in the dtypes that came.
    """
    if not torch._C._is_any_autocast_enabled():
        return tensors
    floating = [t for t in tree_leaves(tensors) if _is_floating(t)]
    if not floating or any(t.dtype == torch.float64 for t in floating):
        return tensors
    device = floating[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tree_map(lambda t: t.to(dtype) if _is_floating(t) else t, tensors)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _register_autocast(
    library: torch.library.Library, op: torch._ops.OpOverload, name: str, wide: Sequence[str]
) -> None:
    """The same rule for who calls the leaf op itself."""
    kept = positions(op, wide)
    for device in ("CPU", "CUDA"):

        def rule(*args: Any, device: str = device.lower()) -> Any:
            cast = list(autocast(*args))
            for place in kept:
                cast[place] = args[place]
            with torch.autocast(device, enabled=False):
                return op(*cast)

        library.impl(name, rule, f"Autocast{device}")


# ---------------------------------------------------------------------------------------- sharding


def _register_sharding(
    op: torch._ops.OpOverload, batched: Sequence[str], returns_batched: Sequence[bool]
) -> None:
    """Everything replicated, or the batch split and the weights' gradients partial sums.

    Dropout numbers the whole batch, so there only replicas agree with one device.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    places = positions(op, batched)

    def tensors(args: Sequence[Any], placement: Callable[[int], Any]) -> list[Any]:
        return [placement(i) if hasattr(a, "placements") else None for i, a in enumerate(args)]

    @register_sharding(op)
    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        replicated = (
            [Replicate() for _ in returns_batched],
            tensors(args, lambda place: Replicate()),
        )
        split = (
            [Shard(0) if is_batched else Partial() for is_batched in returns_batched],
            tensors(args, lambda place: Shard(0) if place in places else Replicate()),
        )
        return [replicated] if drops(op, args) else [replicated, split]
