"""The papers' closed forms, and the count of what a model executes."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from xattn_ops import (
    ClsCrossAttention,
    ConvPositionEncoding,
    ConvRelativeAttention,
    CrossPatchAttention,
    DigestAttention,
    InnerPatchAttention,
    conv_relative_attention,
    flops,
)
from xattn_ops.benchmarks.baselines import cls_absorbed
from xattn_ops.cpsa import cross_patch_attention_reference
from xattn_ops.models import create_model


def test_the_paper_s_own_figures():
    """CAT, section 3.1: at H = W = 56, C = 96, N = 7 eq. 1-3 give 2.0, 0.15 and 0.1 G."""
    assert flops.msa(56, 56, 96) == 4 * 56**2 * 96**2 + 2 * 56**4 * 96
    assert flops.msa(56, 56, 96) / 1e9 == pytest.approx(2.0, abs=0.05)
    assert flops.ipsa(56, 56, 96, 7) == 4 * 56**2 * 96**2 + 2 * 49 * 56**2 * 96
    assert flops.ipsa(56, 56, 96, 7) / 1e9 == pytest.approx(0.15, abs=0.005)
    assert flops.cpsa(56, 56, 96, 7) == 4 * 49 * 56**2 * 96 + 2 * (56**2 // 7) ** 2 * 96
    assert flops.cpsa(56, 56, 96, 7) / 1e9 == pytest.approx(0.1, abs=0.005)


def test_one_window_over_the_map_is_plain_attention():
    assert flops.ipsa(5, 9, 32, (5, 9)) == flops.msa(5, 9, 32)


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [
        pytest.param(14, 14, (7, 7), id="whole-windows"),
        pytest.param(12, 10, (3, 5), id="rectangular"),
        pytest.param(9, 11, (4, 4), id="padded"),
        pytest.param(3, 2, (7, 7), id="smaller-than-a-window"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_formula_equals_count_for_ipsa(height, width, window, backend):
    module = InnerPatchAttention(16, 2, window, backend=backend)
    counted = flops.count(module, (3, height, width, 16))[""]
    assert counted == 3 * flops.ipsa(height, width, 16, window)


@pytest.mark.parametrize(
    ("height", "width", "patch", "heads"),
    [
        pytest.param(14, 21, (7, 7), 1, id="whole-patches"),
        pytest.param(12, 10, (3, 5), 3, id="rectangular-multi-head"),
        pytest.param(9, 11, (4, 4), 1, id="padded"),
        pytest.param(7, 7, (7, 7), 1, id="one-patch"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_formula_equals_count_for_cpsa(height, width, patch, heads, backend):
    module = CrossPatchAttention(patch, heads, backend=backend)
    counted = flops.count(module, (2, height, width, 5))[""]
    assert counted == 2 * flops.cpsa(height, width, 5, patch)


def test_what_the_absorbed_cpsa_executes():
    """The products that `cpsa_absorbed` counts give what eq. 3 gives."""
    length = 4 * 3
    x = torch.randn(2, 8, 9, 5).double()
    qkv, proj = torch.randn(3 * length, length).double(), torch.randn(length, length).double()
    with FlopCounterMode(display=False) as counter:
        wq, wk, wv = qkv.split(length)
        tokens = x.unflatten(1, (2, 4)).unflatten(3, (3, 3)).permute(0, 5, 1, 3, 2, 4).flatten(4)
        tokens = tokens.flatten(2, 3)  # [B, C, T, P]
        weights = (tokens @ (wq.T @ wk) @ tokens.mT * length**-0.5).softmax(-1)
        out = weights @ tokens @ (wv.T @ proj.T)
    assert counter.get_total_flops() // 2 == flops.cpsa_absorbed(8, 9, 5, (4, 3), batch=2)
    expected = cross_patch_attention_reference(x, qkv, None, proj, None, patch=(4, 3))
    out = out.unflatten(3, (4, 3)).unflatten(2, (2, 3)).permute(0, 2, 4, 3, 5, 1)
    torch.testing.assert_close(out.reshape(x.shape), expected)


def test_absorbing_pays_off_and_leaves_one_projection_of_one_patch():
    assert flops.cpsa_absorbed(56, 56, 96) < 0.7 * flops.cpsa(56, 56, 96)
    assert flops.cpsa_absorbed(7, 7, 768, batch=8) == 8 * 49 * 49 * 768 + 49**3
    assert flops.cls_cross_absorbed(400, 192, 6) < flops.cls_cross(400, 192) / 25


class Square(nn.Module):
    """A module of tokens on a square image behind `prefix` tokens, as a module of one argument."""

    def __init__(self, module, prefix):
        super().__init__()
        self.module, self.prefix = module, prefix

    def forward(self, x):
        side = int((x.shape[1] - self.prefix) ** 0.5)
        return self.module(x, (side, side))


@pytest.mark.parametrize(
    ("side", "dim", "heads", "windows", "prefix"),
    [
        pytest.param(14, 64, 8, {3: 2, 5: 3, 7: 3}, 1, id="coat"),
        pytest.param(3, 38, 2, {9: 1, 1: 1}, 0, id="no-prefix"),
        pytest.param(5, 21, 3, {}, 4, id="no-relative-term"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_formula_equals_count_for_conv_relative(side, dim, heads, windows, prefix, backend):
    module = ConvRelativeAttention(
        dim, heads, windows=windows, num_prefix_tokens=prefix, backend=backend
    )
    counted = flops.count(Square(module, prefix), (2, prefix + side * side, dim))[""]
    assert counted == 2 * flops.conv_relative(side, side, dim, heads, windows, prefix)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_formula_equals_count_for_conv_position(backend):
    module = Square(ConvPositionEncoding(24, 5, num_prefix_tokens=2, backend=backend), 2)
    counted = flops.count(module, (3, 2 + 36, 24))[""]
    assert counted == 3 * flops.conv_position(6, 6, 24, 5)


def test_conv_relative_by_hand():
    """CoaT-Lite's first stage: 3,137 tokens of 64 channels in 8 heads of 8."""
    projections, products = 4 * 3137 * 64 * 64, 2 * 3137 * 64 * 8
    convolutions = 3136 * 8 * (2 * 9 + 3 * 25 + 3 * 49)
    assert flops.conv_relative(56, 56, 64) == projections + products + convolutions


