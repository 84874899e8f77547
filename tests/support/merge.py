"""Cases of token_merge_enhance."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from support.cases import Case, Tensors
from support.description import Description, param
from support.modules import OnMap
from xattn_ops import TokenMergeEnhance, token_merge_enhance
from xattn_ops.digest import token_merge_enhance_reference


def merge(
    B: int,
    grid: tuple[int, int],
    C: int,
    window: int | None = 7,
    stride: int = 4,
    enhance: int = 3,
    bias: bool = True,
    prefix: int = 0,
) -> Case:
    """window: of the merge; None for none."""
    N, m = prefix + grid[0] * grid[1], -(-grid[0] // stride) * -(-grid[1] // stride)
    shapes: dict[str, tuple[int, ...]] = {"x": (B, N, C)}
    outs = {"enhanced": (B, N, C)}
    options: dict[str, Any] = {"grid": grid, "stride": stride, "num_prefix_tokens": prefix}
    if window is None:
        options["merge_weight"] = None
    else:
        shapes["merge_weight"] = (C, 1, window, window)
        outs = {"digests": (B, m, C)} | outs
    shapes["enhance_weight"] = (C, 1, enhance, enhance)
    if bias:
        shapes["enhance_bias"] = (C,)
    return Case(token_merge_enhance, token_merge_enhance_reference, shapes, outs, options)


class MergeOnMap(OnMap):
    """TokenMergeEnhance as a module of maps: both of its outputs in one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(TokenMergeEnhance(8, num_prefix_tokens=1, **options))

    def of_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        digests, enhanced = self.module(tokens, grid)
        return enhanced + digests.mean(1, keepdim=True)


_case = param(merge)

SMALL = merge(2, (5, 8), 8, prefix=1)

CASES = [
    _case("cabvit_stage3", 2, (14, 14), 192),
    _case("cabvit_h_l2_stage3", 1, (14, 14), 320),
    _case("cabvit_stage4", 2, (7, 7), 320),
    _case("cabvit_last_block", 1, (14, 14), 192, window=None),
    _case("cabvit_plain", 1, (14, 14), 192, prefix=1),
    _case("odd_grid", 3, (11, 5), 16),
    _case("wide_grid", 1, (3, 37), 32),
    _case("tall_grid", 1, (37, 2), 32),
    _case("one_row", 2, (1, 13), 8),
    _case("one_column", 2, (13, 1), 8),
    _case("one_pixel", 2, (1, 1), 5),
    _case("smaller_than_the_window", 2, (2, 3), 16),
    _case("many_tokens", 1, (50, 41), 16),
    _case("prefix_2", 2, (6, 7), 24, prefix=2),
    _case("no_bias", 2, (6, 7), 24, bias=False),
    _case("no_bias_odd", 2, (5, 3), 19, bias=False, prefix=1),
    _case("no_merge_odd", 2, (5, 3), 19, window=None, prefix=1),
    _case("no_merge_no_bias", 2, (5, 4), 16, window=None, bias=False),
    _case("channels_1", 2, (6, 7), 1),
    _case("channels_5", 2, (6, 7), 5),
    _case("channels_17", 2, (6, 7), 17),
    _case("channels_70", 1, (6, 7), 70),
    _case("channels_130", 1, (6, 7), 130),
    _case("window_1_stride_1", 2, (6, 7), 16, window=1, stride=1),
    _case("window_1_stride_3", 2, (6, 7), 16, window=1, stride=3),
    _case("window_3_stride_1", 2, (6, 7), 16, window=3, stride=1),
    _case("window_3_stride_2", 2, (9, 8), 19, window=3, stride=2),
    _case("window_3_stride_4", 2, (9, 8), 16, window=3, stride=4),
    _case("window_5_stride_2", 2, (9, 11), 19, window=5, stride=2),
    _case("window_5_stride_3", 2, (10, 7), 16, window=5, stride=3),
    _case("window_7_stride_1", 1, (9, 10), 16, window=7, stride=1),
    _case("window_7_stride_2", 1, (13, 15), 16, window=7, stride=2),
    _case("window_7_stride_3", 1, (13, 15), 19, window=7, stride=3),
    _case("window_9_stride_4", 1, (12, 11), 16, window=9, stride=4),
    _case("stride_beyond_the_grid", 2, (5, 6), 16, stride=100),
    _case("enhance_1", 2, (6, 7), 16, enhance=1),
    _case("enhance_5", 2, (6, 7), 19, enhance=5),
    _case("enhance_7_merge_3", 2, (9, 7), 16, enhance=7, window=3, stride=2),
    _case("enhance_9", 1, (12, 5), 16, enhance=9),
    _case("empty_batch", 0, (6, 7), 16),
    _case("empty_batch_no_merge", 0, (6, 7), 16, window=None, bias=False, prefix=1),
]


