"""Dropout on attention weights from a counter, so that every backend drops the same ones.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the mask is a
pure function of a seed and of a weight's place, so forward and backward need not share memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from the device's default generator, so that `torch.manual_seed` reproduces it."""
    return torch.randint(2**63 - 1, (), device=device)


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int],
    key: tuple[Tensor | int, Tensor | int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of uint32 words, each held in an int64; the arguments broadcast."""
    c0, c1, c2, c3 = (torch.as_tensor(c) for c in counter)
    k0, k1 = (torch.as_tensor(k) for k in key)
    for _ in range(10):
        # int64 products wrap, which leaves the 64 bits of the unsigned product
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (odd >> 32 & _WORD) ^ c1 ^ k0, odd & _WORD
        c2, c3 = (even >> 32 & _WORD) ^ c3 ^ k1, even & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, units: int, n_q: int, n_k: int, p: float) -> Tensor:
    """Which weights stay: bool [units, n_q, n_k].

    Four queries i share one counter ((i // 4) * n_k + key, unit), and query i takes output word
    i % 4; a weight stays where its word is at least p * 2**32. A unit is one attention matrix.
    """
    arange = torch.arange(max(units, n_k, n_q + 3), device=seed.device)
    unit = arange[:units, None, None]
    rows = (n_q + 3) // 4
    place = arange[:rows, None] * n_k + arange[:n_k]  # [rows, n_k]
    words = philox(
        (place, unit & _WORD, unit >> 32, torch.zeros_like(seed)),
        (seed & _WORD, seed >> 32 & _WORD),
    )
    stay = torch.stack(words, 2) >= int(p * 2**32)  # [units, rows, 4, n_k]
    return stay.reshape(units, rows * 4, n_k)[:, :n_q]
