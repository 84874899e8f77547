"""The feature maps of the models, which the operators are timed on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

Shape = TypeVar("Shape", bound="OfAnImage")


@dataclass(frozen=True)
class OfAnImage:
    """A map whose size follows the image's: what a sweep over the side needs."""

    height: int
    width: int

    def at(self: Shape, side: int) -> Shape:
        """The same stage of an image of another side than 224."""
        return replace(self, height=self.height * side // 224, width=self.width * side // 224)


@dataclass(frozen=True)
class Stage(OfAnImage):
    """Feature map of one stage of CAT, and the window (IPSA) or patch (CPSA) on it."""

    channels: int
    heads: int
    window: tuple[int, int] = (7, 7)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}"


CAT_SMALL = (
    Stage(56, 56, 96, 3),
    Stage(28, 28, 192, 6),
    Stage(14, 14, 384, 12),
    Stage(7, 7, 768, 24),
)


@dataclass(frozen=True)
class Grid(OfAnImage):
    """Tokens of one scale of CoaT: prefix tokens, then the pixels of a map, row by row.

    windows: side of the relative term's convolution and how many heads it serves, in order.
    most_batch: images that are timed at once at most, for maps as large as a detector's.
    """

    head_dim: int
    heads: int = 8
    prefix: int = 1
    windows: tuple[tuple[int, int], ...] = ((3, 2), (5, 3), (7, 3))
    most_batch: int | None = None

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.prefix + self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def batch(self, wanted: int) -> int:
        return wanted if self.most_batch is None else min(wanted, self.most_batch)

    def __str__(self) -> str:
        one = " B=1" if self.most_batch == 1 else ""
        return f"{self.height}x{self.width} {self.heads}x{self.head_dim}{one}"


@dataclass(frozen=True)
class Tokens:
    """What the CLS token of one branch of CrossViT attends to: the other branch's patches."""

    patches: int
    channels: int
    heads: int

    def at(self, side: int) -> Tokens:
        """The same branch for an image of another side than 224."""
        return replace(self, patches=self.patches * side**2 // 224**2)

    def __str__(self) -> str:
        return f"{self.patches}x{self.channels}"


CROSSVIT_15 = (Tokens(400, 192, 6), Tokens(196, 384, 6))

COAT = (
    Grid(56, 56, 8),  # the four scales of CoaT-Lite mini and small
    Grid(28, 28, 16),
    Grid(14, 14, 40),
    Grid(7, 7, 64),
    Grid(56, 56, 19),  # the first scale of CoaT, and the second of CoaT mini
    Grid(28, 28, 27),
    Grid(128, 128, 8, most_batch=1),  # the first scale at 512 and at 1024 pixels
    Grid(256, 256, 8, most_batch=1),
)
COAT_SMALL_SCALES = COAT[:4]


@dataclass(frozen=True)
class WithDigests(OfAnImage):
    """Tokens of a map in a CabViT block, and the digests of `earlier` blocks before it."""

    head_dim: int
    heads: int
    earlier: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def digests(self) -> int:
        return self.earlier * -(-self.height // 4) * -(-self.width // 4)

    def __str__(self) -> str:
        return f"{self.height}x{self.width} {self.heads}x{self.head_dim} m={self.digests}"


CABVIT = (
    WithDigests(14, 14, 32, 6, 5),  # stage 3 of CabViT-H-L1, its last block
    WithDigests(14, 14, 32, 6, 1),  # and its second
    WithDigests(7, 7, 32, 10, 1),  # stage 4, its last
    WithDigests(28, 28, 32, 6, 5),  # stage 3 at 448 pixels
)


@dataclass(frozen=True)
class Merge(OfAnImage):
    """Tokens of one stage of CabViT, and the window and stride that make digests of them."""

    channels: int
    window: int = 7
    stride: int = 4

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def digests(self) -> int:
        return -(-self.height // self.stride) * -(-self.width // self.stride)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}"


CABVIT_MERGE = (
    Merge(14, 14, 192),  # stage 3 of CabViT-H-L1
    Merge(14, 14, 320),  # and of L2 and L3
    Merge(7, 7, 320),  # stage 4 of L1
)
