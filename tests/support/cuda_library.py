"""The library of the CUDA kernels as setup.py builds it, for tests that look into it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "tests"


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return bool(shutil.which("nvcc")) or Path(home, "bin", "nvcc").exists()


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc, of a CUDA toolkit")


@functools.cache
def cuda_library() -> Path:
    """Built for every architecture, beside whatever torch is there; only what changed."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(BUILD)]
    environment = {k: v for k, v in os.environ.items() if k != "XATTN_CUDA_ARCHS"}
    environment |= {"XATTN_BUILD_NATIVE": "0", "XATTN_BUILD_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = BUILD.glob("xattn_ops/_C_cuda*.so")
    return library
