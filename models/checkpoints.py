"""Loading of official checkpoints into our models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoadReport(NamedTuple):
    """What `load_official` left aside."""

    ignored: list[str]  # keys of the checkpoint that the model has no use for
    kept: list[str]  # keys of the model that keep the values they had


def load_official(model: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Copy an official checkpoint's weights, or timm's of CoaT or CrossViT, into `model`.

    Args:
        model: from `create_model`.
        state_dict: the official or timm's state dict, or a checkpoint that holds it under
            "state_dict" or "model"; a "module." prefix is dropped. timm's CrossViT names its
            position embeddings and CLS tokens otherwise, and its CoaT lacks norms that no head
            reads; either is recognised by its keys. Position embeddings are reshaped between the
            classifier's and the backbone's layout and resized bicubically to the model's image
            size. Index buffers are compared with the model's rule and dropped. A tensor that the
            model shares between several keys may stand under any of them. A classifier's
            checkpoint may go into a features_only model.

    Returns:
        Which keys were ignored and which of the model's kept their values; both are empty where
        checkpoint and model are of one kind. From timm's CoaT the norms that it lacks are kept.

    Raises:
        TypeError: where the checkpoint holds no tensors.
        ValueError: listing every missing, unexpected and misshaped key, and keys of one shared
            tensor whose values differ; the model is unchanged.
    """
    adapt = getattr(model, "adapt_official", None)
    if adapt is None:
        raise TypeError(f"{type(model).__name__} is not a model of this library")
    state, optional = adapt(_unwrap(state_dict))
    differing = _spread_shared(model, state)
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshaped = [
        f"{key} (checkpoint {list(state[key].shape)}, model {list(own[key].shape)})"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    report = LoadReport(
        [key for key in unexpected if key.startswith(optional)],
        [key for key in missing if key.startswith(optional)],
    )
    problems = {
        "missing": [key for key in missing if key not in report.kept],
        "unexpected": [key for key in unexpected if key not in report.ignored],
        "misshaped": misshaped,
        "different values of one tensor": differing,
    }
    if any(problems.values()):
        lists = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
        raise ValueError("the checkpoint does not fit the model; " + "; ".join(lists))
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return report


def _spread_shared(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Put each tensor that the model shares under all of its keys in `state`.

    Returns:
        "first = other" for each key whose value differs from that of the tensor's first key.
    """
    keys_of: dict[int, list[str]] = {}
    for key, tensor in model.named_parameters(remove_duplicate=False):
        keys_of.setdefault(id(tensor), []).append(key)
    differing = []
    for keys in keys_of.values():
        first, *others = [key for key in keys if key in state] or keys
        if first not in state:
            continue
        value = state[first]
        differing += [
            f"{first} = {key}"
            for key in others
            if state[key].shape == value.shape and not torch.equal(state[key].to(value), value)
        ]
        state.update({key: value for key in keys if key not in state})
    return differing


def resize_positions(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resize of [1, C, h, w] to [1, C, *size]; itself where the size is right already."""
    if tuple(grid.shape[-2:]) == size:
        return grid
    return F.interpolate(grid, size=size, mode="bicubic", align_corners=False)


def resize_token_positions(
    positions: Tensor, prefix: int, grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """A position embedding [1, prefix + h w, C] of one grid for another, bicubic."""
    if grid == size:
        return positions
    image = positions[:, prefix:].mT.unflatten(2, grid)
    return torch.cat([positions[:, :prefix], resize_positions(image, size).flatten(2).mT], 1)


def token_side(positions: Tensor, prefix: int) -> int:
    """Of the square grid that a position embedding is for; 0 where it is for none.

    The loader reports the shape of such a one.
    """
    return square_side(positions.shape[1] - prefix) if positions.dim() == 3 else 0


def square_side(count: int) -> int:
    """The root of a count that is a square number, 0 of another."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"state_dict is a {type(checkpoint).__name__}; a dict of tensors is needed")
    wrong = [k for k, v in checkpoint.items() if not (isinstance(k, str) and torch.is_tensor(v))]
    if wrong:
        raise TypeError(f"state_dict holds something other than tensors under {wrong[:5]}")
    return {key.removeprefix("module."): value for key, value in checkpoint.items()}