def test_conv_relative_on_an_image_that_is_not_square():
    qkv, weight = torch.zeros(1, 1 + 4 * 9, 3 * 8), torch.zeros(8, 1, 5, 5)
    with FlopCounterMode(display=False) as counter:
        conv_relative_attention(qkv, [weight], num_heads=2, grid=(4, 9))
    projections = 4 * 37 * 8 * 8
    assert counter.get_total_flops() // 2 == flops.conv_relative(4, 9, 8, 2, {5: 2}) - projections


class Pooled(nn.Module):
    """A module of a CLS token and patches: the mean of the patches stands for the token."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, patches):
        return self.module(patches.mean(1, keepdim=True), patches, nn.LayerNorm(patches.shape[2]))


@pytest.mark.parametrize(
    ("patches", "dim", "heads"),
    [
        pytest.param(400, 192, 6, id="crossvit_15-small"),
        pytest.param(7, 15, 3, id="odd"),
        pytest.param(1, 8, 1, id="one-patch"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_formula_equals_count_for_cls_cross(patches, dim, heads, backend):
    module = Pooled(ClsCrossAttention(dim, heads, backend=backend))
    counted = flops.count(module, (2, patches, dim))[""]
    assert counted == 2 * flops.cls_cross(patches, dim)


def test_what_the_absorbed_cls_cross_attention_executes():
    cls, patches = torch.randn(1, 1, 12), torch.randn(1, 9, 12)
    weights = [torch.randn(12, 12), torch.randn(12)] * 3
    with FlopCounterMode(display=False) as counter:
        cls_absorbed(3)(cls, patches, *weights)
    output_projection = 12 * 12
    executed = counter.get_total_flops() // 2 + output_projection
    assert executed == flops.cls_cross_absorbed(9, 12, 3)


def test_cls_cross_is_linear_in_the_patches():
    """CrossViT, section 3.3: where self-attention of the same tokens is quadratic."""
    step = flops.cls_cross(201, 96) - flops.cls_cross(200, 96)
    assert flops.cls_cross(4001, 96) - flops.cls_cross(4000, 96) == step
    assert flops.cls_cross(400, 192) == 2 * 402 * 192**2 + 2 * 401 * 192


def test_count_knows_torch_s_own_attention():
    class Attention(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    assert flops.count(Attention(), (3, 7, 8))[""] == 3 * 2 * 7 * 7 * 8


class OwnDigests(nn.Module):
    """DigestAttention as a module of one argument: the last tokens are the digests."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        tokens = x.shape[1] - self.module.num_digests
        return self.module(*x.split((tokens, x.shape[1] - tokens), 1))


