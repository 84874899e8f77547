"""What all plain formulations share: their types, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Plain = Callable[..., Tensor]
Several = Callable[..., tuple[Tensor, ...]]  # of an operator with more than one output
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """torch.compile for the one shape at hand; raises where there is no compiler."""
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]
