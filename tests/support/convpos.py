"""Cases of conv_position_encoding."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import Tensor

from support.cases import Case, Tensors
from support.description import Description, param
from support.modules import OnMap
from xattn_ops import ConvPositionEncoding, conv_position_encoding
from xattn_ops.convrel import conv_position_encoding_reference


def convpos(
    B: int,
    grid: tuple[int, int],
    C: int,
    window: int = 3,
    bias: bool = True,
    prefix: int = 1,
) -> Case:
    N = prefix + grid[0] * grid[1]
    shapes: dict[str, tuple[int, ...]] = {"x": (B, N, C), "weight": (C, 1, window, window)}
    if bias:
        shapes["bias"] = (C,)
    return Case(
        conv_position_encoding,
        conv_position_encoding_reference,
        shapes,
        {"out": (B, N, C)},
        {"grid": grid, "num_prefix_tokens": prefix},
    )


_case = param(convpos)

SMALL = convpos(2, (5, 8), 8)

CASES = [
    _case("coat_lite_stage2", 2, (28, 28), 128),
    _case("coat_lite_stage2_small", 2, (5, 7), 128),
    _case("coat_lite_stage4", 2, (7, 7), 320),
    _case("coat_tiny", 1, (14, 14), 152),
    _case("batch_1", 1, (9, 10), 48),
    _case("odd_grid", 3, (11, 5), 16),
    _case("wide_grid", 1, (3, 37), 32),
    _case("one_row", 2, (1, 13), 8),
    _case("one_column", 2, (13, 1), 8),
    _case("one_pixel", 2, (1, 1), 5),
    _case("many_tokens", 1, (50, 41), 16),
    _case("no_prefix", 2, (6, 7), 24, prefix=0),
    _case("prefix_3", 2, (6, 7), 24, prefix=3),
    _case("channels_1", 2, (6, 7), 1),
    _case("channels_5", 2, (6, 7), 5),
    _case("channels_17", 2, (6, 7), 17),
    _case("channels_70", 1, (6, 7), 70),
    _case("window_1", 2, (6, 7), 16, window=1),
    _case("window_5", 2, (6, 7), 16, window=5),
    _case("window_7", 2, (9, 7), 19, window=7),
    _case("window_9", 1, (12, 11), 16, window=9),
    _case("window_larger_than_the_grid", 2, (2, 3), 16, window=7),
    _case("no_bias", 2, (6, 7), 24, bias=False),
    _case("no_bias_odd", 2, (5, 3), 19, window=5, bias=False, prefix=0),
    _case("empty_batch", 0, (6, 7), 16),
    _case("empty_batch_no_bias", 0, (6, 7), 16, bias=False),
]


def by_loops(case: Case, tensors: Tensors) -> Tensor:
    """The definition, token by token and channel by channel; shares nothing with the reference."""
    x, weight = tensors["x"], tensors["weight"]
    (H, W), prefix = case.options["grid"], case.options["num_prefix_tokens"]
    k = weight.shape[-1]
    out = x.clone()
    for n in range(prefix, x.shape[1]):
        y, column = divmod(n - prefix, W)
        if "bias" in tensors:
            out[:, n] += tensors["bias"]
        for i, j in ((i, j) for i in range(k) for j in range(k)):
            top, left = y + i - k // 2, column + j - k // 2
            if 0 <= top < H and 0 <= left < W:
                out[:, n] += weight[:, 0, i, j] * x[:, prefix + top * W + left]
    return out


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    return convpos(
        draw(st.integers(0, 3)),
        (draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        draw(st.integers(1, 70)),
        window=draw(st.sampled_from([1, 3, 3, 5, 7, 9])),
        bias=draw(st.booleans()),
        prefix=draw(st.sampled_from([0, 1, 1, 3])),
    )


DESCRIPTION = Description(
    name="convpos",
    small=SMALL,
    cases=CASES,
    random=random_cases(),
    isa=[
        "coat_tiny",
        "channels_17",
        "prefix_3",
        "window_7",
        "window_larger_than_the_grid",
        "no_bias_odd",
    ],
    definition=by_loops,
    defined=[
        _case("window_3", 2, (4, 5), 3),
        _case("window_5", 1, (2, 6), 2, window=5, prefix=0),
        _case("no_bias", 1, (3, 1), 2, bias=False, prefix=3),
    ],
    gradcheck=[
        _case("window_3", 2, (3, 4), 3),
        _case("window_5", 1, (2, 3), 2, window=5, prefix=0),
        _case("no_bias", 1, (1, 4), 2, bias=False, prefix=2),
    ],
    twice=convpos(1, (2, 3), 2),
    strided=[
        _case("window_3", 2, (5, 8), 19),
        _case("window_5", 2, (9, 8), 19, window=5),
        _case("whole_vectors", 2, (5, 8), 72),
        _case("whole_vectors_window_9", 1, (4, 3), 16, window=9),
    ],
    steady=[
        _case("odd_grid", 3, (13, 11), 40),
        _case("batch_1", 1, (14, 14), 64),
        _case("batch_3", 3, (7, 9), 35, window=5),
        _case("many_tokens", 1, (60, 56), 16),
    ],
    large=convpos(1, (128, 128), 64),
    scratch=1 << 20,
    module=lambda **options: OnMap(ConvPositionEncoding(8, **options)),
    of_size=lambda B, H, W: convpos(B, (H, W), 8),
)
