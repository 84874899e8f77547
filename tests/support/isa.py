"""Runs the small matrix of an operator under one instruction set, in a process of its own.

The native library picks its kernels once, when it is loaded: `python -m support.isa ipsa` with
XATTN_ISA in the environment prints the instruction set that served.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ISAS = ["generic", "avx2", "avx512"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # on busy cores, waiting threads cost more than the work
CASES = {  # operator -> the lists that hold its cases
    "ipsa": ("ipsa", "CASES", "DROPOUT"),
    "cpsa": ("cpsa", "CASES", "DROPOUT"),
    "convrel": ("convrel", "CASES"),
    "convpos": ("convrel", "POSITION_CASES"),
    "clsattn": ("clsattn", "CASES", "DROPOUT"),
    "digest": ("digest", "CASES", "DROPOUT"),
}
# glibc fills what malloc returns with bytes 0x7f, a huge number or NaN in every format: so the
# kernels' scratch memory, which torch does not see, is poisoned as well.
POISON = {"MALLOC_PERTURB_": "128"}
SMALL_MATRIX = {
    "ipsa": [
        "padded_9x16",
        "shift_padded",
        "rectangular_5x2_shift_3x1",
        "no_bias_no_pad",
        "window_8",
        "head_dim_17",
        "head_dim_5",
        "dropout",
    ],
    "cpsa": [
        "padded_9x16",
        "cat_stage4_one_token",
        "channels_33",
        "channels_17",
        "heads_7",
        "rectangular_5x2",
        "no_bias",
        "dropout",
    ],
    "convrel": [
        "coat_lite_stage1",
        "coat_lite_stage2",
        "coat_tiny",
        "head_dim_5",
        "head_dim_70",
        "prefix_3",
        "window_larger_than_the_grid",
        "windows_1_3_5_7_9",
        "groups_inside_a_vector",
        "no_relative_term_odd",
        "no_bias_odd",
    ],
    "convpos": [
        "coat_tiny",
        "channels_17",
        "prefix_3",
        "window_7",
        "window_larger_than_the_grid",
        "no_bias_odd",
    ],
    "clsattn": [
        "crossvit_15_small",
        "crossvit_18",
        "no_norm",
        "norm_without_shift",
        "no_bias_no_norm",
        "one_patch",
        "patches_17",
        "heads_5",
        "head_dim_19",
        "dropout",
        "dropout_odd",
    ],
    "digest": [
        "cabvit_stage4",
        "prefix_2",
        "nothing",
        "one_token_one_digest",
        "tall_37x2",
        "two_chunks",
        "split_queries",
        "head_dim_33",
        "dropout_prefix",
        "dropout_two_chunks",
    ],
}


def check_isa(operator: str, isa: str) -> None:
    """Skips where this processor has no such instructions."""
    served = subprocess.run(
        [sys.executable, "-m", "support.isa", operator],
        env=os.environ
        | {"XATTN_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        | ONE_THREAD
        | POISON,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert served.returncode == 0, served.stderr
    if served.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}")


def main(operator: str) -> None:
    import importlib

    import torch

    from support.oracle import check_against_float64
    from xattn_ops import _library

    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN, as in conftest.py
    name, *lists = CASES[operator]
    module = importlib.import_module(f"support.{name}")
    cases = {param.id: param.values[0] for list_ in lists for param in getattr(module, list_)}
    for name in SMALL_MATRIX[operator]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            try:
                check_against_float64(cases[name], dtype, "cpu")
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}: {error}") from None
    print(_library.isa())


if __name__ == "__main__":
    main(sys.argv[1])
