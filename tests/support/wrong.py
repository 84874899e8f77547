"""Wrong arguments and what must be said to them: tables that many functions have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from xattn_ops import _backend

Wrong = tuple[str, type[Exception], str, dict[str, Any]]  # id, error, message, arguments

DENSE = "float32, bfloat16, float16 or float64"


def wrong(id: str, error: type[Exception], message: str, **arguments: Any) -> Wrong:
    """Arguments that a function must refuse, and what it must say."""
    return id, error, message, arguments


def of_type(message: str, **arguments: Any) -> Wrong:
    """A TypeError; the id is the name of the argument and what came."""
    return wrong(_id(arguments), TypeError, message, **arguments)


def of_value(message: str, **arguments: Any) -> Wrong:
    """A ValueError, likewise."""
    return wrong(_id(arguments), ValueError, message, **arguments)


def _id(arguments: dict[str, Any]) -> str:
    return "_".join(f"{name}_{_spelled(value)}" for name, value in arguments.items())


def _spelled(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "x".join(map(_spelled, value)) or "nothing"
    if isinstance(value, torch.Tensor):
        kind = [str(part).removeprefix("torch.") for part in (value.dtype, value.device.type)]
        usual = {"float32", "cpu"}
        return "x".join(["of", *map(str, value.shape)]) + "".join(
            f"_{part}" for part in kind if part not in usual
        )
    return str(value)


def refuses(function: Callable[..., Any], good: dict[str, Any], *cases: Wrong) -> Any:
    """A test: `function` takes the good arguments, and none with a wrong one among them."""

    @pytest.mark.parametrize(
        ("error", "message", "arguments"), [pytest.param(*rest, id=id) for id, *rest in cases]
    )
    def test(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
        function(**good)
        with pytest.raises(error, match=re.escape(message)):
            function(**good | arguments)

    return test


# ---------------------------------------------------------------------------------------- tensors


def activation(name: str, layout: str, *sizes: int) -> list[Wrong]:
    """What every first tensor refuses, right with these sizes."""
    head, flat = f"{name} must be {layout}", (*sizes[:-2], sizes[-2] * sizes[-1])
    empty = [(*sizes[:i], 0, *sizes[i + 1 :]) for i in range(1, len(sizes))]
    return [
        *_no_tensor(name, layout, *sizes),
        *(
            of_value(f"{head}, got shape {list(shape)}", **{name: torch.zeros(shape)})
            for shape in (sizes[1:], flat, (1, *sizes))
        ),
        *(
            of_value(
                f"{head} with every size but the first at least 1, got shape {list(shape)}",
                **{name: torch.zeros(shape)},
            )
            for shape in empty
        ),
    ]


def companion(name: str, layout: str, *sizes: int, of: str, exact: bool = True) -> list[Wrong]:
    """What a tensor refuses that goes with the tensor `of`; exact: whether its sizes follow."""
    other = [torch.float64, torch.bfloat16, torch.float16]
    rank = [(1, *sizes), sizes[1:]] if len(sizes) > 1 else [(1, *sizes)]
    larger = [(*sizes[:i], s + 1, *sizes[i + 1 :]) for i, s in enumerate(sizes)]
    return [
        *_no_tensor(name, layout, *sizes)[1:],
        *(
            of_type(
                f"{name} must have the dtype of {of}, torch.float32, got {dtype}",
                **{name: torch.zeros(sizes, dtype=dtype)},
            )
            for dtype in other
        ),
        of_value(
            f"{name} must be on the device of {of}, cpu, got meta",
            **{name: torch.zeros(sizes, device="meta")},
        ),
        *(
            of_value(
                f"{name} must be {layout}, got shape {list(shape)}", **{name: torch.zeros(shape)}
            )
            for shape in rank
        ),
        *(
            of_value(
                f"{name} must be {layout} = {list(sizes)}, got shape {list(shape)}",
                **{name: torch.zeros(shape)},
            )
            for shape in larger
            if exact
        ),
    ]


def required(name: str, layout: str) -> Wrong:
    return of_type(f"{name} must be a tensor {layout}, got NoneType", **{name: None})


def depthwise(
    name: str, layout: str, channels: int, k: int, of: str, exact: bool = True
) -> list[Wrong]:
    """What the weight of a depthwise convolution refuses; exact: whether `channels` are known."""
    shapes = [(channels, channels, k, k), (channels, 1, k, k + 2), (channels, 1, k + 1, k + 1)]
    few = [(channels - 1, 1, k, k)] if exact else []
    return [
        required(name, layout),
        *companion(name, layout, channels, 1, k, k, of=of, exact=False),
        *(
            of_value(
                f"{name} must be {layout} with {what}, got shape {list(shape)}",
                **{name: torch.zeros(shape)},
            )
            for what, group in (("odd k", [*shapes, (0, 1, k, k)]), (f"C = {channels}", few))
            for shape in group
        ),
    ]


def _no_tensor(name: str, layout: str, *sizes: int) -> list[Wrong]:
    given = torch.zeros(sizes)
    return [
        required(name, layout),
        of_type(f"{name} must be a tensor {layout}, got list", **{name: [1.0]}),
        of_type(f"{name} must be a tensor {layout}, got tuple", **{name: ()}),
        wrong(
            f"{name}_sparse",
            TypeError,
            f"{name} must be a dense (strided) tensor, got torch.sparse_coo",
            **{name: given.to_sparse()},
        ),
        *(
            of_type(f"{name} must be {DENSE}, got {dtype}", **{name: given.to(dtype)})
            for dtype in (torch.int64, torch.bool, torch.complex64)
        ),
    ]


# ---------------------------------------------------------------------------------------- options


def integer(name: str, low: int) -> list[Wrong]:
    kinds = {"float": float(low + 1), "bool": True, "str": "1", "NoneType": None}
    return [
        *(
            of_type(f"{name} must be an int, got {kind}", **{name: value})
            for kind, value in kinds.items()
        ),
        of_value(f"{name} must be at least {low}, got {low - 1}", **{name: low - 1}),
    ]


def pair(name: str, low: int) -> list[Wrong]:
    """Of (rows, columns), each at least `low`."""
    what = f"{name} must be a pair of ints (rows, columns)"
    n = low + 1
    return [
        of_type(f"{what}, got 7", **{name: 7}),
        of_value(f"{what}, got (7,)", **{name: (7,)}),
        of_value(f"{what}, got (7, 7, 7)", **{name: (7, 7, 7)}),
        of_type(f"{name}[0] must be an int, got float", **{name: (float(n), n)}),
        of_type(f"{name}[1] must be an int, got bool", **{name: (n, True)}),
        of_type(f"{name}[1] must be an int, got str", **{name: (n, "3")}),
        of_value(f"{name}[0] must be at least {low}, got {low - 1}", **{name: (low - 1, n)}),
        of_value(f"{name}[1] must be at least {low}, got {low - 1}", **{name: (n, low - 1)}),
    ]


def token_grid(name: str, prefix: int, rows: int, columns: int) -> list[Wrong]:
    """Of the grid and the prefix tokens of the tensor `name`."""
    N = prefix + rows * columns
    what = f"{name} must have num_prefix_tokens + rows * columns tokens"
    fewer = rows * (columns - 1)
    return [
        *pair("grid", 1),
        *integer("num_prefix_tokens", 0),
        of_value(
            f"{what}, {prefix} + {rows} * {columns - 1} = {prefix + fewer}, got {N}",
            grid=(rows, columns - 1),
        ),
        of_value(
            f"{what}, {prefix + 1} + {rows} * {columns} = {N + 1}, got {N}",
            num_prefix_tokens=prefix + 1,
        ),
    ]


def heads_of(name: str, channels: int) -> list[Wrong]:
    """Of num_heads where the tensor `name` is laid out (3, num_heads, D)."""
    what = f"{name} must have 3 * num_heads * D channels with num_heads"
    return [
        *integer("num_heads", 1),
        of_value(f"{what}=5, got {channels}", num_heads=5),
    ]


def scale() -> list[Wrong]:
    kinds = {"str": "0.1", "bool": True, "Tensor": torch.ones(())}
    return [
        of_type(f"scale must be a float or None, got {kind}", scale=value)
        for kind, value in kinds.items()
    ]


def probability(name: str) -> list[Wrong]:
    kinds = {"str": "0.1", "bool": True, "NoneType": None}
    return [
        *(
            of_type(f"{name} must be a float, got {kind}", **{name: value})
            for kind, value in kinds.items()
        ),
        *(
            of_value(f"{name} must be in [0, 1), got {value}", **{name: value})
            for value in (-0.1, -1, 1.0, 2, math.nan)
        ),
    ]


def backend(function: Callable[..., Any]) -> list[Wrong]:
    """Unknown ones, and those that the function has no kernels for."""
    name = function.__name__
    return [
        of_value("backend must be one of cuda, triton, cpu, reference, got 'gpu'", backend="gpu"),
        *(
            of_value(
                f"backend '{other}' cannot serve {name}: "
                f"{name} has no {other} kernel in this version",
                backend=other,
            )
            for other in ("cuda", "triton")
            if other not in _backend._KERNELS[name]
        ),
    ]