@pytest.mark.parametrize(
    ("grid", "prefix", "digests"),
    [
        pytest.param((14, 14), 0, 80, id="cabvit"),
        pytest.param((3, 5), 1, 0, id="no-digests"),
        pytest.param((4, 2), 2, 7, id="prefix"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_formula_equals_count_for_digest(grid, prefix, digests, backend):
    module = DigestAttention(16, 2, grid, digests, num_prefix_tokens=prefix, backend=backend)
    tokens = prefix + grid[0] * grid[1]
    counted = flops.count(OwnDigests(module), (3, tokens + digests, 16))[""]
    assert counted == 3 * flops.digest(tokens, 16, digests)


def test_shares_of_a_block_that_the_paper_names():
    """CabViT, section 3.3: in DeiT-Tiny's block 2 n^2 d are 15 % and the FFN is 56 %.

    The formulas of Fig. 5 give 14.5 % and 57.0 % at the n = 196 and d = 192 that it names.
    """
    attention, ffn = flops.msa(14, 14, 192), flops.ffn(196, 192)
    assert attention + ffn == 12 * 196 * 192**2 + 2 * 196**2 * 192
    assert 2 * 196**2 * 192 / (attention + ffn) == pytest.approx(0.145, abs=5e-4)
    assert ffn / (attention + ffn) == pytest.approx(0.570, abs=5e-4)


def test_digests_cost_what_the_paper_says():
    """Section 3.3: the cost of plain attention without them, and linear in their number."""
    assert flops.digest(196, 192) == flops.msa(14, 14, 192)
    steps = [flops.digest(196, 192, m + 16) - flops.digest(196, 192, m) for m in (0, 16, 64)]
    assert len(set(steps)) == 1


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        pytest.param("cat_tiny", 2.7705, id="tiny"),
        pytest.param("cat_small", 6.0632, id="small"),
        pytest.param("cat_base", 8.9281, id="base"),
    ],
)
def test_count_of_whole_models_equals_that_of_the_official_code(name, gmacs):
    counted = flops.count(create_model(name), (1, 3, 224, 224))[""]
    assert counted / 1e9 == pytest.approx(gmacs, abs=5e-5)


def test_count_gives_each_module_its_share_and_its_parents_the_sum():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 10)), nn.ReLU()
    )
    macs = flops.count(model, (2, 3, 8, 8))
    conv, linear = 2 * 64 * 4 * 27, 2 * 256 * 10
    assert macs == {"": conv + linear, "0": conv, "1": linear, "1.1": linear}


def test_count_gives_parents_what_others_call_for_them():
    """A list is never called; CAT's model calls the downsampling of its layers itself."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
            self.layers[0].extra = nn.Linear(4, 4)

        def forward(self, x):
            return self.layers[1](self.layers[0].extra(self.layers[0](x)))

    macs = flops.count(Model(), (3, 4))
    expected = {"": 40, "layers": 40, "layers.0": 32, "layers.0.extra": 16, "layers.1": 8}
    assert macs == {name: 3 * count for name, count in expected.items()}


def test_the_parts_of_a_model_add_up():
    macs = flops.count(create_model("cat_tiny"), (1, 3, 224, 224))
    stages = sum(macs[f"layers.{i}"] for i in range(4))
    assert macs["layers"] == stages
    assert macs[""] == macs["patch_embed"] + stages + macs["head"]


def test_count_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flops.count(model, (2, 4))
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_count_restores_the_mode_when_the_model_fails():
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shapes"):
        flops.count(model, (2, 5))
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: flops.msa(0, 7, 8), "height must be a positive", id="height"),
        pytest.param(lambda: flops.ipsa(7, 7.0, 8), "width must be .* got 7.0", id="float"),
        pytest.param(lambda: flops.ipsa(7, 7, 8, (7, 0)), "window columns", id="window"),
        pytest.param(lambda: flops.cpsa(7, 7, 8, -1), "patch rows must .* got -1", id="patch"),
        pytest.param(
            lambda: flops.conv_relative(7, 7, 20), "divide channels, 20, got 8", id="heads"
        ),
        pytest.param(
            lambda: flops.conv_relative(7, 7, 8, 4, {3: 2, 5: 1}),
            "share out 4 heads, got {3: 2, 5: 1}",
            id="windows",
        ),
        pytest.param(
            lambda: flops.conv_relative(7, 7, 8, num_prefix_tokens=-1),
            "num_prefix_tokens must not be negative, got -1",
            id="prefix",
        ),
        pytest.param(lambda: flops.cls_cross(0, 8), "patches must be a positive", id="patches"),
        pytest.param(
            lambda: flops.cls_cross_absorbed(49, 20, 8),
            "divide channels, 20, got 8",
            id="cls-heads",
        ),
        pytest.param(lambda: flops.ffn(49, 8, 0), "ratio must be a positive", id="ratio"),
        pytest.param(lambda: flops.cpsa_absorbed(7, 7, 8, batch=0), "batch must be", id="batch"),
        pytest.param(lambda: flops.conv_position(7, 7, 8, 0), "window must be", id="window-of-1"),
        pytest.param(lambda: flops.digest(49, 8, -1), "digests must not .* got -1", id="digests"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
