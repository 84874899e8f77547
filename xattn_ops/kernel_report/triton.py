"""What the compilers make of the Triton kernels, read from the binaries; needs no GPU.

Each operator is called at shapes of its paper on tensors without memory; what it would launch is
compiled for one architecture after the other. Registers, spills and shared memory come from the
binary, matrix instructions and the width of loads from the assembly.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tuning import candidates
from .cards import BLOCKS, CARDS, KIB, REGISTERS, least_shared

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Nothing at the papers' shapes is spilled on these in the short formats, but for one kernel, whose
# 64 tokens and two sums of 64 x 64 outgrow the registers that mma.sync works from.
UNSPILLED = ("sm_80", "sm_90")
SPILLED = ("cpsa", "backward", "56x56 x 96", "sm_80")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


@dataclass(frozen=True)
class Figures:
    """One kernel on one architecture."""

    operator: str
    call: str
    paper: bool  # at a shape of the operator's paper
    kernel: str
    architecture: str
    dtype: str
    products: bool  # it multiplies matrices
    warps: int
    stages: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block
    matrix: int  # instructions of tensor or matrix cores
    loads: dict[int, int]  # bytes a load -> how many stand in the code
    chosen: bool = True  # by the table of tiles; else one of its neighbours

    @property
    def resident(self) -> int:
        """Warps of a multiprocessor at a time, as registers and shared memory let them in."""
        registers = -(-self.registers // 8) * 8
        card = CARDS[self.architecture]
        shared = (card.shared + KIB) // (self.shared + KIB)
        blocks = REGISTERS // (registers * self.warps)
        return self.warps * min(blocks, shared, card.warps // self.warps, BLOCKS)

    @property
    def broken(self) -> list[str]:
        """The bounds that it breaks, in words; what was not chosen has none."""
        if not self.chosen:
            return []
        short = self.dtype != "float32"
        bounds = {
            f"{self.shared} bytes of shared memory": self.shared > least_shared(self.architecture),
            f"{self.spilled} bytes spilled": self.paper
            and short
            and self.architecture in UNSPILLED
            and (self.operator, self.kernel, self.call, self.architecture) != SPILLED
            and self.spilled > 0,
            "no matrix instruction": self.products and short and not self.matrix,
        }
        return [reason for reason, breaks in bounds.items() if breaks]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ipsa(
    side: int, heads: int, head_dim: int, window: int, shift: int, dtype: torch.dtype
) -> None:
    from ..ipsa.triton_backward import ipsa_bwd
    from ..ipsa.triton_kernels import ipsa_fwd

    C = heads * head_dim
    qkv, out = (_meta(128, side, side, n * C, dtype=dtype) for n in (3, 1))
    table = _meta((2 * window - 1) ** 2, heads, dtype=dtype)
    pad = None if side % window == 0 else _meta(3 * C, dtype=dtype)
    options = (heads, window, window, shift, shift, head_dim**-0.5, 0.0)
    ipsa_fwd(qkv, table, pad, None, *options)
    ipsa_bwd(out, qkv, table, pad, None, *options)


def _cpsa(side: int, C: int, dtype: torch.dtype, heads: int = 1, dropout_p: float = 0.0) -> None:
    from ..cpsa.triton_backward import cpsa_bwd
    from ..cpsa.triton_kernels import cpsa_fwd

    x = _meta(128, side, side, C, dtype=dtype)
    qkv, qkv_bias, proj, proj_bias = (
        _meta(*shape, dtype=dtype) for shape in ((147, 49), (147,), (49, 49), (49,))
    )
    seed = _meta(dtype=torch.int64) if dropout_p else None
    options = (7, 7, heads, (49 // heads) ** -0.5, dropout_p)
    cpsa_fwd(x, qkv, qkv_bias, proj, proj_bias, seed, *options)
    cpsa_bwd(x, x, qkv, qkv_bias, proj, proj_bias, seed, *options)


def _convrel(side: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    from ..convrel.triton_backward import convrel_bwd
    from ..convrel.triton_kernels import convrel_fwd

    C, N = heads * head_dim, 1 + side * side
    windows, channels = [3, 5, 7], [C // 4, C * 3 // 8, C * 3 // 8]
    qkv, out = (_meta(128, N, n * C, dtype=dtype) for n in (3, 1))
    count = sum(k * k * c for k, c in zip(windows, channels, strict=True))
    weight, bias = _meta(count, dtype=dtype), _meta(C, dtype=dtype)
    options = (windows, channels, heads, side, side, 1, head_dim**-0.5)
    out, state = convrel_fwd(qkv, weight, bias, *options)
    convrel_bwd(out, qkv, weight, bias, state, *options)


def _convpos(side: int, C: int, dtype: torch.dtype) -> None:
    from ..convrel.triton_encoding import convpos_bwd, convpos_fwd

    x, weight = _meta(128, 1 + side * side, C, dtype=dtype), _meta(C, 1, 3, 3, dtype=dtype)
    bias = _meta(C, dtype=dtype)
    convpos_bwd(convpos_fwd(x, weight, bias, side, side, 1), x, weight, bias, side, side, 1)


def _digest(side: int, digests: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    from ..digest.triton_backward import digest_bwd
    from ..digest.triton_kernels import digest_fwd

    N, C = side * side, heads * head_dim
    qkv, out = (_meta(256, N, n * C, dtype=dtype) for n in (3, 1))
    kv = _meta(256, digests, 2 * C, dtype=dtype)
    table, bias = (_meta(heads, n, dtype=dtype) for n in (N, digests))
    options = (heads, side, side, 0, head_dim**-0.5, 0.0)
    _, stats = digest_fwd(qkv, kv, table, bias, None, *options)
    digest_bwd(out, qkv, kv, table, bias, stats, None, *options)


def _clsattn(
    batch: int, patches: int, heads: int, head_dim: int, dtype: torch.dtype, **options: Any
) -> None:
    from ..clsattn.triton_backward import clsattn_bwd
    from ..clsattn.triton_kernels import clsattn_fwd

    C = heads * head_dim
    dropout_p = options.get("dropout_p", 0.0)
    cls, x = _meta(batch, 1, C, dtype=dtype), _meta(batch, patches, C, dtype=dtype)
    weight, bias = _meta(C, C, dtype=dtype), _meta(C, dtype=dtype)
    norm = bias if options.get("norm", True) else None
    tensors = (cls, x, weight, bias, weight, weight, bias, norm, norm)
    seed = _meta(dtype=torch.int64) if dropout_p else None
    call = (seed, heads, 1e-6, head_dim**-0.5, dropout_p)
    out, head_state, token_state = clsattn_fwd(*tensors, *call)
    clsattn_bwd(out, *tensors, head_state, token_state, *call)


def _merge(side: int, C: int, dtype: torch.dtype) -> None:
    from ..digest.triton_merge import merge_bwd, merge_fwd

    x, bias = _meta(256, side * side, C, dtype=dtype), _meta(C, dtype=dtype)
    merge, enhance = (_meta(C, 1, k, k, dtype=dtype) for k in (7, 3))
    digests, enhanced = merge_fwd(x, merge, enhance, bias, side, side, 4, 0)
    merge_bwd(digests, enhanced, x, merge, enhance, bias, side, side, 4, 0)


class Call(NamedTuple):
    """A call of an operator, forward and backward; paper: at a shape of its paper."""

    run: Callable[[torch.dtype], None]
    paper: bool = True


CALLS: dict[str, dict[str, Call]] = {
    "ipsa": {
        "56x56, 3 x 32": Call(lambda dtype: _ipsa(56, 3, 32, 7, 0, dtype)),
        "14x14, 12 x 32": Call(lambda dtype: _ipsa(14, 12, 32, 7, 0, dtype)),
        "7x7, 24 x 32": Call(lambda dtype: _ipsa(7, 24, 32, 7, 0, dtype)),
        "shifted by 3": Call(lambda dtype: _ipsa(28, 6, 32, 7, 3, dtype)),
        "padded": Call(lambda dtype: _ipsa(30, 6, 32, 7, 0, dtype)),
        "padded, shifted": Call(lambda dtype: _ipsa(30, 6, 32, 7, 3, dtype), paper=False),
        "window 12": Call(lambda dtype: _ipsa(24, 6, 32, 12, 6, dtype), paper=False),
    },
    "cpsa": {
        "56x56 x 96": Call(lambda dtype: _cpsa(56, 96, dtype)),
        "28x28 x 192": Call(lambda dtype: _cpsa(28, 192, dtype)),
        "14x14 x 384": Call(lambda dtype: _cpsa(14, 384, dtype)),
        "7x7 x 768": Call(lambda dtype: _cpsa(7, 768, dtype)),
        "30x30 x 192, padded": Call(lambda dtype: _cpsa(30, 192, dtype), paper=False),
        "56x56 x 96, dropout": Call(lambda dtype: _cpsa(56, 96, dtype, 1, 0.1), paper=False),
        "28x28 x 192, 7 heads": Call(lambda dtype: _cpsa(28, 192, dtype, 7), paper=False),
    },
    "digest": {
        "196 + 80, 6 x 32": Call(lambda dtype: _digest(14, 80, 6, 32, dtype)),
        "49 + 4, 10 x 32": Call(lambda dtype: _digest(7, 4, 10, 32, dtype)),
        "784 + 245, 3 x 64": Call(lambda dtype: _digest(28, 245, 3, 64, dtype), paper=False),
        "196 + 80, 2 x 96": Call(lambda dtype: _digest(14, 80, 2, 96, dtype), paper=False),
    },
    "merge": {
        "14x14, 192": Call(lambda dtype: _merge(14, 192, dtype)),
        "7x7, 320": Call(lambda dtype: _merge(7, 320, dtype)),
    },
    "convrel": {
        "56x56, 8 x 8": Call(lambda dtype: _convrel(56, 8, 8, dtype)),
        "14x14, 8 x 40": Call(lambda dtype: _convrel(14, 8, 40, dtype)),
        "56x56, 8 x 19": Call(lambda dtype: _convrel(56, 8, 19, dtype)),
        "28x28, 8 x 96": Call(lambda dtype: _convrel(28, 8, 96, dtype), paper=False),
    },
    "convpos": {
        "56x56, 64": Call(lambda dtype: _convpos(56, 64, dtype)),
        "56x56, 152": Call(lambda dtype: _convpos(56, 152, dtype)),
    },
    "clsattn": {
        "196, 6 x 64": Call(lambda dtype: _clsattn(256, 196, 6, 64, dtype)),
        "196, 7 x 64": Call(lambda dtype: _clsattn(256, 196, 7, 64, dtype)),
        "196, 12 x 64": Call(lambda dtype: _clsattn(256, 196, 12, 64, dtype)),
        "400, 6 x 32, no norm": Call(lambda dtype: _clsattn(256, 400, 6, 32, dtype, norm=False)),
        "dropout": Call(lambda dtype: _clsattn(256, 196, 6, 64, dtype, dropout_p=0.1)),
        "4096, 16 x 80": Call(lambda dtype: _clsattn(1, 4096, 16, 80, dtype), paper=False),
    },
}


def figures(
    operators: Sequence[str],
    architectures: Sequence[str],
    dtypes: Sequence[str],
    sweep: bool = False,
    paper: bool = False,
) -> Iterator[Figures]:
    """Compile everything that these operators launch at the shapes of CALLS, or with `paper` at
    those of their papers; with `sweep` also in the neighbours of the shapes that the table of tiles
    has."""
    from .._triton import INTERPRETED, recording

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    for operator in operators:
        for (name, call), dtype, architecture in itertools.product(
            CALLS[operator].items(), dtypes, architectures
        ):
            if paper and not call.paper:
                continue
            with recording(architecture) as launches:
                call.run(DTYPES[dtype])
            unique = {launch.kernel.__name__: launch for launch in launches}
            for launch in unique.values():
                kernel = launch.kernel.__name__.strip("_")
                products = kernel.startswith(("forward", "backward"))
                chosen = (launch.warps, launch.stages)
                for warps, stages in candidates(chosen) if sweep else [chosen]:
                    read = _compile(replace(launch, warps=warps, stages=stages), architecture)
                    yield Figures(
                        operator, name, call.paper, kernel, architecture, dtype, products,
                        warps, stages, *read, (warps, stages) == chosen,
                    )  # fmt: skip


def _compile(launch: Any, architecture: str) -> tuple[int, int, int, int, dict[int, int]]:
    """Registers, bytes spilled and shared, matrix instructions, loads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = architecture.startswith("sm_")
    target = GPUTarget("cuda", int(architecture[3:]), 32)
    source = ASTSource(launch.kernel, *_signature(launch))
    binary = triton.compile(
        source,
        target=target if nvidia else GPUTarget("hip", architecture, 64),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    registers, spilled, matrix, loads = (_read_nvidia if nvidia else _read_amd)(binary.asm)
    return registers, spilled, binary.metadata.shared, matrix, loads


def _signature(launch: Any) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """The types, the constants and the known divisors of a launch, as the compiler sees them."""
    signature, constants, divisors = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (value == 1 if type(value) is int else False):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[parameter.name] = "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            divisors[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, divisors


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, int, dict[int, int]]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(_only(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    ptx = asm["ptx"]
    matrix = len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx))
    loads: dict[int, int] = {}
    sizes = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    ]
    sizes += [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\..*?, (0x\w+)", ptx)]
    for size in sizes:
        loads[size] = loads.get(size, 0) + 1
    return registers, stack, matrix, loads


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, int, dict[int, int]]:
    code = asm["amdgcn"]
    registers = int(_only(r"\.vgpr_count:\s+(\d+)", code))
    spilled = 4 * int(_only(r"\.vgpr_spill_count:\s+(\d+)", code))
    loads: dict[int, int] = {}
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
    for name in re.findall(r"\b(?:global|buffer)_load_(dwordx[234]|dword|ushort|short)", code):
        loads[widths[name]] = loads.get(widths[name], 0) + 1
    return registers, spilled, len(re.findall(r"\bv_mfma", code)), loads


def _only(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}")
    return found.group(1)
