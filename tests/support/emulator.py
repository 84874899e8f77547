"""The CUDA kernels on the CPU: builds the emulator of tests/emulation around them and loads it.

Two flavours exist. `plain` is fast, and notices unmapped memory, damaged margins, divergent
barriers and whatever makes results wrong. `checked` looks at every access besides: bounds,
uninitialised memory, races, alignment.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from support.locks import alone
from xattn_ops import _backend, _library, _registration
from xattn_ops.kernel_report import CARDS

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "emulation"
BUILD = ROOT / "build" / "emulation"
FLAVOURS = ("plain", "checked")

COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
# Kernels read values through types of other sizes, as CUDA allows.
COMMON += ["-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
KERNEL_FLAGS = {
    "plain": ["-O2"],
    "checked": [
        "-O1",
        "-fsanitize=thread",
        *("--param", "tsan-instrument-func-entry-exit=0"),
        "-fsanitize=bounds,alignment,shift,signed-integer-overflow",
        "-fsanitize-undefined-trap-on-error",
    ],
}


class Schedule(NamedTuple):
    """What a card leaves open: which threads and blocks run first, when copies land."""

    order: str
    seed: int
    late_copies: bool


SCHEDULES = {
    "forward": Schedule("forward", 1, True),
    "backward": Schedule("backward", 1, False),
    "random_late": Schedule("random", 1, True),
    "random_early": Schedule("random", 2, False),
}
SHARED_LIMITS = {name: CARDS[name].shared for name in ("sm_80", "sm_86", "sm_90")}


def cuda_headers() -> Path | None:
    """The folder of CUDA's headers, where a toolkit is installed."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        nvcc and Path(nvcc).resolve().parents[1],
        "/usr/local/cuda",
    ]
    folders = (Path(home) / "include" for home in homes if home)
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


def missing() -> str:
    """Why the emulator cannot be built here, or ""."""
    if not _library.NATIVE:
        return f"needs the schemas of the native library: {_library.REASON}"
    if sys.platform != "linux":
        return "the emulator runs on Linux"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "the emulator needs g++"
    return "" if cuda_headers() else "the emulator needs the headers of a CUDA toolkit"


emulated = pytest.mark.skipif(bool(missing()), reason=missing() or "never")
flavours = pytest.mark.parametrize("flavour", FLAVOURS)


def module_name(flavour: str) -> str:
    """Of the Python module, and of the namespace in torch.ops."""
    return f"xattn_emulated_{flavour}"


def operator_sources() -> list[Path]:
    return sorted([*ROOT.glob("csrc/common/*.cu"), *ROOT.glob("csrc/*/*_cuda.cu")])


def _ninja_file() -> str:
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    kernels = [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", f"-isystem {cuda_headers()}"]
    kernels += [f"-isystem {path}" for path in includes]
    host = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    lines = [
        f"builddir = {BUILD}",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -L{TORCH_LIB_PATH} -ltorch -ltorch_cpu -lc10 -ldl -o $out",
    ]

    def compile_edge(source: Path, suffix: str, flags: list[str]) -> str:
        target = BUILD / f"{source.parent.name}_{source.stem}.{suffix}.o"
        lines.append(f"build {target}: compile {source}")
        lines.append(f"  flags = {' '.join([*COMMON, *flags, *kernels])}")
        return str(target)

    core = [
        compile_edge(source, "core", ["-O3", "-march=native"])
        for source in sorted(EMULATION.glob("*.cpp"))
        if source.stem != "module"
    ]
    for flavour, optimise in KERNEL_FLAGS.items():
        name = f"-DXATTN_EMULATED_OPS={module_name(flavour)}"
        language = ["-x c++", f"-include {EMULATION / 'cuda_host.h'}"]
        objects = [
            compile_edge(source, flavour, [*optimise, name, host, *language])
            for source in [*operator_sources(), *sorted(EMULATION.glob("*.cu"))]
        ]
        checked = ["-DCUDA_HOST_CHECKED"] if flavour == "checked" else []
        module = compile_edge(EMULATION / "module.cpp", flavour, ["-O1", name, *checked])
        # Of inline functions the linker keeps the first: the emulator must get its own, unchecked.
        lines.append(f"build {_library_file(flavour)}: link {' '.join([*core, module, *objects])}")
    return "\n".join(lines) + "\n"


def _library_file(flavour: str) -> Path:
    return BUILD / f"{module_name(flavour)}.so"


@functools.cache
def build() -> None:
    """Compile what changed, for both flavours."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with alone("emulation"):
        (BUILD / "build.ninja").write_text(_ninja_file())
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        done = subprocess.run(
            [ninja, "-f", BUILD / "build.ninja"], capture_output=True, text=True, cwd=ROOT
        )
    if done.returncode != 0:
        raise RuntimeError(f"the emulator does not compile:\n{done.stdout}{done.stderr}")


_libraries: list[torch.library.Library] = []  # what they define lives as long as they do


@functools.cache
def load(flavour: str) -> ModuleType:
    """The module of a flavour; its operators are then in torch.ops.xattn_emulated_<flavour>."""
    build()
    name = module_name(flavour)
    library = torch.library.Library(name, "FRAGMENT")
    _libraries.append(library)
    for op in _registration.leaf_ops():
        schema = getattr(torch.ops.xattn_ops, op).default._schema
        library.define(str(schema).split("::")[1])
    spec = importlib.util.spec_from_file_location(name, _library_file(flavour))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in _registration.leaf_ops():
        _registration.follow(op, library)
    return module


@contextmanager
def emulator(
    flavour: str,
    schedule: str = "forward",
    shared_limit: int = SHARED_LIMITS["sm_90"],
    dry: bool = False,
) -> Iterator[ModuleType]:
    """Within it backend="cuda" takes CPU tensors, and the emulator runs the kernels.

    dry: no kernel runs; the module's `launches` then tells what would have. It is what this gives.
    """
    module = load(flavour)
    module.configure(*SCHEDULES[schedule], shared_limit, dry)
    name = module_name(flavour)
    with (
        mock.patch.dict(_backend.NAMESPACES, cuda=name),
        mock.patch.dict(_backend.ORDER, cpu=("cpu", "reference", "cuda")),
        mock.patch.object(_backend, "cuda_missing", functools.partial(_missing_op, name)),
    ):
        yield module


def _missing_op(namespace: str, *names: str) -> str:
    absent = [
        name
        for name in names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "CPU")
    ]
    return f"the emulator has no {', '.join(absent)}" if absent else ""
