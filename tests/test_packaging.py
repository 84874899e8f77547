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


def build_wheel(source: Path, out: Path, native: bool) -> Path:
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "-w", out)
    run(sys.executable, "-m", "pip", "wheel", source, *flags, XATTN_BUILD_NATIVE=str(int(native)))
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


def test_sdist_has_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for pattern in ("csrc/**/*.cpp", "csrc/**/*.h", "xattn_ops/**/*.py", "models/*.py"):
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
