"""Argument checks, made once, in the public functions.

Every message names the argument, says what is allowed and shows what came. A wrong type or dtype
is a `TypeError`, anything else a `ValueError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_plans: dict[Any, Any] = {}
_MOST_PLANS = 4096


def once(plan: Callable[..., Any], tensors: Sequence[Any], options: tuple[Any, ...]) -> Any:
    """`plan(*tensors, *options)`, computed once for tensors of the same kind and equal options.

    `plan` checks its arguments and returns what follows from them; it reads shapes, dtypes, devices
    and the environment's XATTN_BACKEND, never values. A model repeats its calls, and with cold
    caches the checks took as long as a kernel on a small map.
    """
    if torch.compiler.is_compiling():  # once per trace anyway, and sizes may be symbols
        return plan(*tensors, *options)
    # By their spelling, for 7, 7.0 and True would be equal keys, and a list would be none.
    key = (plan, os.environ.get("XATTN_BACKEND"), repr(options), *map(_kind, tensors))
    found = _plans.get(key)
    if found is None:
        found = plan(*tensors, *options)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        if found[0] != "reference":  # a fallback may have to warn
            _plans[key] = found
    return found


def _kind(value: Any) -> Any:
    """All that a plan may read of a tensor, or of a list of tensors."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.device, value.layout
    if isinstance(value, (list, tuple)):
        return type(value), *map(_kind, value)
    return type(value)


def tensor(
    name: str,
    value: Any,
    layout: str,
    *,
    sizes: Sequence[int] | None = None,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """A dense floating tensor of the rank that `layout`, such as "[B, H, W, 3C]", spells out.

    sizes: the exact sizes, where they are known. like: (name, tensor) whose dtype and device
    `value` must share; without it `value` is the activation, empty in its first axis alone.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {value.layout}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if like is not None:
        other, reference = like
        if value.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {other}, {reference.dtype}, got {value.dtype}"
            )
        if value.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {other}, {reference.device}, got {value.device}"
            )
    if value.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must be {layout}, got shape {list(value.shape)}")
    if sizes is not None and tuple(value.shape) != tuple(sizes):
        raise ValueError(f"{name} must be {layout} = {list(sizes)}, got shape {list(value.shape)}")
    if like is None and any(size < 1 for size in value.shape[1:]):
        raise ValueError(
            f"{name} must be {layout} with every size but the first at least 1, "
            f"got shape {list(value.shape)}"
        )


def sequence(name: str, value: Any, layout: str) -> None:
    """A list or a tuple, of tensors of this layout."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors {layout}, got {type(value).__name__}")


def depthwise(
    name: str,
    value: Any,
    layout: str,
    *,
    like: tuple[str, Tensor],
    channels: int | None = None,
) -> None:
    """The weight of a depthwise convolution: one square kernel of odd size for each channel.

    channels: how many, where that is known.
    """
    tensor(name, value, layout, like=like)
    count, one, rows, columns = value.shape
    if one != 1 or rows != columns or rows % 2 != 1 or count < 1:
        raise ValueError(f"{name} must be {layout} with odd k, got shape {list(value.shape)}")
    if channels is not None and count != channels:
        raise ValueError(
            f"{name} must be {layout} with C = {channels}, got shape {list(value.shape)}"
        )


def token_grid(name: str, value: Tensor, grid: Any, num_prefix_tokens: Any) -> tuple[int, int]:
    """Rows and columns of an activation [B, num_prefix_tokens + rows * columns, channels]."""
    rows, columns = pair("grid", grid, 1)
    prefix = integer("num_prefix_tokens", num_prefix_tokens, 0)
    if value.shape[1] != prefix + rows * columns:
        raise ValueError(
            f"{name} must have num_prefix_tokens + rows * columns tokens, "
            f"{prefix} + {rows} * {columns} = {prefix + rows * columns}, got {value.shape[1]}"
        )
    return rows, columns


def integer(name: str, value: Any, low: int) -> Any:
    """An int of at least `low`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def odd(name: str, value: Any) -> int:
    """An odd int of at least 1."""
    if integer(name, value, 1) % 2 != 1:
        raise ValueError(f"{name} must be odd, got {value}")
    return value


def pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """Two ints (rows, columns), each at least `low`."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a pair of ints (rows, columns), got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair of ints (rows, columns), got {value!r}")
    return integer(f"{name}[0]", value[0], low), integer(f"{name}[1]", value[1], low)


def shift(value: Any, window: tuple[int, int]) -> tuple[int, int]:
    """A roll smaller than the window in each axis."""
    rolled = pair("shift", value, 0)
    if rolled[0] >= window[0] or rolled[1] >= window[1]:
        raise ValueError(f"shift must be smaller than window {window}, got {rolled}")
    return rolled


def divides(name: str, value: Any, whole: str, size: int) -> int:
    """An int of at least 1 that divides `size`, named `whole`; returns the quotient."""
    integer(name, value, 1)
    if size % value != 0:
        raise ValueError(f"{name} must divide {whole}, {size}, got {value}")
    return size // value


def head_dim(name: str, value: Tensor, groups: int, num_heads: int) -> int:
    """D of an activation whose last axis is laid out (groups, num_heads, D)."""
    integer("num_heads", num_heads, 1)
    channels = value.shape[-1]
    if channels % (groups * num_heads) != 0:
        raise ValueError(
            f"{name} must have {groups} * num_heads * D channels with num_heads={num_heads}, "
            f"got {channels}"
        )
    return channels // (groups * num_heads)


def scale(value: Any, head_dim: int) -> float:
    """The factor on the logits: any number, 0.0 too; None is head_dim ** -0.5."""
    if value is None:
        return head_dim**-0.5
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be a float or None, got {type(value).__name__}")
    return float(value)


def nonnegative(name: str, value: Any) -> float:
    """A number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return float(value)


def probability(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return float(value)
