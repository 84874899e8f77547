"""Peak memory of a training step of an operator, in a process of its own.

`python -m support.peak convrel` prints two numbers of bytes for the operator's large case: what the
kernels take beyond their operands, and what of it are the results. The mark is that of the resident
set, so the kernels' scratch counts too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.isa import ONE_THREAD, TESTS

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of_step(operator: str) -> tuple[int, int]:
    """Bytes beyond the operands, and bytes of the outputs and the gradients."""
    served = subprocess.run(
        [sys.executable, "-m", "support.peak", operator],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **ONE_THREAD},
        cwd=TESTS,
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


def main(operator: str) -> None:
    import torch

    from support.cases import Case, Tensors
    from support.operators import OPERATORS

    def operands(case: Case) -> tuple[Tensors, list[torch.Tensor]]:
        tensors = {name: torch.ones(shape) for name, shape in case.shapes.items()}
        grad_outs = [torch.ones(shape) for shape in case.outs.values()]
        return {name: t.requires_grad_() for name, t in tensors.items()}, grad_outs

    described = OPERATORS[operator]
    small, large = described.of_size(1, 8, 8), described.large
    small.run(*operands(small), backend="cpu")  # code and thread pools
    given = operands(large)
    before = resident("VmRSS")
    CLEAR.write_text("5")
    results = large.run(*given, backend="cpu")
    print(resident("VmHWM") - before, sum(t.nbytes for t in results.values()))


if __name__ == "__main__":
    main(sys.argv[1])
