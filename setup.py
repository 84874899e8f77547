"""Build of the native library `xattn_ops._C`: every kernel file once per instruction set.

A missing compiler or a failed compilation does not fail the installation: the package then runs on
its PyTorch references and says so. Environment:

XATTN_BUILD_NATIVE  0 skips the native build, 1 makes its failure an error (default: try)
MAX_JOBS            compilations at a time (default: all cores)
CXX                 the C++ compiler (default: c++)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",  # false alarms inside the intrinsics of GCC 12
    "-Wno-psabi",  # vectors wider than the baseline ABI never cross a translation unit
]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_FLAGS += ["-mprefer-vector-width=512"]
ISA_FLAGS: dict[str, list[str]] = {"generic": []}
if IS_X86:
    ISA_FLAGS |= {
        "avx2": AVX2_FLAGS,
        "avx512": AVX512_FLAGS,
        "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    }


def host_sources() -> list[Path]:
    """Files compiled once: schemas, tensor checks, registration."""
    return [CSRC / "library.cpp", *sorted(CSRC.glob("*/*_cpu.cpp"))]


def kernel_sources() -> list[Path]:
    """Files compiled once per instruction set; they include no torch header."""
    return sorted(CSRC.glob("*/*_cpu_kernels.cpp"))


def torch_paths() -> tuple[list[str], str]:
    """Include flags and the library folder of the torch that the build sees."""
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    includes = [str(CSRC), *include_paths(), sysconfig.get_paths()["include"]]
    return [f"-I{path}" for path in includes], TORCH_LIB_PATH


def ninja_file(target: Path, build_dir: Path) -> str:
    """The whole native build: one edge per object, one for the link."""
    from torch.torch_version import TorchVersion  # noqa: F401  (fails early without torch)

    includes, torch_lib = torch_paths()
    host_defines = [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # stable ABI of torch 2.10
        "-DPy_LIMITED_API=0x030a0000",
        *(["-DXATTN_X86"] if IS_X86 else []),
    ]
    link = ["-shared", f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup"]

    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    lines = [
        f"builddir = {escape(build_dir)}",
        f"cxx = {os.environ.get('CXX', 'c++')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {' '.join(link)} -o $out",
    ]
    objects: list[str] = []

    def compile_edge(source: Path, flags: list[str], suffix: str) -> None:
        obj = escape(build_dir / source.with_suffix(f".{suffix}.o"))
        lines.append(f"build {obj}: compile {escape(ROOT / source)}")
        lines.append(f"  flags = {' '.join(flags)}")
        objects.append(obj)

    for source in kernel_sources():
        for isa, flags in ISA_FLAGS.items():
            defines = [f"-DXATTN_ISA={isa}", f"-I{CSRC}", "-fno-exceptions", "-fno-rtti"]
            compile_edge(source, [*COMMON_FLAGS, *flags, *defines], isa)
    for source in host_sources():
        compile_edge(source, [*COMMON_FLAGS, *host_defines, *includes], "host")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    lines.append(f"default {escape(target)}")
    return "\n".join(lines) + "\n"


class NativeBuild(build_ext):
    """Compiles with ninja; falls back to a package without native code."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("XATTN_BUILD_NATIVE", "auto")
        if wanted == "0":
            print("xattn_ops: XATTN_BUILD_NATIVE=0, building without native kernels")
            return
        try:
            self.compile(Path(self.get_ext_fullpath(ext.name)).resolve())
        except Exception as error:
            if wanted == "1":
                raise
            print(f"xattn_ops: no native kernels, the package will use its references: {error}")

    def compile(self, target: Path) -> None:
        # Not pip's temporary folder: there every build would start from nothing.
        build_dir = ROOT / "build" / f"native-{sysconfig.get_platform()}"
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(target, build_dir))
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        command = [ninja, "-C", str(ROOT), "-f", str(build_dir / "build.ninja")]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """An editable install without native kernels has nothing to copy."""
        built = [Path(self.build_lib, self.get_ext_filename(ext.name)) for ext in self.extensions]
        if all(path.exists() for path in built):
            super().copy_extensions_to_source()


setup(
    packages=[
        "xattn_ops",
        *sorted(f"xattn_ops.{path.parent.name}" for path in ROOT.glob("xattn_ops/*/__init__.py")),
        "xattn_ops.models",
        "xattn_ops.benchmarks",
        *sorted(
            f"xattn_ops.benchmarks.{p.parent.name}" for p in ROOT.glob("benchmarks/*/__init__.py")
        ),
    ],
    package_dir={"xattn_ops.models": "models", "xattn_ops.benchmarks": "benchmarks"},
    package_data={
        "xattn_ops": ["py.typed"],
        "xattn_ops.report": ["*.css", "*.js"],
        "xattn_ops.benchmarks": ["results/*.json"],
    },
    ext_modules=[Extension("xattn_ops._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NativeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
