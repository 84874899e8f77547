"""Builds in the checkout's folder, one at a time: the tests run in a process for each core."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build"


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Wait until no other process is in here for the same reason."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f"{what}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
