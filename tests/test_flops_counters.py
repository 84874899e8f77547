"""What torch's FLOP counter counts of the native ops, against the references' own products."""

import pytest
import torch
from support.cases import native
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from xattn_ops import (
    cls_cross_attention,
    conv_position_encoding,
    conv_relative_attention,
    cross_patch_attention,
    digest_attention,
    inner_patch_attention,
    token_merge_enhance,
)


def test_every_op_has_a_counter():
    """All but the one that only lays weights out differently."""
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("xattn_ops::")}
    counted = {f"xattn_ops::{op.__name__}" for op in flop_registry if "xattn_ops." in str(op)}
    assert names - counted <= {"xattn_ops::ipsa_pack_weight"}


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def cpsa_weights(length):
    return leaf(3 * length, length), None, leaf(length, length), None


STEPS = [  # call, MACs of its convolutions, MACs that the kernel's backward computes once more
    pytest.param(
        lambda **options: inner_patch_attention(leaf(3, 14, 21, 48), num_heads=2, **options),
        0,
        3 * 6 * 49 * 49 * 16,
        id="ipsa: the scores",
    ),
    pytest.param(
        lambda **options: digest_attention(
            leaf(2, 25, 48), leaf(2, 7, 32), num_heads=2, grid=(5, 5), **options
        ),
        0,
        2 * 25 * 32 * 16,
        id="digest: the scores",
    ),
    pytest.param(
        lambda **options: cross_patch_attention(
            leaf(2, 8, 9, 5), *cpsa_weights(12), patch=(4, 3), **options
        ),
        0,
        2 * 5 * (3 * 6 * 12 * 12 + 2 * 6 * 6 * 12),
        id="cpsa: all but the last projection",
    ),
    pytest.param(
        lambda **options: conv_relative_attention(
            leaf(2, 26, 48), [leaf(8, 1, 3, 3), leaf(8, 1, 5, 5)], num_heads=2, grid=(5, 5),
            **options,
        ),
        2 * 25 * 8 * (9 + 25),
        2 * 25 * 8 * (9 + 25),
        id="conv-relative: the convolutions",
    ),
    pytest.param(
        lambda **options: conv_position_encoding(
            leaf(2, 26, 16), leaf(16, 1, 3, 3), grid=(5, 5), **options
        ),
        2 * 25 * 16 * 9,
        0,
        id="conv-position: nothing",
    ),
    pytest.param(
        lambda **options: torch.cat(
            token_merge_enhance(
                leaf(2, 26, 16), leaf(16, 1, 7, 7), leaf(16, 1, 3, 3), grid=(5, 5),
                num_prefix_tokens=1, **options,
            ),
            1,
        ),
        2 * 16 * (4 * 49 + 25 * 9),
        0,
        id="merge: nothing",
    ),
    pytest.param(
        lambda **options: cls_cross_attention(
            leaf(2, 1, 16), leaf(2, 25, 16), *[leaf(16, 16), leaf(16)] * 3, num_heads=2, **options
        ),
        0,
        0,
        id="cls: nothing",
    ),
]  # fmt: skip


def macs_of_a_step(call):
    """MACs of forward and of backward, the latter without those of convolutions."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    convolved = backward.get_flop_counts()["Global"].get(torch.ops.aten.convolution_backward, 0)
    return forward.get_total_flops() // 2, (backward.get_total_flops() - convolved) // 2


@native
@pytest.mark.parametrize(("call", "convolved", "again"), STEPS)
def test_counters_are_the_reference_s_products(call, convolved, again):
    """Forward: the same. Backward: two for each of the forward's, and what is computed again.

    Torch's count of the backward of a depthwise convolution is too high, for it takes the weight's
    gradient to be that of all pairs of channels: it is counted by hand.
    """
    forward, backward = macs_of_a_step(lambda: call(backend="reference"))
    assert backward == 2 * (forward - convolved)
    assert macs_of_a_step(lambda: call(backend="cpu")) == (forward, 2 * forward + again)
