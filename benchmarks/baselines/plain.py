"""What all plain formulations share: their type, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Plain = Callable[..., Tensor]


def compiled(function: Plain) -> Plain:
    """torch.compile for the one shape at hand; raises where there is no compiler."""
    return torch.compile(function, dynamic=False)