def by_loops(case: Case, tensors: Tensors) -> tuple[Tensor | None, Tensor]:
    """The definition, token by token; shares nothing with the reference."""
    x, bias = tensors["x"], tensors.get("enhance_bias")
    (H, W), prefix = case.options["grid"], case.options["num_prefix_tokens"]

    def convolve(weight: Tensor, stride: int) -> Tensor:
        rows, columns, k = -(-H // stride), -(-W // stride), weight.shape[-1]
        out = x.new_zeros(x.shape[0], rows * columns, x.shape[2])
        for n in range(rows * columns):
            for i, j in ((i, j) for i in range(k) for j in range(k)):
                y = n // columns * stride + i - k // 2
                column = n % columns * stride + j - k // 2
                if 0 <= y < H and 0 <= column < W:
                    out[:, n] += weight[:, 0, i, j] * x[:, prefix + y * W + column]
        return out

    enhanced = x.clone()
    enhanced[:, prefix:] = convolve(tensors["enhance_weight"], 1) + (0 if bias is None else bias)
    if "merge_weight" not in tensors:
        return None, enhanced
    return convolve(tensors["merge_weight"], case.options["stride"]), enhanced


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    return merge(
        draw(st.integers(0, 3)),
        (draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        draw(st.integers(1, 70)),
        window=draw(st.sampled_from([None, 1, 3, 5, 7, 7])),
        stride=draw(st.integers(1, 5)),
        enhance=draw(st.sampled_from([1, 3, 3, 5])),
        bias=draw(st.booleans()),
        prefix=draw(st.sampled_from([0, 0, 1, 3])),
    )


DESCRIPTION = Description(
    name="merge",
    small=SMALL,
    cases=CASES,
    random=random_cases(),
    isa=[
        "cabvit_stage4",
        "channels_17",
        "prefix_2",
        "window_5_stride_3",
        "smaller_than_the_window",
        "no_bias_odd",
        "no_merge_odd",
        "enhance_5",
    ],
    definition=by_loops,
    defined=[
        _case("window_7", 2, (5, 6), 3),
        _case("window_3", 1, (2, 6), 2, window=3, stride=2, prefix=1),
        _case("no_merge", 1, (3, 2), 2, window=None, bias=False, prefix=3),
    ],
    gradcheck=[
        _case("window_3", 2, (3, 4), 2, window=3, stride=2),
        _case("window_5", 1, (2, 3), 2, window=5, prefix=1),
        _case("no_merge", 1, (1, 4), 2, window=None, bias=False, prefix=2),
    ],
    twice=merge(1, (2, 3), 2, window=3, stride=2),
    strided=[
        _case("window_7", 2, (5, 8), 19),
        _case("window_3", 2, (9, 8), 19, window=3, stride=2, enhance=5, prefix=1),
    ],
    steady=[
        _case("odd_grid", 3, (13, 11), 40),
        _case("batch_1", 1, (14, 14), 64),
        _case("batch_3", 3, (7, 9), 35, window=5, stride=2),
        _case("many_tokens", 1, (60, 56), 16),
    ],
    large=merge(1, (128, 128), 64),
    scratch=1 << 20,
    module=lambda **options: MergeOnMap(**options),
    of_size=lambda B, H, W: merge(B, (H, W), 8),
)
