"""The tokens of cross-patch self-attention as rows of a matrix, and back into the map.

Rows are ordered (image, channel, patch). In the map the pixels of a token are as far apart as the
channels are many; where kernels read tokens more than once, a copy is cheaper.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _tiles, _triton

TOKENS = 8  # of each channel that a program moves


class Patches(NamedTuple):
    """How maps [B, H, W, C] are cut into tokens; those that stick out are filled with zeros."""

    height: int  # of a patch
    width: int
    B: int
    H: int
    W: int
    C: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def columns(self) -> int:
        return -(-self.W // self.width)

    @property
    def tokens(self) -> int:
        """Of one channel of one image."""
        return -(-self.H // self.height) * self.columns

    @property
    def padded(self) -> bool:
        return self.H % self.height > 0 or self.W % self.width > 0

    def arguments(self) -> dict[str, Any]:
        """What `pixels_of` takes besides a map."""
        sizes = {"H": self.H, "W": self.W, "C": self.C, "T": self.tokens}
        sizes |= {"patches_x": self.columns, "PH": self.height, "PW": self.width}
        return sizes | {"BP": _triton.power_of_two(self.pixels), "PADDED": self.padded}


def problem(patches: Patches, like: Tensor) -> _tiles.Problem:
    """What the table of tiles knows of a call on maps like this one."""
    return _tiles.Problem("cpsa", patches.pixels, patches.tokens, like.dtype)


def strides(tensor: Tensor, prefix: str = "") -> dict[str, int]:
    """The strides of a map by the names of a kernel's parameters."""
    names = (f"{prefix}stride_b", f"{prefix}stride_y", f"{prefix}stride_x")
    return dict(zip(names, tensor.stride(), strict=False))


def is_wide(patches: Patches, *maps: Tensor) -> bool:
    """Whether one image, of these maps or of a contiguous one, has offsets beyond 32 bits."""
    strides_y = [patches.W * patches.C, *(map.stride(1) for map in maps)]
    return patches.H * max(strides_y) >= 2**31


@triton.jit
def pixels_of(
    pointer, image, c, t, stride_b, stride_y, stride_x, H, W, C, T, patches_x,
    PH: tl.constexpr, PW: tl.constexpr, BP: tl.constexpr, PADDED: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pointers to tokens [channels, tokens, pixels] in the map, and which of them lie in it.

    RAGGED: c passes the last channel.
    """
    p = tl.arange(0, BP)
    y = (t // patches_x * PH)[:, None] + (p // PW)[None, :]
    x = (t % patches_x * PW)[:, None] + (p % PW)[None, :]
    inside = (t < T)[:, None] & (p < PH * PW)[None, :]
    if PADDED:
        inside &= (y < H) & (x < W)
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    pointers = pointer + image * stride_b + (y * stride_y + x * stride_x)[None] + c[:, None, None]
    inside = inside[None]
    if RAGGED:
        inside &= (c < C)[:, None, None]
    return pointers, inside


@triton.jit
def transposed(rows):
    """Each matrix transposed."""
    if len(rows.shape) == 2:
        return tl.trans(rows)
    else:
        return rows.permute(0, 2, 1)


@triton.jit
def per_row(values):
    """A value a row, to meet all of the row."""
    return tl.expand_dims(values, len(values.shape))


@triton.jit
def _move(
    map, planes, stride_b, stride_y, stride_x, H, W, C, T, patches_x, groups, tiles,
    PH: tl.constexpr, PW: tl.constexpr, BP: tl.constexpr, PADDED: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr, CB: tl.constexpr, BT: tl.constexpr,
    LENGTH: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """planes [B * C * T, LENGTH] from the map, the rest of each row zero, or the map from them;
    grid: groups of channels x tiles of tokens x images."""
    c = tl.program_id(0) % groups * CB + tl.arange(0, CB)
    t = tl.program_id(0) // groups % tiles * BT + tl.arange(0, BT)
    image = (tl.program_id(0) // groups // tiles).to(tl.int64)
    p = tl.arange(0, BP)
    pixels, inside = pixels_of(
        map, image, c, t, stride_b, stride_y, stride_x, H, W, C, T, patches_x,
        PH, PW, BP, PADDED, RAGGED, WIDE,
    )  # fmt: skip
    row = ((image * C + c) * T)[:, None] + t[None, :]
    rows = planes + row[:, :, None] * LENGTH + p[None, None, :]
    there = ((c < C)[:, None] & (t < T)[None, :])[:, :, None] & (p < LENGTH)[None, None, :]
    if GATHER:
        tl.store(rows, tl.load(pixels, mask=inside, other=0.0), mask=there)
    else:
        tl.store(pixels, tl.load(rows, mask=there, other=0.0), mask=inside)


def _launch(map: Tensor, planes: Tensor, patches: Patches, gather: bool) -> None:
    channels = 32 // map.element_size()  # a sector of memory
    groups, tiles = -(-patches.C // channels), -(-patches.tokens // TOKENS)
    arguments = patches.arguments() | strides(map)
    arguments |= {"groups": groups, "tiles": tiles, "CB": channels, "BT": TOKENS}
    arguments |= {"RAGGED": patches.C % channels > 0, "WIDE": is_wide(patches, map)}
    arguments |= {"LENGTH": planes.shape[1], "GATHER": gather}
    programs = groups * tiles * patches.B
    _triton.launch(_move, programs, problem(patches, map), map=map, planes=planes, **arguments)


def to_planes(map: Tensor, patches: Patches, length: int) -> Tensor:
    """[B * C * T, length], zeros beyond the pixels of a patch, from a map with dense channels."""
    planes = map.new_empty(patches.B * patches.C * patches.tokens, length)
    _launch(map, planes, patches, True)
    return planes


def to_map(planes: Tensor, patches: Patches) -> Tensor:
    """[B, H, W, C] from rows of which the pixels of a patch are the first."""
    map = planes.new_empty(patches.B, patches.H, patches.W, patches.C)
    _launch(map, planes, patches, False)
    return map
