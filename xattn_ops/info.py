"""What is installed, what runs where, and what is missing: ``python -m xattn_ops info``."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from xattn_ops import (
    _library,
    _linear,
    available_backends,
    cls_cross_attention,
    conv_position_encoding,
    conv_relative_attention,
    cross_patch_attention,
    digest_attention,
    explain,
    inner_patch_attention,
    token_merge_enhance,
)
from xattn_ops._version import __version__

PACKAGES = ("torch", "triton", "numpy", "rich", "matplotlib")
TOOLS = ("rich", "matplotlib")
VARIABLES = ("XATTN_BACKEND", "XATTN_STRICT", "XATTN_ISA", "XATTN_LINEAR")


def describe() -> str:
    """The whole report, as text."""
    sections = {
        "Versions": _versions(),
        "Machine": _machine(),
        "Built": _built(),
        "Backends": _backends(),
        "Set in the environment": [f"{v}={os.environ[v]}" for v in VARIABLES if v in os.environ],
        "Missing": _missing(),
    }
    lines: list[str] = []
    for title, entries in sections.items():
        if entries:
            lines += [title, *(f"  {entry}" for entry in entries)]
    if not sections["Missing"]:
        lines += ["Nothing is missing."]
    return "\n".join(lines)


def _versions() -> list[str]:
    lines = [f"xattn_ops {__version__}", f"python {platform.python_version()}"]
    return lines + [f"{name} {_version(name) or 'not installed'}" for name in PACKAGES]


def _machine() -> list[str]:
    threads = torch.get_num_threads()
    lines = [
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {threads} threads",
        f"torch's CPU capability {torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return [*lines, f"CUDA {torch.version.cuda}: {name}, sm_{capability[0]}{capability[1]}"]
    if torch.version.cuda is None:
        return [*lines, "CUDA: none, this torch is built without it"]
    return [*lines, f"CUDA {torch.version.cuda} in torch, but no usable device"]


def _built() -> list[str]:
    if not _library.NATIVE:
        return ["native library: no"]
    lines = [f"native library: yes, CPU kernels for {_library.isa()}", _cuda_library()]
    if _library.unknown_isa():
        lines.append(f"XATTN_ISA={_library.unknown_isa()} is not available here and was ignored")
    chosen = "oneDNN" if _linear.PREFER_ONEDNN else "torch's own (F.linear)"
    return [*lines, f"float32 linears of the models on the CPU: {chosen}"]


def _cuda_library() -> str:
    """Whether the CUDA kernels are built, and why they do not run."""
    if find_spec("xattn_ops._C_cuda") is None:
        return "CUDA library: no"
    reason = _library.CUDA_REASON
    return f"CUDA library: yes, not loaded: {reason}" if reason else "CUDA library: yes"


def _backends() -> list[str]:
    """Each backend, then what each function would run on and why not on the others."""
    there = [f"{name}: {'yes' if yes else 'no'}" for name, yes in available_backends().items()]
    lines = [", ".join(there)]
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        for function, args, kwargs in _samples(device):
            lines += str(explain(function, *args, **kwargs)).splitlines()
    return lines


def _samples(device: str) -> list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """A smallest call of each function."""
    x, qkv = torch.zeros(1, 7, 7, 1, device=device), torch.zeros(1, 7, 7, 3, device=device)
    wide, narrow = torch.zeros(147, 49, device=device), torch.zeros(49, 49, device=device)
    tokens, kernel = torch.zeros(1, 2, 3, device=device), torch.zeros(3, 1, 3, 3, device=device)
    token, one = torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, device=device)
    return [
        (inner_patch_attention, (qkv,), {"num_heads": 1}),
        (cross_patch_attention, (x, wide, None, narrow, None), {}),
        (conv_relative_attention, (tokens, []), {"num_heads": 1, "grid": (1, 1)}),
        (conv_position_encoding, (tokens, kernel), {"grid": (1, 1)}),
        (cls_cross_attention, (token, token, *[one, None] * 3), {"num_heads": 1}),
        (digest_attention, (qkv[:, 0],), {"num_heads": 1, "grid": (1, 7)}),
        (token_merge_enhance, (tokens, kernel, kernel), {"grid": (1, 2)}),
    ]


def _missing() -> list[str]:
    """What is not there, with the way to get it."""
    lines = []
    if not _library.NATIVE:
        lines.append(f"CPU kernels: {_library.REASON}")
    if torch.version.cuda is not None and _library.CUDA_REASON:
        lines.append(f"CUDA kernels: {_library.CUDA_REASON}")
    absent = [name for name in TOOLS if _version(name) is None]
    if absent:
        lines.append(f"{' and '.join(absent)} (demo, bench): pip install 'xattn_ops[tools]'")
    if torch.cuda.is_available() and not (
        available_backends()["cuda"] or available_backends()["triton"]
    ):
        lines.append("GPU kernels: this version has none, CUDA tensors run on the reference")
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
