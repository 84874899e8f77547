"""The calls of leaf ops that lie under a call of an operator."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Those of one namespace: what was called, with what, and what it gave."""

    def __init__(self, namespace: str = "xattn_ops") -> None:
        super().__init__()
        self.namespace = namespace
        self.seen: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == self.namespace:
            self.seen.append((func, args, result))
        return result
