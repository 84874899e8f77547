"""Model names and how each model is built."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

Builder = Callable[..., nn.Module]
_builders: dict[str, Builder] = {}


def register(name: str, builder: Builder) -> None:
    """Make a builder, which takes `create_model`'s arguments but the name, known as `name`."""
    if name in _builders:
        raise RuntimeError(f"model '{name}' is registered twice")
    _builders[name] = builder


def list_models() -> list[str]:
    """The names that `create_model` takes, sorted."""
    return sorted(_builders)


def create_model(
    name: str,
    num_classes: int = 1000,
    features_only: bool = False,
    img_size: int | tuple[int, int] | None = None,
    backend: str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`; a trailing "_224" is accepted too.
        num_classes: width of the classifier; 0 for none. Ignored with features_only.
        features_only: False: images [B, 3, H, W] -> logits [B, num_classes]. True: images of any
            size -> the list of the stages' feature maps [B, C_i, H_i, W_i].
        img_size: the image's size, or (height, width); None: the model's own.
        backend: of the attention operators; None: the first that can.
        **options: the family's own, as its class documents them.

    Raises:
        ValueError: for an unknown name or an argument out of range.
        TypeError: for an unknown option.
    """
    builder = _builders.get(name) or _builders.get(name.removesuffix("_224"))
    if builder is None:
        close = difflib.get_close_matches(name, _builders, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"unknown model '{name}'{hint} Known: {', '.join(list_models())}")
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; it must be 0 (no classifier) or more")
    return builder(
        num_classes=num_classes,
        features_only=features_only,
        img_size=img_size,
        backend=backend,
        **options,
    )
