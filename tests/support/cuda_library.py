"""The library of the CUDA kernels as setup.py builds it, for tests that look into it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.locks import alone

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "tests"


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return bool(shutil.which("nvcc")) or Path(home, "bin", "nvcc").exists()


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc, of a CUDA toolkit")


# All architectures are made from the same intermediate code (see setup.py), so these two show what
# there is to see; for the others CI has no time.
ARCHITECTURES = ("sm_80", "sm_90")
CUDA_ARCHS = {"XATTN_CUDA_ARCHS": "8.0 9.0"}


@functools.cache
def cuda_library() -> Path:
    """Built beside whatever torch is there; only what changed."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(BUILD)]
    wanted = {"XATTN_BUILD_NATIVE": "0", "XATTN_BUILD_CUDA": "1"} | CUDA_ARCHS
    with alone("native"):
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | wanted, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = BUILD.glob("xattn_ops/_C_cuda*.so")
    return library
