"""Build of the native libraries: `xattn_ops._C`, every kernel file of the CPU once per instruction
set, and `xattn_ops._C_cuda`, every CUDA file once for all architectures.

A missing compiler or a failed compilation does not fail the installation: the package then runs on
its PyTorch references and says so. Environment:

XATTN_BUILD_NATIVE  0 skips the native build, 1 makes its failure an error (default: try)
XATTN_BUILD_CUDA    the same for the CUDA kernels, which are tried where torch has CUDA; 1 builds
                    them beside any torch (default: 0 where XATTN_BUILD_NATIVE is 0)
XATTN_CUDA_ARCHS    their architectures, as "8.0 9.0+PTX"; +PTX adds what newer cards can compile
MAX_JOBS            compilations at a time (default: all cores)
CXX                 the C++ compiler (default: c++)
CUDA_HOME           the CUDA toolkit (default: that of the nvcc on PATH, or /usr/local/cuda)
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
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


CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]
HOST_DEFINES = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # stable ABI of torch 2.10
    "-DPy_LIMITED_API=0x030a0000",
]


def host_sources() -> list[Path]:
    """Files compiled once: schemas, tensor checks, registration."""
    return [CSRC / "library.cpp", *sorted(CSRC.glob("*/*_cpu.cpp"))]


def kernel_sources() -> list[Path]:
    """Files compiled once per instruction set; they include no torch header."""
    return sorted(CSRC.glob("*/*_cpu_kernels.cpp"))


def cuda_sources() -> list[Path]:
    """Files compiled by nvcc."""
    return [
        CSRC / "library_cuda.cu",
        *sorted([*CSRC.glob("common/*.cu"), *CSRC.glob("*/*_cuda.cu")]),
    ]


def torch_paths() -> tuple[list[str], str]:
    """Include flags and the library folder of the torch that the build sees."""
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    includes = [str(CSRC), *include_paths(), sysconfig.get_paths()["include"]]
    return [f"-I{path}" for path in includes], TORCH_LIB_PATH


def escape(path: Path) -> str:
    """A path as ninja takes it."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class NinjaFile:
    """A build as ninja reads it: one edge per object, one for the link."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir
        self.objects: list[str] = []
        self.lines = [
            f"builddir = {escape(build_dir)}",
            f"cxx = {os.environ.get('CXX', 'c++')}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]

    def compile(self, source: Path, flags: list[str], suffix: str, rule: str = "compile") -> None:
        obj = escape(self.build_dir / source.with_suffix(f".{suffix}.o"))
        self.lines.append(f"build {obj}: {rule} {escape(ROOT / source)}")
        self.lines.append(f"  flags = {' '.join(flags)}")
        self.objects.append(obj)

    def link(self, target: Path, command: str, libraries: str = "") -> str:
        """The whole file. Libraries stand behind the objects: linkers drop those that nothing
        before them needs."""
        self.lines += ["rule link", f"  command = {command} $in {libraries} -o $out"]
        self.lines.append(f"build {escape(target)}: link {' '.join(self.objects)}")
        self.lines.append(f"default {escape(target)}")
        return "\n".join(self.lines) + "\n"


def native_build(target: Path, build_dir: Path) -> str:
    """The build of `_C`."""
    includes, torch_lib = torch_paths()
    build = NinjaFile(build_dir)
    for source in kernel_sources():
        for isa, flags in ISA_FLAGS.items():
            defines = [f"-DXATTN_ISA={isa}", f"-I{CSRC}", "-fno-exceptions", "-fno-rtti"]
            build.compile(source, [*COMMON_FLAGS, *flags, *defines], isa)
    defines = [*HOST_DEFINES, *(["-DXATTN_X86"] if IS_X86 else [])]
    for source in host_sources():
        build.compile(source, [*COMMON_FLAGS, *defines, *includes], "host")
    if sys.platform == "darwin":
        return build.link(target, "$cxx -bundle -undefined dynamic_lookup")
    return build.link(target, "$cxx -shared", f"-L{torch_lib} -ltorch -ltorch_cpu -lc10")


def find_nvcc() -> Path:
    """The compiler of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    for nvcc in (home and Path(home, "bin", "nvcc"), on_path, "/usr/local/cuda/bin/nvcc"):
        if nvcc and Path(nvcc).exists():
            return Path(nvcc)
    raise FileNotFoundError("no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is not set")


