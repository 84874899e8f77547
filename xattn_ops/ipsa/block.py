"""The block of inference in one pass over the windows: linear, attention, linear.

q, k, v and the attention's output then never leave the cache. It needs the weights of both linear
layers in the order in which the kernel reads them; `PackedWeights` keeps them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._backend import choose
from .._registration import missing, register, untracked

# Windows a thread must get, or the threads are kept busier by the steps one by one.
MIN_WINDOWS_PER_THREAD = 2
FINGERPRINT = 256  # values of a weight compared to notice a change behind its version counter


class PackedWeights:
    """Packed copies of the linear weights of one module, made again when a weight changes.

    A change is seen by the parameter's version; one that goes around it (`weight.data`, as some
    moving averages do) by a sample of the values.
    """

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Any, Tensor, Tensor]] = {}

    def get(self, name: str, weight: Tensor) -> Tensor:
        weight = weight.detach()
        key = (weight.data_ptr(), weight._version, weight.shape)
        sample = weight.flatten()[:: max(1, weight.numel() // FINGERPRINT)]
        entry = self._packed.get(name)
        if entry is None or entry[0] != key or not torch.equal(entry[1], sample):
            packed = torch.ops.xattn_ops.ipsa_pack_weight(weight)
            entry = self._packed[name] = (key, sample.clone(), packed)
        return entry[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()  # a cache is not state: neither copied nor saved


def takes_block(
    x: Tensor, parameters: Sequence[Tensor | None], window: tuple[int, int], backend: str | None
) -> bool:
    """Whether this call of the module can and should run in one pass."""
    tensors = [x, *(p for p in parameters if p is not None)]
    if (
        not untracked(*tensors)
        or x.dim() != 4
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    plain = all(
        t.dtype == torch.float32
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and type(t) in (Tensor, torch.nn.Parameter)
        and not (t is not x and t.is_inference())  # no version to know a packed copy by
        for t in tensors
    )
    if not plain or missing("ipsa_block_fwd", "ipsa_pack_weight"):
        return False
    B, H, W, _ = x.shape
    windows = B * -(-H // window[0]) * -(-W // window[1])
    if windows < MIN_WINDOWS_PER_THREAD * torch.get_num_threads():
        return False
    return choose("inner_patch_attention", backend, "cpu", x.dtype) == "cpu"


def _flops(
    x: Any, qkv: Any, qkv_bias: Any, proj: Any, proj_bias: Any, table: Any, *rest: Any
) -> int:
    wh, ww = rest[1:3]
    B, H, W, C = x
    attention = B * -(-H // wh) * -(-W // ww) * (wh * ww) ** 2 * C
    return 2 * (4 * B * H * W * C * C + 2 * attention)


register(
    "ipsa_block_fwd",
    batched=("x",),
    fake=lambda x, *_: x.new_empty(x.shape),
    flops=_flops,
)
