"""The wheel and the sdist: what a user installs, tried in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.cuda_library import cuda_library, needs_nvcc
from support.locks import alone

ROOT = Path(__file__).parents[1]

SMOKE = """
import sys, torch, xattn_ops
from xattn_ops import _library, inner_patch_attention
from xattn_ops.models import create_model
import xattn_ops.benchmarks

assert xattn_ops.__file__.startswith(sys.argv[1]), xattn_ops.__file__
assert _library.NATIVE == (sys.argv[2] == "native"), _library.REASON
qkv = torch.randn(2, 9, 8, 3 * 32, requires_grad=True)
inner_patch_attention(qkv, num_heads=1).sum().backward()
assert qkv.grad.isfinite().all()
assert create_model("cat_tiny", num_classes=3).eval()(torch.randn(1, 3, 224, 224)).shape == (1, 3)
print(_library.REASON or _library.isa())
"""


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, out: Path, native: bool, cuda: bool = False) -> Path:
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "-w", out)
    built = {"XATTN_BUILD_NATIVE": str(int(native)), "XATTN_BUILD_CUDA": str(int(cuda))}
    with alone("native"):
        run(sys.executable, "-m", "pip", "wheel", source, *flags, **built)
    (wheel,) = out.glob("*.whl")
    return wheel


def smoke(wheel: Path, site: Path, expected: str) -> str:
    """Install the wheel, and use it where no compiler can be found."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    return run(
        *(sys.executable, "-S", "-W", "ignore", "-c", SMOKE, site, expected),
        cwd=site,
        # -S: torch is found, but not the checkout, which an editable install adds in `site`
        PYTHONPATH=os.pathsep.join([str(site), sysconfig.get_paths()["purelib"]]),
        PATH="",
        CXX="no-compiler",
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT)
    (archive,) = out.glob("*.tar.gz")
    return archive


def test_wheel_is_one_abi3_binary_that_runs(tmp_path: Path) -> None:
    wheel = build_wheel(ROOT, tmp_path, native=True)
    assert "-cp310-abi3-" in wheel.name
    binaries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert binaries == ["xattn_ops/_C.abi3.so"]
    isa = smoke(wheel, tmp_path / "site", "native").strip()
    assert isa in ("generic", "avx2", "avx512", "avx512_bf16")


@needs_nvcc
def test_wheel_with_cuda_kernels_runs_without_cuda(tmp_path: Path) -> None:
    """One wheel for every machine: the CUDA library is in it, and no CPU torch minds."""
    cuda_library()  # compiled once for all tests
    wheel = build_wheel(ROOT, tmp_path, native=True, cuda=True)
    assert "-cp310-abi3-" in wheel.name
    binaries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert sorted(binaries) == ["xattn_ops/_C.abi3.so", "xattn_ops/_C_cuda.abi3.so"]
    smoke(wheel, tmp_path / "site", "native")


# setup.py beside a torch that has CUDA
BESIDE_CUDA = """
import runpy, sys, torch
torch.version.cuda = "13.0"
sys.argv = ["setup.py", "build_ext", "--build-lib", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("wanted", "said", "succeeds"),
    [
        pytest.param("auto", "no CUDA kernels: ", True, id="auto"),
        pytest.param("0", "no CUDA kernels: they are not wanted", True, id="never"),
        pytest.param("1", "build stopped", False, id="always"),
    ],
)
def test_a_failing_nvcc(wanted: str, said: str, succeeds: bool, tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    environment = {"XATTN_BUILD_CUDA": wanted, "CUDA_HOME": str(tmp_path / "cuda")}
    with alone("native"):
        done = subprocess.run(
            [sys.executable, "-c", BESIDE_CUDA, str(tmp_path / "out")],
            env=os.environ | {"XATTN_BUILD_NATIVE": "0"} | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert not list(tmp_path.glob("out/xattn_ops/*.so"))


def test_no_cuda_kernels_beside_a_torch_without_cuda(tmp_path: Path) -> None:
    """Unless they are asked for: this torch could not load them."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path)
    said = run(*command, XATTN_BUILD_NATIVE="0", XATTN_BUILD_CUDA="auto")
    assert "no CUDA kernels: this torch has no CUDA" in said


@pytest.mark.parametrize("archs", ["", "9", "sm_90", "8.0 x"])
def test_architectures_that_are_none(archs: str) -> None:
    setup = (ROOT / "setup.py").read_text().split("\nsetup(\n")[0]
    names: dict[str, object] = {"__file__": str(ROOT / "setup.py")}
    exec(setup, names)
    with pytest.raises(ValueError, match=r"XATTN_CUDA_ARCHS must be like '8\.0 9\.0\+PTX', got"):
        names["cuda_codes"](archs)
    assert names["cuda_codes"]("8.6;8.0, 9.0a+PTX") == [
        "-gencode=arch=compute_80,code=[sm_86,sm_80,sm_90a,compute_80]"
    ]


def test_sdist_has_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for pattern in ("csrc/**/*.c*", "csrc/**/*.h", "xattn_ops/**/*.py", "models/*.py"):
        for path in ROOT.glob(pattern):
            assert path.relative_to(ROOT).as_posix() in held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "benchmarks/runner.py"} <= held


def test_sdist_without_a_compiler_gives_a_working_package(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, native=False)
    assert "No module named 'xattn_ops._C'" in smoke(wheel, tmp_path / "site", "reference")


def test_a_failing_compiler_does_not_fail_the_installation(sdist: Path, tmp_path: Path) -> None:
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path)
    run(sys.executable, "-m", "pip", "wheel", sdist, *flags, CXX="false")
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
