"""The photo: read, cropped to a square, normalised as ImageNet models expect it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Photo:
    """One square photo.

    pixels: [size, size, 3] in [0, 1], to draw on. tensor: [1, 3, size, size] float32, normalised.
    """

    name: str
    pixels: np.ndarray
    tensor: Tensor

    @property
    def size(self) -> int:
        return int(self.pixels.shape[0])


def load(path: Path | None, size: int) -> Photo:
    """Read an image file, or matplotlib's portrait of Grace Hopper where `path` is None.

    Raises:
        ValueError: there is no such file, it is no image, or `size` is below 32.
    """
    from PIL import Image, UnidentifiedImageError

    if size < 32:
        raise ValueError(f"--size must be at least 32 pixels, got {size}")
    if path is None:
        path = _sample()
    if not path.is_file():
        raise ValueError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            square = _crop(image.convert("RGB")).resize((size, size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    pixels = np.asarray(square, dtype=np.float32) / 255
    normal = (torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)
    return Photo(path.name, pixels, normal.permute(2, 0, 1)[None].contiguous())


def _sample() -> Path:
    from matplotlib import cbook

    return Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def _crop(image: Image.Image) -> Image.Image:
    """The largest square: centred in width; in a portrait nearer to the top, where faces are."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 4
    return image.crop((left, top, left + side, top + side))
