"""Loads the native libraries. Importing this module never fails.

``NATIVE`` tells whether the CPU kernels are there; if not, ``REASON`` says why, and every operator
runs on its PyTorch reference. ``CUDA_REASON`` says why the CUDA kernels are not there, or "".
"""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path

import torch  # its libraries must be loaded before ours

NATIVE = False
REASON = ""

try:
    _C = importlib.import_module("xattn_ops._C")
    NATIVE = True
except ImportError as error:
    REASON = (
        f"the native library xattn_ops._C could not be loaded ({error}); "
        "install a C++17 compiler (GCC 12+ or Clang 15+) and reinstall xattn_ops to build it"
    )


def _load_cuda() -> str:
    """Load the CUDA kernels; why they cannot run, or ""."""
    if not NATIVE:
        return REASON
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        # Our library is built beside any torch, so it does not name this one; it must be global.
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cuda.so"), ctypes.RTLD_GLOBAL)
        library = importlib.import_module("xattn_ops._C_cuda")
    except (ImportError, OSError) as error:
        return (
            f"the CUDA library xattn_ops._C_cuda could not be loaded ({error}); "
            "install a CUDA toolkit (nvcc) and reinstall xattn_ops to build it"
        )
    return _old_driver(library.toolkit(), library.driver())


def _old_driver(toolkit: int, driver: int) -> str:
    """Within a major version of CUDA every driver runs every toolkit's kernels."""
    if driver // 1000 >= toolkit // 1000:
        return ""
    built, there = (f"{version // 1000}.{version % 1000 // 10}" for version in (toolkit, driver))
    return f"its CUDA kernels are built with CUDA {built}, this driver goes up to {there}"


CUDA_REASON = _load_cuda()


def isa() -> str:
    """Name of the instruction set whose CPU kernels run, or "" without the native library."""
    return _C.isa() if NATIVE else ""


def unknown_isa() -> str:
    """What the environment variable XATTN_ISA asks for in vain, or ""."""
    wanted = os.environ.get("XATTN_ISA", "")
    return wanted if NATIVE and wanted and wanted != isa() else ""
