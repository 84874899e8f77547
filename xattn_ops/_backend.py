"""The choice of a backend, with the reason of every refusal.

The order is flat: on CUDA tensors cuda, triton, reference; on CPU tensors cpu, reference; anywhere
else the reference. Two variables steer it: XATTN_BACKEND=<name> forces a backend where the caller
named none, XATTN_STRICT=1 turns a fallback to the reference into an error.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library

BACKENDS = ("cuda", "triton", "cpu", "reference")
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
NAMESPACES = {"cuda": "xattn_ops", "triton": "xattn_triton", "cpu": "xattn_ops"}  # in torch.ops


class Call(NamedTuple):
    """What a kernel may refuse."""

    device: str
    dtype: torch.dtype


Refuse = Callable[[Call], str]  # the reason why a kernel cannot serve a call; "" where it can

_KERNELS: dict[str, dict[str, Refuse]] = {}  # function -> backend -> its refusals
_warned: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each other does not."""

    function: str
    call: Call
    backend: str | None
    refused: dict[str, str]

    def __str__(self) -> str:
        dtype = str(self.call.dtype).removeprefix("torch.")
        lines = [f"{self.function} on {self.call.device}, {dtype}: {self.backend or 'no backend'}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.refused.items()])


def serve(function: str, **kernels: Refuse) -> None:
    """Make `function` known, with its kernels besides the reference: backend -> its refusals."""
    _KERNELS[function] = kernels


def refusal(function: str, backend: str, call: Call) -> str:
    """Why `backend` cannot serve this call of `function`; "" where it can."""
    if backend == "reference":
        return ""
    if backend not in _KERNELS[function]:
        return f"{function} has no {backend} kernel in this version"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend not in ORDER.get(call.device, ()) and not (interpreted and call.device == "cpu"):
        return f"it does not take {call.device} tensors"
    return _KERNELS[function][backend](call)


@functools.cache
def _triton_missing(kernels: str) -> str:
    """Why these Triton kernels cannot be loaded, or ""; loads them, and Triton with the first."""
    try:
        importlib.import_module(kernels)
    except ImportError as error:
        return f"its Triton kernels could not be loaded ({error}); install triton"
    return ""


def triton(kernels: str) -> Refuse:
    """The refusals of the Triton kernels in the module of this name, for `serve`."""

    def refuse(call: Call) -> str:
        if call.dtype == torch.float64:
            return "its Triton kernels take float32, bfloat16 or float16, got float64"
        return _triton_missing(kernels)

    return refuse


def cuda(*ops: str) -> Refuse:
    """The refusals of the CUDA kernels of these ops, for `serve`."""

    def refuse(call: Call) -> str:
        if call.dtype == torch.float64:
            return "its CUDA kernels take float32, bfloat16 or float16, got float64"
        return cuda_missing(*ops)

    return refuse


def cuda_missing(*ops: str) -> str:
    """Why the CUDA kernels of these ops cannot run on the current card, or ""."""
    if _library.CUDA_REASON:
        return _library.CUDA_REASON
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    absent = [op for op in ops if not has_kernel(f"xattn_ops::{op}", "CUDA")]
    if absent:
        return f"the native library has no CUDA kernel of {', '.join(absent)}"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability()) < (8, 0):
        there = ".".join(map(str, capability))
        return f"its CUDA kernels need compute capability 8.0, this card has {there}"
    return ""


def kernels(backend: str) -> Any:
    """The namespace in torch.ops that holds the ops of a backend."""
    return getattr(torch.ops, NAMESPACES[backend])


def choose(function: str, backend: str | None, device: str, dtype: torch.dtype) -> str:
    """The backend that serves a call; raises where the one asked for cannot."""
    call = Call(device, dtype)
    source, asked = _asked(backend)
    if asked is not None:
        if why := refusal(function, asked, call):
            raise ValueError(f"{source} {asked!r} cannot serve {function}: {why}")
        return asked
    refused = {}
    for name in ORDER.get(device, ("reference",)):
        why = refusal(function, name, call)
        if not why:
            break
        refused[name] = why
    if refused and name == "reference":
        _fall_back(function, device, refused)
    return name


# torch.compile calls `choose` while it traces and keeps the name, so neither the environment nor
# the warning breaks the graph. This is torch.compiler.assume_constant_result, which would import
# the compiler (seconds) here.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _asked(backend: str | None) -> tuple[str, str | None]:
    """The backend that the caller or else the environment names, and which of the two it was."""
    source, asked = "backend", backend
    if asked is None:
        source, asked = "XATTN_BACKEND", os.environ.get("XATTN_BACKEND") or None
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {asked!r}")
    return source, asked


def _fall_back(function: str, device: str, refused: dict[str, str]) -> None:
    """Warn, once a function and device, that the slow reference serves; an error if strict."""
    reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
    message = f"{function} falls back to the PyTorch reference on {device} tensors ({reasons})"
    if os.environ.get("XATTN_STRICT", "0") not in ("", "0"):
        raise RuntimeError(f"{message}, and XATTN_STRICT forbids it")
    if (function, device) not in _warned:
        _warned.add((function, device))
        warnings.warn(message, stacklevel=4)


def available_backends() -> dict[str, bool]:
    """Each backend's name, and whether it can serve at least one function on this machine."""
    devices = {"cuda": torch.cuda.is_available(), "cpu": True}
    calls = [Call(device, torch.float32) for device, there in devices.items() if there]
    return {
        backend: any(not refusal(name, backend, call) for name in _KERNELS for call in calls)
        for backend in BACKENDS
    }


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` would run on, and why each other would not.

    Nothing is computed and nothing raises where a named backend cannot serve: `backend` is then
    None and `refused` has the reason. `print` shows one line a backend.
    """
    name = getattr(function, "__name__", "")
    if name not in _KERNELS:
        raise ValueError(f"explain takes one of {', '.join(_KERNELS)}, got {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    tensor = next((value for value in bound.values() if isinstance(value, Tensor)), None)
    if tensor is None:
        raise TypeError(f"explain needs the tensors that {name} takes, got none")
    call = Call(tensor.device.type, tensor.dtype)
    _, asked = _asked(bound.get("backend"))
    reasons = {backend: refusal(name, backend, call) for backend in BACKENDS}
    order = (asked,) if asked else ORDER.get(call.device, ("reference",))
    chosen = next((backend for backend in order if not reasons[backend]), None)
    other = f"{asked} was asked for" if asked else f"{chosen} comes first"
    refused = {b: reason or other for b, reason in reasons.items() if b != chosen}
    return Explanation(name, call, chosen, refused)
