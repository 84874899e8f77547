"""Triton's interpreter without half of what it does.

It puts its functions into triton.language anew whenever one kernel function calls another; here a
launch does so once. And it checks every sum of integers for overflow, which compiled kernels do in
debug mode alone, and which the tests' sizes are far from.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_EVERYTHING = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


class _Patch:
    """That of the launch at work; functions that it calls find it done."""

    scope: Any = None

    def __call__(self, function: Any) -> _Patch:
        if self.scope is None:
            self.scope = _patch(_EVERYTHING)
        return self

    def restore(self) -> None:  # launches alone do this
        self.scope.restore()
        self.scope = None


def make_faster() -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _Patch()
