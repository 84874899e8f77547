"""Multiply-accumulates (MACs) of the operators by the papers' formulas, and of a model by counting.

The papers print MACs and call them FLOPs; one MAC is two floating-point operations. Formulas count
the matrix products and convolutions alone (no softmax, no bias, no normalisation), and so does the
counter. Both count the papers' algorithm, padding included where a map is padded; what a kernel of
ours executes instead, where it absorbs projections into each other, are `cpsa_absorbed` and
`cls_cross_absorbed`.

CAT: "CAT: Cross Attention in Vision Transformer", arXiv:2106.05786.
CoaT: "Co-Scale Conv-Attentional Image Transformers", arXiv:2104.06399.
CabViT: "CabViT: Cross Attention among Blocks for Vision Transformer", Zhang, Hu and Wang.
CrossViT: "Cross-Attention Multi-Scale Vision Transformer", arXiv:2103.14899.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = [
    "cls_cross",
    "cls_cross_absorbed",
    "conv_position",
    "conv_relative",
    "count",
    "cpsa",
    "cpsa_absorbed",
    "digest",
    "ffn",
    "ipsa",
    "msa",
]


def msa(height: int, width: int, channels: int) -> int:
    """MACs of multi-head self-attention over a whole map: 4 HW C^2 + 2 (HW)^2 C (CAT eq. 1).

    The first term is the qkv and output projections, the second Q K^T and the product with V. The
    number of heads does not enter.

    Args:
        height, width: size of the map in tokens.
        channels: width of a token.

    Returns:
        MACs of one image. ``msa(56, 56, 96)`` is 2.0 G.
    """
    _check_sizes(height=height, width=width, channels=channels)
    tokens = height * width
    return 4 * tokens * channels**2 + 2 * tokens**2 * channels


def ffn(tokens: int, channels: int, ratio: int = 4) -> int:
    """MACs of the feed-forward part of a block: 2 r n d^2, 8 n d^2 at r = 4 (CabViT Fig. 5).

    With `msa` it makes the whole block of the figure, 12 n d^2 + 2 n^2 d.

    Args:
        tokens: n.
        channels: d, the width of a token.
        ratio: r, the width of the hidden layer over d.

    Returns:
        MACs of one image. ``ffn(196, 192)`` is 58 M, of 102 M of the block.
    """
    _check_sizes(tokens=tokens, channels=channels, ratio=ratio)
    return 2 * ratio * tokens * channels**2


def ipsa(height: int, width: int, channels: int, window: int | tuple[int, int] = 7) -> int:
    """MACs of inner-patch self-attention: 4 HW C^2 + 2 N^2 HW C (CAT eq. 2).

    The paper assumes that the N x N window divides the map. Where it does not, the attention
    (second term) runs over the map padded to whole windows and is counted there; the projections
    (first term) run over the HW real tokens.

    Args:
        height, width: size of the map in tokens.
        channels: width of a token.
        window: N, or (rows, columns) of a rectangular window, where N^2 is their product.

    Returns:
        MACs of one image. ``ipsa(56, 56, 96, 7)`` is 0.15 G.
    """
    rows, columns = _pair(window, "window")
    _check_sizes(height=height, width=width, channels=channels)
    padded = _round_up(height, rows) * _round_up(width, columns)
    return 4 * height * width * channels**2 + 2 * rows * columns * padded * channels


def cpsa(height: int, width: int, channels: int, patch: int | tuple[int, int] = 7) -> int:
    """MACs of cross-patch self-attention: 4 N^2 HW C + 2 (HW/N)^2 C (CAT eq. 3).

    Each channel has HW / N^2 tokens of width N^2: projections cost 4 N^4 a token, attention
    2 (HW / N^2)^2 N^2 a channel. A map that the patch does not divide is counted at its padded
    size: padded elements are part of the tokens. This is the algorithm of the paper; see
    `cpsa_absorbed` for what our kernel executes.

    Args:
        height, width: size of the map.
        channels: number of single-channel maps.
        patch: N, or (rows, columns) of a rectangular patch, where N^2 is their product.

    Returns:
        MACs of one image. ``cpsa(56, 56, 96, 7)`` is 0.1 G.
    """
    length, padded = _patches(height, width, channels, patch)
    tokens = padded // length
    return 4 * length * padded * channels + 2 * tokens**2 * length * channels


def cpsa_absorbed(
    height: int, width: int, channels: int, patch: int | tuple[int, int] = 7, batch: int = 1
) -> int:
    """MACs of CPSA with its projections absorbed: B (2 N^2 HW C + 2 (HW/N)^2 C) + 2 N^6.

    With one head q k^T = (x A) x^T, A = W_q^T W_k, and (P v) W_o = (P x) (W_v W_o): two projections
    of the tokens instead of four, and two products of weights, N^2 x N^2 each, once a call. Where
    the map is one patch the weights P are 1, and one projection is all. With several heads or
    dropout the kernel does what eq. 3 counts.

    Args:
        height, width, channels, patch: as in `cpsa`.
        batch: images of the call.

    Returns:
        MACs of the whole call. ``cpsa_absorbed(56, 56, 96)`` is 0.07 G.
    """
    _check_sizes(batch=batch)
    length, padded = _patches(height, width, channels, patch)
    tokens = padded // length
    if tokens == 1:
        return batch * length * padded * channels + length**3
    image = 2 * length * padded * channels + 2 * tokens**2 * length * channels
    return batch * image + 2 * length**3


def conv_relative(
    height: int,
    width: int,
    channels: int,
    num_heads: int = 8,
    windows: Mapping[int, int] = MappingProxyType({3: 2, 5: 3, 7: 3}),
    num_prefix_tokens: int = 1,
) -> int:
    """MACs of conv-relative attention: 4 N C^2 + 2 N C^2 / h + HW sum_g C_g M_g^2 (CoaT eq. 12).

    N = HW + prefix tokens, h the number of heads. The first term is the qkv and output
    projections; the second softmax(K)^T V and the product of Q with it, which the paper gives as
    O(NC^2) (eq. 3); the third the depthwise convolutions with windows M_g over C_g channels each,
    O(NCM^2) (eq. 10).

    Args:
        height, width: size of the image in tokens.
        channels: width of a token; num_heads divides it.
        num_heads: h.
        windows: M_g -> how many heads have it; {} for no relative term.
        num_prefix_tokens: tokens besides the image, such as CLS.

    Returns:
        MACs of one image. ``conv_relative(56, 56, 64)`` is 61 M.
    """
    _check_sizes(height=height, width=width, channels=channels, num_heads=num_heads)
    if not isinstance(num_prefix_tokens, int) or num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens must not be negative, got {num_prefix_tokens!r}")
    if channels % num_heads:
        raise ValueError(f"num_heads must divide channels, {channels}, got {num_heads}")
    if windows and sum(windows.values()) != num_heads:
        raise ValueError(f"windows must share out {num_heads} heads, got {dict(windows)}")
    head_dim, tokens = channels // num_heads, height * width + num_prefix_tokens
    taps = sum(heads * head_dim * window**2 for window, heads in windows.items())
    return 4 * tokens * channels**2 + 2 * tokens * channels * head_dim + height * width * taps


def conv_position(height: int, width: int, channels: int, window: int = 3) -> int:
    """MACs of the conv position encoding: HW C M^2 (CoaT 4.2), of the image's tokens alone.

    Args:
        height, width: size of the image in tokens.
        channels: width of a token.
        window: M, the side of the depthwise kernel.

    Returns:
        MACs of one image. ``conv_position(56, 56, 64)`` is 1.8 M.
    """
    _check_sizes(height=height, width=width, channels=channels, window=window)
    return height * width * channels * window**2


def cls_cross(patches: int, channels: int) -> int:
    """MACs of CLS-query cross attention: 2 (N + 2) C^2 + 2 (N + 1) C (CrossViT eq. 6).

    The first term is the projections: q and the output of one token, k and v of N + 1. The second
    is q k^T and the product with v, linear in N where self-attention is quadratic. The number of
    heads does not enter. This is the algorithm of the paper; see `cls_cross_absorbed` for what our
    kernel executes.

    Args:
        patches: N, tokens besides CLS.
        channels: width of a token.

    Returns:
        MACs of one image. ``cls_cross(400, 192)`` is 30 M.
    """
    _check_sizes(patches=patches, channels=channels)
    return 2 * (patches + 2) * channels**2 + 2 * (patches + 1) * channels


def cls_cross_absorbed(patches: int, channels: int, num_heads: int) -> int:
    """MACs of CLS-query cross attention without keys and values: 4 C^2 + 2 (N + 1) C h.

    q_h k_n = (q_h W_k) t_n and sum_n p_n (W_v t_n) = W_v (sum_n p_n t_n): the projections act on
    one token, h times C / h wide, and each of the h heads reads the N + 1 tokens at full width.

    Args:
        patches, channels: as in `cls_cross`.
        num_heads: h; it divides channels.

    Returns:
        MACs of one image. ``cls_cross_absorbed(400, 192, 6)`` is 1.1 M.
    """
    _check_sizes(patches=patches, channels=channels, num_heads=num_heads)
    if channels % num_heads:
        raise ValueError(f"num_heads must divide channels, {channels}, got {num_heads}")
    return 4 * channels**2 + 2 * (patches + 1) * channels * num_heads


def digest(tokens: int, channels: int, digests: int = 0) -> int:
    """MACs of digest attention: 4 n C^2 + 2 n (n + m) C + 2 m C^2 (CabViT 3.3, eq. 1-4).

    The first two terms are those of plain attention (CabViT Fig. 5), with n + m keys for n queries;
    the third projects m digests to keys and values. The official code projects them to queries as
    well, which nobody reads.

    Args:
        tokens: n, prefix tokens included.
        channels: width of a token.
        digests: m, over all earlier blocks: (l - 1) n / s^2 in block l.

    Returns:
        MACs of one image. ``digest(196, 192, 80)`` is 56 M.
    """
    _check_sizes(tokens=tokens, channels=channels)
    if not isinstance(digests, int) or digests < 0:
        raise ValueError(f"digests must not be negative, got {digests!r}")
    projections = 4 * tokens * channels**2 + 2 * digests * channels**2
    return projections + 2 * tokens * (tokens + digests) * channels


def count(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the MACs that one forward pass of a model executes, by module.

    Runs the model once, in eval mode and without gradients, on zeros of the parameters' device and
    dtype, under :class:`torch.utils.flop_counter.FlopCounterMode`; MACs are its FLOPs halved.
    Matrix products, convolutions and torch's attention are counted, and every operator that
    registered a formula.

    Args:
        model: any module that takes one tensor.
        input_shape: full shape of that tensor, batch included, e.g. ``(1, 3, 224, 224)``.

    Returns:
        MACs by qualified module name, children included in their parents, even where something
        else calls them; ``""`` is the whole model. A module that executed nothing countable is
        absent.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(tuple(input_shape), dtype=like.dtype, device=like.device)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_SDPA) as mode:
            macs = _by_module(model, image, lambda: mode.get_total_flops() // 2)
    finally:
        for module in was_training:
            module.training = True
    return {name: count for name, count in macs.items() if count or not name}


def _by_module(model: nn.Module, image: torch.Tensor, total: Callable[[], int]) -> dict[str, int]:
    """Run the model; what `total` grew by while a module or one below it by name ran."""
    macs: dict[str, int] = {}
    running: dict[str, int] = {}  # the total when it began

    def lineage(name: str) -> list[str]:
        parts = name.split(".") if name else []
        return [".".join(parts[:length]) for length in range(len(parts) + 1)]

    hooks = []
    for name, module in model.named_modules():
        begun: list[list[str]] = []  # for each call of this module that has not returned

        def enter(*_: Any, name: str = name, begun: list[list[str]] = begun) -> None:
            begun.append([one for one in lineage(name) if one not in running])
            running.update(dict.fromkeys(begun[-1], total()))

        def leave(*_: Any, begun: list[list[str]] = begun) -> None:
            for one in begun.pop():
                macs[one] = macs.get(one, 0) + total() - running.pop(one)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return macs


# torch's counter knows its attention on CUDA, not the one on the CPU
_SDPA = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **options: sdpa_flop_count(q, k, v)
    )
}


def _patches(
    height: int, width: int, channels: int, patch: int | tuple[int, int]
) -> tuple[int, int]:
    """N^2, the width of CPSA's tokens, and the pixels of the padded map."""
    rows, columns = _pair(patch, "patch")
    _check_sizes(height=height, width=width, channels=channels)
    return rows * columns, _round_up(height, rows) * _round_up(width, columns)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    _check_sizes(**{f"{name} rows": rows, f"{name} columns": columns})
    return rows, columns


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
