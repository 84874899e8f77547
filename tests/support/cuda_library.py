"""The library of the CUDA kernels as setup.py builds it, for tests that look into it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from support.locks import alone
from xattn_ops.kernel_report.cards import CUDA_ARCHITECTURES
from xattn_ops.kernel_report.cuda import CudaFigures, figures

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "tests"


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return bool(shutil.which("nvcc")) or Path(home, "bin", "nvcc").exists()


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc, of a CUDA toolkit")


@functools.cache
def cuda_library() -> Path:
    """Built beside whatever torch is there; only what changed, and once for all test processes:
    each build links the library anew, which another process may be reading."""
    session, built_by = os.environ.get("PYTEST_XDIST_TESTRUNUID"), BUILD / "built_by"
    with alone("native"):
        if session is None or not built_by.exists() or built_by.read_text() != session:
            _build()
            built_by.write_text(session or "")
    (library,) = BUILD.glob("xattn_ops/_C_cuda*.so")
    return library


def _build() -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(BUILD)]
    wanted = {"XATTN_BUILD_NATIVE": "0", "XATTN_BUILD_CUDA": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | wanted, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


DISASSEMBLED = ("sm_80", "sm_90")  # whose instructions are counted: that takes long


@functools.cache
def cuda_figures() -> list[CudaFigures]:
    """Of every kernel on every architecture; counted once for all test processes."""
    library, kept = cuda_library(), BUILD / "figures.json"
    with alone("figures"):
        if not kept.exists() or kept.stat().st_mtime < library.stat().st_mtime:
            others = [card for card in CUDA_ARCHITECTURES if card not in DISASSEMBLED]
            rows = figures(library, DISASSEMBLED)
            rows += figures(library, others, instructions=False)
            kept.write_text(json.dumps([asdict(row) for row in rows]))
    return [CudaFigures(**row) for row in json.loads(kept.read_text())]
