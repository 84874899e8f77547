"""Peak memory of a training step of conv_relative_attention, in a process of its own.

`python -m support.peak 128 128` prints two numbers of bytes for an image of that many tokens: what
the kernels take beyond their operands, and what of it are the results. The mark is that of the
resident set, so the kernels' scratch counts too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.isa import ONE_THREAD

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
HEADS, D = 8, 8


def peak_of_step(rows: int, columns: int) -> tuple[int, int]:
    """Bytes beyond the operands, and bytes of the output and the gradients."""
    served = subprocess.run(
        [sys.executable, "-m", "support.peak", str(rows), str(columns)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **ONE_THREAD},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert served.returncode == 0, served.stderr
    peak, results = served.stdout.split()
    return int(peak), int(results)


def resident(mark: str) -> int:
    """VmRSS, or VmHWM: the highest since the last time that CLEAR was written."""
    found = re.search(rf"{mark}:\s+(\d+) kB", STATUS.read_text())
    assert found, f"no {mark} in {STATUS}"
    return int(found[1]) * 1024


def main(rows: int, columns: int) -> None:
    import torch

    from support.cases import run
    from support.convrel import coat, convrel

    def operands(*grid: int):
        case = convrel(1, grid, HEADS, D, *coat(HEADS, D))
        tensors = {name: torch.ones(shape) for name, shape in case.shapes.items()}
        return case, {n: t.requires_grad_() for n, t in tensors.items()}, torch.ones(case.out_shape)

    def step(case, tensors, grad_out):
        return run(case.function, tensors, grad_out, backend="cpu", **case.options)

    step(*operands(8, 8))  # code and thread pools
    case, tensors, grad_out = operands(rows, columns)
    before = resident("VmRSS")
    CLEAR.write_text("5")
    results = step(case, tensors, grad_out)
    print(resident("VmHWM") - before, sum(t.nbytes for t in results.values()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
