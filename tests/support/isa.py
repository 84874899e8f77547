"""A process under one instruction set, which runs the small matrix of any operator.

The native library picks its kernels once, when it is loaded: `python -m support.isa` with XATTN_ISA
in the environment prints the instruction set that serves, then an answer for each operator that is
named on a line of its input: what failed, or an empty line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ISAS = ["generic", "avx2", "avx512", "avx512_bf16"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # on busy cores, waiting threads cost more than the work
# glibc fills what malloc returns with bytes 0x7f, a huge number or NaN in every format: so the
# kernels' scratch memory, which torch does not see, is poisoned as well.
POISON = {"MALLOC_PERTURB_": "128"}
TESTS = Path(__file__).parents[1]


@contextmanager
def process(isa: str) -> Iterator[subprocess.Popen]:
    """It ends when its input does."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.isa"],
        env=os.environ
        | {"XATTN_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        | ONE_THREAD
        | POISON,
        cwd=TESTS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        yield worker


def answer(worker: subprocess.Popen, operator: str = "") -> str:
    """To the name of an operator; without one, the line that comes by itself."""
    if operator:
        print(operator, file=worker.stdin, flush=True)
    line = worker.stdout.readline()
    assert line, f"the process died with {worker.wait()}"
    return json.loads(line)


def failure(operator: str) -> str:
    """What is wrong with an operator's small matrix under the instruction set that serves here."""
    from support.operators import OPERATORS
    from support.oracle import check_against_float64

    described = OPERATORS[operator]
    cases = {given.id: given.values[0] for given in [*described.cases, *described.dropout]}
    for id in described.isa:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            try:
                check_against_float64(cases[id], dtype, "cpu")
            except Exception as error:
                return f"{id}, {dtype}: {error!r}"
    return ""


def main() -> None:
    from xattn_ops import _library

    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN, as in conftest.py
    print(json.dumps(_library.isa()), flush=True)
    for line in sys.stdin:
        print(json.dumps(failure(line.strip())), flush=True)


if __name__ == "__main__":
    main()
