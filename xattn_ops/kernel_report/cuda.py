"""Registers, spills, shared memory and tensor-core instructions of the CUDA kernels.

They are read from the library that was built, for every architecture in it, by the tools that come
with Triton or with a CUDA toolkit. Dynamic shared memory is planned at a launch, so it is not here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

DTYPES = {"__nv_bfloat16": "bfloat16", "__half": "float16", "float": "float32"}


@dataclass(frozen=True)
class CudaFigures:
    """One kernel on one architecture."""

    kernel: str  # with its template arguments
    architecture: str
    dtype: str  # of its tensors, or "" where it has no such parameter
    registers: int  # a thread
    stack: int  # bytes a thread; 0 where nothing is spilled
    shared: int  # static bytes a block
    matrix: int | None  # instructions of tensor cores, where they were counted


def library() -> Path | None:
    """The library of the CUDA kernels in this installation; it need not be one that loads here."""
    spec = importlib.util.find_spec("xattn_ops._C_cuda")
    return Path(spec.origin) if spec is not None and spec.origin else None


def kernels(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> mangled name of each kernel -> what cuobjdump says of its resources."""
    text = _run("cuobjdump", "--dump-resource-usage", path)
    parts = re.split(r"arch = (sm_\d+\w?)", text)[1:]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for architecture, body in zip(parts[::2], parts[1::2], strict=True):
        for name, line in re.findall(r"Function (\S+):\n(.*)", body):
            numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            found.setdefault(architecture, {})[name] = numbers
    return found


def figures(
    path: Path, architectures: Collection[str], instructions: bool = True
) -> list[CudaFigures]:
    """Every kernel in a library for each of these architectures that it was built for.

    instructions: count those of tensor cores too, for which the library is disassembled: some 20
    seconds an architecture.
    """
    rows = []
    for architecture, of_one in kernels(path).items():
        if architecture not in architectures:
            continue
        matrix = _matrix_instructions(path, architecture) if instructions else {}
        for name, (mangled, numbers) in zip(readable(of_one), of_one.items(), strict=True):
            rows.append(
                CudaFigures(
                    kernel=name,
                    architecture=architecture,
                    dtype=next((DTYPES[t] for t in re.findall(r"\w+", name) if t in DTYPES), ""),
                    registers=numbers["REG"],
                    stack=numbers["STACK"],
                    shared=numbers["SHARED"],
                    matrix=matrix.get(mangled),
                )
            )
    return sorted(rows, key=lambda row: (row.kernel, int(row.architecture[3:].rstrip("a"))))


def _matrix_instructions(path: Path, architecture: str) -> dict[str, int]:
    """How many there are in each kernel, by its mangled name."""
    parts = re.split(r"Function : (\S+)", _run("cuobjdump", "-sass", "-arch", architecture, path))
    return {
        name: body.count("HMMA") + body.count("HGMMA")  # UTCHMMA is one of the first
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def readable(mangled: Collection[str]) -> list[str]:
    """`operator::kernel<arguments>` of each, or the mangled name where nothing demangles it."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return list(mangled)
    lines = subprocess.run(
        [tool], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    return [short_name(line) for line in lines.splitlines()]


def short_name(demangled: str) -> str:
    """Without the return type, the arguments and the namespaces that all kernels share."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", demangled)
    name = name.removeprefix("void ").replace("xattn::", "")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def _run(tool: str, *arguments: object) -> str:
    command = [_tool(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is not None:
        return found
    try:
        import triton

        return str(getattr(triton.knobs.nvidia, name).path)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise RuntimeError(f"needs {name}, of Triton or of a CUDA toolkit ({error})") from error
