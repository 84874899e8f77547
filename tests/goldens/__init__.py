"""Numbers of the official implementations, measured once in float64, and the inputs behind them.

<family>_layouts.json: key -> shape of every official state dict, or the key whose tensor stands
there too. <family>_facts.json: parameters and GMACs. <model>.npz: outputs for the weights of
`official_state` and the image of `image`.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
INDEX = ".relative_position_index"


class Golden(NamedTuple):
    shape: list[int]
    where: Tensor | None  # indexes into the flattened output; None: all of it
    value: Tensor  # float64
    mean_abs: float

    def error(self, output: Tensor) -> float:
        """Largest difference from the official output, in units of its mean magnitude."""
        assert list(output.shape) == self.shape
        flat = output.detach().double().flatten()
        flat = flat if self.where is None else flat[self.where]
        return ((flat - self.value).abs().max() / self.mean_abs).item()


@cache
def _json(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text())


def layout(name: str) -> dict[str, list[int]]:
    """Key -> shape of the official state dict, index buffers included."""
    entries = _entries(name)
    return {key: entries[e] if isinstance(e, str) else e for key, e in entries.items()}


def shared(name: str) -> dict[str, str]:
    """Key -> the first key of the same tensor, for the keys that are not their tensor's first."""
    return {key: first for key, first in _entries(name).items() if isinstance(first, str)}


def facts(name: str) -> dict[str, Any]:
    return _json(f"{_family(name)}_facts.json")[name]


def _family(name: str) -> str:
    return name.split("_")[0]


def _entries(name: str) -> dict[str, Any]:
    return _json(f"{_family(name)}_layouts.json")[name]


def golden(name: str) -> list[Golden]:
    """The official outputs: one for a classifier, one a stage for a backbone."""
    data = np.load(FOLDER / f"{name}.npz")
    outputs = sorted({key.split(".")[0] for key in data.files})
    return [
        Golden(
            data[f"{o}.shape"].tolist(),
            torch.from_numpy(data[f"{o}.index"]).long() if f"{o}.index" in data.files else None,
            torch.from_numpy(data[f"{o}.value"]).double().flatten(),
            float(data[f"{o}.mean_abs"]),
        )
        for o in outputs
    ]


def image(batch: int, height: int, width: int) -> Tensor:
    array = np.random.RandomState(0).standard_normal((batch, 3, height, width))
    return torch.from_numpy(array)


def official_state(name: str) -> dict[str, Tensor]:
    """The official state dict with the weights of the goldens, float64, index buffers included."""
    also = shared(name)
    state = {
        key: _relative_index(math.isqrt(shape[0])) if key.endswith(INDEX) else _weight(key, shape)
        for key, shape in layout(name).items()
        if key not in also
    }
    return state | {key: state[first] for key, first in also.items()}


def _weight(key: str, shape: list[int]) -> Tensor:
    random = np.random.RandomState(zlib.crc32(key.encode()))
    z = random.standard_normal(shape)
    kind = key.rsplit(".", 1)[-1]
    if kind == "num_batches_tracked":
        return torch.tensor(0)
    if kind == "running_var":
        z = 0.5 + random.random_sample(shape)
    elif kind == "weight":
        z = z / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * z
    else:
        z = z * (0.1 if kind in ("bias", "running_mean") else 0.5)
    return torch.from_numpy(z)


def _relative_index(n: int) -> Tensor:
    """Swin's buffer: entry (query, key) is (dy + n - 1) * (2n - 1) + dx + n - 1."""
    grid = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")).flatten(1)
    dy, dx = grid[:, :, None] - grid[:, None, :]
    return (dy + n - 1) * (2 * n - 1) + dx + n - 1
