"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# Triton reads this when a kernel is defined: without a GPU its interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from support.interpreter import make_faster

    make_faster()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill all fresh memory with NaN: torch does so in its deterministic mode, in C++ too."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing was compiled."""
    monkeypatch.setattr("xattn_ops._checks._plans", {})
    monkeypatch.setattr("xattn_ops._registration.NATIVE", False)
    monkeypatch.setattr("xattn_ops._registration.REASON", "no compiler was found")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
