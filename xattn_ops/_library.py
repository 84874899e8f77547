"""Loads the native library. Importing this module never fails.

``NATIVE`` tells whether the CPU kernels are there; if not, ``REASON`` says why, and every operator
runs on its PyTorch reference.
"""

from __future__ import annotations

import importlib
import os

import torch  # noqa: F401  (its libraries must be loaded before ours)

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


def isa() -> str:
    """Name of the instruction set whose CPU kernels run, or "" without the native library."""
    return _C.isa() if NATIVE else ""


def unknown_isa() -> str:
    """What the environment variable XATTN_ISA asks for in vain, or ""."""
    wanted = os.environ.get("XATTN_ISA", "")
    return wanted if NATIVE and wanted and wanted != isa() else ""
