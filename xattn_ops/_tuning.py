"""Opt-in tuning of Triton launches: the warps and stages that are fastest on this card.

By default a launch takes what its operator chose for it, and nothing is timed or read. Under
XATTN_TUNE=1 the first launch of a kernel with new compile-time arguments times a few candidates and
keeps the fastest in a file, from which later processes take it. The kernels write what they compute
from their inputs alone, so running one again changes nothing; results differ at most by the order
of sums inside a block.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int]  # warps, stages
WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4)


def wanted() -> bool:
    return os.environ.get("XATTN_TUNE", "0") not in ("", "0")


def path() -> Path:
    """The file of what was found: in XATTN_CACHE_DIR, else in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("XATTN_CACHE_DIR") or Path(caches, "xattn_ops")) / "triton.json"


def best(
    kernel: Any,
    programs: int,
    arguments: Mapping[str, Any],
    chosen: Shape,
    run: Callable[[Shape], None],
    device: torch.device,
) -> Shape:
    """The fastest warps and stages for this launch, measured on the first call of its kind.

    chosen: what the operator would take, always among the candidates. run: launches the kernel.
    Inside the capture of a CUDA graph, where nothing can be timed, what is not known stays so.
    """
    key = _key(kernel, programs, arguments, device)
    known = _known(path())
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return chosen
        times = dict(_timed(candidates(chosen), run))
        known[key] = min(times, key=lambda shape: times[shape]) if times else chosen
        _keep(path(), key, known[key])
    return known[key]


def candidates(chosen: Shape) -> list[Shape]:
    """What is chosen and its neighbours: half and twice the warps, a stage more or less."""
    warps, stages = chosen
    near = [
        (w, s) for w in (warps, warps // 2, 2 * warps) for s in (stages, stages - 1, stages + 1)
    ]
    return [(w, s) for w, s in near if w in WARPS and s in STAGES]


def _timed(shapes: list[Shape], run: Callable[[Shape], None]) -> Iterator[tuple[Shape, float]]:
    from triton.runtime.errors import OutOfResources

    for shape in shapes:
        try:
            yield shape, _milliseconds(functools.partial(run, shape))
        except OutOfResources:  # too many registers or too much shared memory for this card
            continue


def _milliseconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, return_mode="median")


def _key(kernel: Any, programs: int, arguments: Mapping[str, Any], device: torch.device) -> str:
    """The card, the compiler, the kernel, its dtypes and compile-time arguments, and how many
    programs there are, to a power of two."""
    import triton

    card = torch.cuda.get_device_properties(device).name
    dtypes = [f"{n}={v.dtype}" for n, v in arguments.items() if isinstance(v, Tensor)]
    constants = [f"{n}={v}" for n, v in arguments.items() if n.isupper()]
    name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
    parts = [card, f"triton {triton.__version__}", name, *dtypes, *constants]
    return " ".join([*parts, f"programs<{1 << programs.bit_length()}"]).replace("torch.", "")


def _read(file: Path) -> dict[str, Shape]:
    """What the file holds; one that is not there or not ours holds nothing."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        return {key: (warps, stages) for key, (warps, stages) in held.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


_known = functools.cache(_read)  # of a process: what it read and has added since


def _keep(file: Path, key: str, shape: Shape) -> None:
    """Add to the file, which other processes write too: each replaces it as a whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".json", delete=False, encoding="utf-8"
        ) as fresh:
            json.dump({**_read(file), key: shape}, fresh, indent=1, sort_keys=True)
        os.replace(fresh.name, file)
    except OSError:  # a folder that cannot be written: this process still knows
        return