def cuda_codes(archs: str) -> list[str]:
    """nvcc's flags for architectures like "8.0 9.0+PTX".

    All are compiled from the code of the lowest one: no kernel asks for its architecture, so what
    nvcc does before ptxas is the same for each, and is done once.
    """
    names = archs.replace(";", " ").replace(",", " ").split()
    if not names or not all(re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", name) for name in names):
        raise ValueError(f"XATTN_CUDA_ARCHS must be like '8.0 9.0+PTX', got {archs!r}")
    numbers = [name.removesuffix("+PTX").replace(".", "") for name in names]
    lowest = min(numbers, key=lambda number: int(number.rstrip("abcdef")))
    codes = [f"sm_{number}" for number in numbers]
    if any(name.endswith("+PTX") for name in names):
        codes.append(f"compute_{lowest}")
    return [f"-gencode=arch=compute_{lowest},code=[{','.join(codes)}]"]


def cuda_build(target: Path, build_dir: Path) -> str:
    """The build of `_C_cuda`. It names no CUDA library of torch, so that any torch will do."""
    includes, torch_lib = torch_paths()
    build = NinjaFile(build_dir)
    compiler = f"-ccbin {os.environ['CXX']}" if "CXX" in os.environ else ""
    build.lines += [
        f"nvcc = {escape(find_nvcc())} {compiler}",
        "rule compile_cuda",
        "  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    codes = cuda_codes(os.environ.get("XATTN_CUDA_ARCHS") or CUDA_ARCHS)
    for source in cuda_sources():
        build.compile(
            source, [*NVCC_FLAGS, *codes, *HOST_DEFINES, *includes], "cuda", "compile_cuda"
        )
    libraries = f"-L{torch_lib} -ltorch_cpu -lc10"
    return build.link(target, "$nvcc -shared -cudart=static", libraries)


def torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


class NativeBuild(build_ext):
    """Compiles with ninja; falls back to a package without native code."""

    def build_extension(self, ext: Extension) -> None:
        for_cuda = ext.name.endswith("_cuda")
        wanted = os.environ.get("XATTN_BUILD_NATIVE", "auto")
        what = "native kernels, the package will use its references"
        if for_cuda:
            wanted = os.environ.get("XATTN_BUILD_CUDA", "0" if wanted == "0" else "auto")
            what = "CUDA kernels"
        # An earlier build's, which this one may not want or not be able to replace.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if wanted == "0":
            print(f"xattn_ops: no {what}: they are not wanted")
            return
        try:
            if for_cuda and wanted != "1" and not torch_has_cuda():
                print("xattn_ops: no CUDA kernels: this torch has no CUDA")
                return
            self.compile(ext, cuda_build if for_cuda else native_build)
        except Exception as error:
            if wanted == "1":
                raise
            print(f"xattn_ops: no {what}: {error}")

    def compile(self, ext: Extension, build: Callable[[Path, Path], str]) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not pip's temporary folder: there every build would start from nothing.
        build_dir = (
            ROOT / "build" / f"{build.__name__.removesuffix('_build')}-{sysconfig.get_platform()}"
        )
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(build(target, build_dir))
        ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
        command = [ninja, "-C", str(ROOT), "-f", str(build_dir / "build.ninja")]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """An editable install has those libraries to copy that were built."""
        built = [
            ext
            for ext in self.extensions
            if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()
        ]
        every, self.extensions = self.extensions, built
        super().copy_extensions_to_source()
        self.extensions = every


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
    ext_modules=[
        Extension(f"xattn_ops.{name}", sources=[], py_limited_api=True)
        for name in ("_C", "_C_cuda")
    ],
    cmdclass={"build_ext": NativeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
