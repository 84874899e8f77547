"""The one-pass block of inference behind `InnerPatchAttention`: same numbers, fresh weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.oracle import check_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xattn_ops import InnerPatchAttention
from xattn_ops.ipsa import inner_patch_attention_reference

SHAPES = [
    pytest.param((2, 14, 14, 96), 3, {}, id="cat"),
    pytest.param((2, 13, 9, 64), 2, {"shift": (3, 3)}, id="padded_shifted"),
    pytest.param((3, 5, 11, 57), 3, {"window": (4, 3), "shift": (2, 1)}, id="odd_channels"),
    pytest.param((4, 16, 8, 40), 5, {"window": (8, 8), "scale": 0.3}, id="window_8"),
    pytest.param((4, 7, 7, 16), 1, {"qkv_bias": False}, id="no_qkv_bias"),
    pytest.param((8, 1, 3, 19), 1, {"window": (1, 2)}, id="head_dim_19"),
]


def block(channels: int, heads: int, **options: Any) -> InnerPatchAttention:
    module = InnerPatchAttention(channels, heads, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return module


def steps(module: InnerPatchAttention, x: Tensor) -> Tensor:
    """The same by the reference, in the dtype of x."""
    p = {name: None if t is None else t.to(x.dtype) for name, t in module.named_parameters()}
    out = inner_patch_attention_reference(
        F.linear(x, p["qkv.weight"], p.get("qkv.bias")),
        p["relative_position_bias_table"],
        num_heads=module.num_heads,
        window=module.window,
        shift=module.shift,
        pad_qkv=p.get("qkv.bias"),
        scale=module.scale,
    )
    return F.linear(out, p["proj.weight"], p["proj.bias"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one entry a call of the one-pass op."""
    seen: list[str] = []
    whole = InnerPatchAttention._one_pass

    def counted(self: InnerPatchAttention, *args: Any) -> Tensor:
        seen.append("one pass")
        return whole(self, *args)

    monkeypatch.setattr(InnerPatchAttention, "_one_pass", counted)
    return seen


@pytest.mark.parametrize(("shape", "heads", "options"), SHAPES)
@torch.no_grad()
def test_agrees_with_float64(
    shape: tuple[int, ...], heads: int, options: dict[str, Any], calls: list[str]
) -> None:
    module, x = block(shape[-1], heads, **options), torch.randn(shape)
    got = module(x)
    assert calls == ["one pass"]
    check_close("out", got, steps(module, x), steps(module, x.double()))


@torch.no_grad()
def test_strided_input(calls: list[str]) -> None:
    module = block(32, 1)
    x = torch.randn(2, 32, 15, 20).permute(0, 2, 3, 1)[:, 1:, ::2]
    got = module(x)
    assert calls == ["one pass"]
    check_close("out", got, steps(module, x), steps(module, x.double()))


@torch.no_grad()
def test_same_bits_on_any_number_of_threads(threads: None) -> None:
    module, x = block(64, 2), torch.randn(4, 14, 14, 64)
    torch.set_num_threads(1)
    one = module(x)
    torch.set_num_threads(2)
    assert torch.equal(module(x), one)


def _optimizer_step(module: InnerPatchAttention) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.5).step()


def _load(module: InnerPatchAttention) -> None:
    module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()})


def _replace(module: InnerPatchAttention) -> None:
    module.qkv.weight = torch.nn.Parameter(torch.randn_like(module.qkv.weight))


def _behind_the_version(module: InnerPatchAttention) -> None:
    module.proj.weight.data.mul_(0.9)  # leaves the version counter alone


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_optimizer_step, id="optimizer_step"),
        pytest.param(_load, id="load_state_dict"),
        pytest.param(_replace, id="new_parameter"),
        pytest.param(_behind_the_version, id="data_in_place"),
    ],
)
def test_changed_weights_are_packed_again(
    change: Callable[[InnerPatchAttention], None], calls: list[str]
) -> None:
    module, x = block(32, 1), torch.randn(4, 7, 7, 32)
    with torch.no_grad():
        before = module(x)
    change(module)
    with torch.no_grad():
        after = module(x)
        assert calls == ["one pass"] * 2
        assert not torch.allclose(before, after)
        check_close("out", after, steps(module, x), steps(module, x.double()))


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(32, 1), torch.randn(4, 7, 7, 32)
    with torch.no_grad():
        module(x)
        first = module._packed.get("qkv", module.qkv.weight)
        module(x)
        assert module._packed.get("qkv", module.qkv.weight) is first


def test_packed_weights_are_no_state() -> None:
    module, x = block(32, 1), torch.randn(4, 7, 7, 32)
    keys = set(module.state_dict())
    with torch.no_grad():
        expected = module(x)
    assert set(module.state_dict()) == keys
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert not twin._packed._packed
        with torch.no_grad():
            assert torch.equal(twin(x), expected)


def test_gradients_take_the_steps(calls: list[str]) -> None:
    module, x = block(32, 1), torch.randn(4, 7, 7, 32)
    module(x).sum().backward()
    assert module.qkv.weight.grad is not None
    assert not calls


@pytest.mark.parametrize(
    "why",
    ["backend", "training_dropout", "bfloat16", "autocast", "one_window", "compiled"],
)
@torch.no_grad()
def test_where_it_does_not_apply_the_steps_run(why: str, calls: list[str]) -> None:
    options: dict[str, Any] = {"backend": "reference"} if why == "backend" else {}
    options |= {"attn_drop": 0.5} if why == "training_dropout" else {}
    module = block(32, 1, **options).train(why == "training_dropout")
    x = torch.randn(1 if why == "one_window" else 4, 7, 7, 32)
    if why == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16()
    if why == "compiled":
        module = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", enabled=why == "autocast"):
        assert module(x).shape == x.shape
    assert not calls


@torch.no_grad()
def test_counts_its_operations(calls: list[str]) -> None:
    module, x = block(32, 1), torch.randn(4, 9, 7, 32)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert calls == ["one pass"]
    linears = 4 * x.shape[:3].numel() * 32 * 32
    attention = 2 * 4 * 2 * 49 * 49 * 32  # padded to two windows an image
    assert counter.get_total_flops() == 2 * (linears + attention)


def test_opcheck() -> None:
    module, x = block(32, 1), torch.randn(2, 9, 7, 32)
    pack = torch.ops.xattn_ops.ipsa_pack_weight
    args = (
        x,
        pack(module.qkv.weight.detach()),
        module.qkv.bias.detach(),
        pack(module.proj.weight.detach()),
        module.proj.bias.detach(),
        module.relative_position_bias_table.detach(),
        *(1, 7, 7, 0, 0, 0.2),
    )
    torch.library.opcheck(torch.ops.xattn_ops.ipsa_block_fwd, args)


@torch.no_grad()
def test_wrong_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"x .*32"):
        block(32, 1)(torch.randn(4, 7, 7, 16))
