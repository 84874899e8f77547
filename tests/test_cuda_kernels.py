"""The CUDA kernels as nvcc builds them: architectures, registers, shared memory, tensor cores; and
that the library registers every kernel, beside a torch that has no CUDA."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cuda_library import DISASSEMBLED, cuda_figures, cuda_library, needs_nvcc
from support.emulator import emulated, emulator
from test_cuda import KERNELS

from xattn_ops.benchmarks.cases import SHAPES, STEP, build
from xattn_ops.kernel_report.cards import CARDS, CUDA_ARCHITECTURES
from xattn_ops.kernel_report.cuda import CudaFigures, kernels, readable, short_name

pytestmark = needs_nvcc
WITHOUT_PRODUCTS = {"merge", "convpos"}  # depthwise convolutions alone


@pytest.fixture(scope="module")
def rows() -> list[CudaFigures]:
    return cuda_figures()


def test_every_architecture_is_built() -> None:
    built = {arch: sorted(readable(names)) for arch, names in kernels(cuda_library()).items()}
    assert set(built) == set(CUDA_ARCHITECTURES)
    assert all(built.values())
    assert all(names == built["sm_80"] for names in built.values())


@functools.cache
def launches(op: str, stage: int, shared_limit: int) -> dict[str, int]:
    """The kernels of a training step at a shape of the paper -> their dynamic shared memory."""
    case = build(op, stage, 2, torch.bfloat16, STEP)
    ours = next(iter(case.ours.values()))
    with emulator("plain", shared_limit=shared_limit, dry=True) as module:
        outs = ours.forward()
        ours.step([torch.zeros_like(out) for out in outs])
        return {short_name(name): shared for name, shared in module.launches()}


@emulated
@pytest.mark.parametrize("card", CUDA_ARCHITECTURES)
@pytest.mark.parametrize(
    ("op", "stage"),
    [pytest.param(op, i, id=f"{op}-{s}") for op in KERNELS for i, s in enumerate(SHAPES[op])],
)
def test_papers_shapes(
    op: str, stage: int, card: str, rows: list[CudaFigures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16: nothing spilled, shared memory within the card's, products on tensor cores."""
    monkeypatch.setenv("XATTN_BACKEND", "cuda")
    built = {row.kernel: row for row in rows if row.architecture == card}
    launched = launches(op, stage, CARDS[card].shared)
    assert launched
    for kernel, dynamic in launched.items():
        row = built[kernel]
        assert row.stack == 0, f"{kernel}: {row.stack} bytes of local memory"
        assert row.shared + dynamic <= CARDS[card].shared, kernel
    if op not in WITHOUT_PRODUCTS and card in DISASSEMBLED:
        assert any(built[kernel].matrix for kernel in launched)


LOADS = """
import ctypes, importlib.util, sys, torch
import xattn_ops
from xattn_ops import _registration

ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("xattn_ops._C_cuda", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.toolkit() >= 12000 and module.driver() >= 0
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(op for op in _registration.leaf_ops() if has(f"xattn_ops::{op}", "CUDA")))
"""


def test_library_registers_every_kernel(tmp_path: Path) -> None:
    """All that it wants of a CUDA torch is the current stream."""
    source, stub = tmp_path / "stub.c", tmp_path / "libtorch_cuda.so"
    source.write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"
    )
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", stub], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, stub, cuda_library()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {f"{op}_{way}" for op in KERNELS for way in ("fwd", "bwd")}


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn_ops.cli import main
    from xattn_ops.kernel_report import cuda

    monkeypatch.setattr(cuda, "library", cuda_library)
    assert main(["kernels", "ipsa", "--backend", "cuda", "--arch", "sm_90"]) == 0
    text = capsys.readouterr().out
    assert "CUDA kernels, as built" in text
    assert "ipsa_cuda::backward_bias<__nv_bfloat16>" in text
    assert "float32" not in text
    assert "sum_parts" not in text
    assert "sm_80" not in text


def test_report_without_a_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from xattn_ops.cli import main
    from xattn_ops.kernel_report import cuda

    monkeypatch.setattr(cuda, "library", lambda: None)
    assert main(["kernels", "--backend", "cuda"]) == 0
    assert "CUDA kernels: none are built for this" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void xattn::ipsa_cuda::forward<float, true>(xattn::Args)",
            "ipsa_cuda::forward<float, true>",
        ),
        ("xattn::(anonymous namespace)::sum(float*)", "sum"),
        ("void xattn::_GLOBAL__N__1a2b_sum_cu_3c::sum<__half>(int)", "sum<__half>"),
        ("void xattn::k<(xattn::Kind)1>(int (*)(int))", "k<(Kind)1>"),
    ],
)
def test_short_name(demangled: str, short: str) -> None:
    assert short_name(demangled) == short
