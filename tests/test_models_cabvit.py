"""What is particular to CabViT: its options, tables and checkpoints of other sizes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from goldens import official_state
from support.models import cabvits, check_misfit, scrambled, small_cabvit
from torch import nn

from xattn_ops.models import create_model, load_official
from xattn_ops.models.cabvit_blocks import CaBlock, averages
from xattn_ops.models.cabvit_convs import ConvNorm

X = (2, 3, 64, 96)  # the size that the small models are for
ALONE = {"digests": False, "tme": False}

# ---- Options ------------------------------------------------------------------------------------


def test_options_reach_the_layers():
    model = small_cabvit(attn_drop=0.1, drop_path=0.6, num_classes=0).eval()
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert model.cab_blocks(3)[0].attn_drop == 0.1
    assert model(torch.randn(X)).shape == (2, 16)
    shifts = [b.attn.shift for b in small_cabvit(img_size=256, attention="window", **ALONE)
              .stages[2].blocks]  # fmt: skip
    assert shifts == [(0, 0), (3, 3), (0, 0)]
    one = small_cabvit(img_size=112, attention="window", **ALONE)
    assert {block.attn.shift for block in one.stages[2].blocks} == {(0, 0)}
    keys = {key.split(".", 3)[-1] for key in small_cabvit(tme=False).state_dict()}
    assert not {"dw_conv.weight", "local_conv.c.weight"} & keys
    assert "s_scale_factors" in keys
    keys = {key.split(".", 3)[-1] for key in small_cabvit(digests=False).state_dict()}
    assert not {"dw_conv.weight", "s_scale_factors", "s_token_bias", "s_norm.weight"} & keys
    assert "local_conv.c.weight" in keys


def test_digests_without_a_merge_are_means_of_4_x_4_tokens():
    x = torch.randn(2, 9 * 6, 3)
    image = x.unflatten(1, (9, 6))
    cells = [
        image[:, y : y + 4, c : c + 4].mean((1, 2)) for y in range(0, 9, 4) for c in range(0, 6, 4)
    ]
    torch.testing.assert_close(averages(x, (9, 6)), torch.stack(cells, 1))


# ---- Tables --------------------------------------------------------------------------------------


def block_on(grid: tuple[int, int], index: int) -> CaBlock:
    options = {"head_dim": 2, "mlp_ratio": 1, "attn_drop": 0, "layer_scale": 1, "backend": None}
    return CaBlock(4, grid, index, False, 0.0, **options)


@cabvits
@torch.no_grad()
def test_tables_are_resized_when_loaded_as_when_called(small):
    """For an image of another size, a model made for it gives what one made for another does."""
    model = scrambled(small(img_size=64))
    wide = small(img_size=(128, 80)).eval()
    assert load_official(wide, model.state_dict()) == ([], [])
    x = torch.randn(2, 3, 128, 80)
    torch.testing.assert_close(wide(x), model(x))
    assert wide.cab_blocks(3 if small is small_cabvit else 1)[1].attention_biases.std() > 0.05


def test_bias_tables_are_resized_bicubically_around_offset_zero():
    """As Swin's of all offsets are: zero stays at zero, and the quadrants stay mirror images."""
    block = block_on((3, 4), 1)
    nn.init.normal_(block.attention_biases)
    ours = block.tables_on((5, 7)).bias.view(2, 5, 7)
    dy, dx = torch.arange(-2, 3).abs(), torch.arange(-3, 4).abs()
    every = block.attention_biases.view(2, 3, 4)[:, dy][:, :, dx]  # by dy + 2, dx + 3
    resized = F.interpolate(every[None], (9, 13), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(ours, resized[:, 4:, 6:])
    torch.testing.assert_close(resized.flip(1).flip(2)[:, 4:, 6:], ours)


def test_tables_of_digests_are_resized_bicubically_block_by_block():
    block = block_on((8, 8), 3)
    nn.init.normal_(block.s_token_bias)
    nn.init.normal_(block.s_scale_factors)
    tables = block.tables_on((12, 17))
    for ours, own in (
        (tables.digest_bias, block.s_token_bias[0, :, 0]),
        (tables.digest_scale[..., 0], block.s_scale_factors[..., 0]),
    ):
        maps = own.unflatten(-1, (3, 2, 2))
        resized = F.interpolate(maps, (3, 5), mode="bicubic", align_corners=False)
        torch.testing.assert_close(ours, resized.flatten(-3))


# ---- Checkpoints --------------------------------------------------------------------------------


def test_an_official_checkpoint_in_a_model_of_another_size():
    state = official_state("cabvit_h_l1")
    model = create_model("cabvit_h_l1", img_size=(320, 256))
    assert load_official(model, state) == ([], [])
    key, block = "layer_2.blocks.3.s_scale_factors", model.cab_blocks(3)[3]
    maps = state[key].float().view(1, 3, 4, 4)
    resized = F.interpolate(maps, (5, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(block.s_scale_factors, resized.view(1, 60, 1))
    assert block.attention_biases.shape == (6, 20 * 16)


@cabvits
def test_classifier_checkpoint_in_a_backbone(small):
    classifier, backbone = scrambled(small()), small(features_only=True).eval()
    report = load_official(backbone, classifier.state_dict())
    assert report.kept == []
    heads = {"norm_head", "head"} if small is small_cabvit else {"head"}
    assert {key.split(".")[0] for key in report.ignored} == heads
    x = torch.randn(X)
    maps = backbone(x)
    if small is small_cabvit:
        pooled = classifier.norm_head(maps[-1].mean((2, 3)))
        torch.testing.assert_close(classifier.head(pooled), classifier(x))
    else:
        tokens, grid = classifier.tokens(x)
        torch.testing.assert_close(maps[0].flatten(2).mT, classifier.norm(tokens)[:, 1:])
        assert maps[0].shape[2:] == grid
    with pytest.raises(ValueError, match=r"missing: .*head\.bias"):
        load_official(classifier, backbone.state_dict())


TABLE = "layer_2.blocks.1.attention_biases"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda s: s.update({TABLE: torch.ones(2, 23)}),
            rf"{TABLE} \(checkpoint \[2, 23\], model \[2, 24\]\)$",
            id="table-not-square",
        ),
        pytest.param(
            lambda s: s.update({TABLE: torch.ones(5, 16)}),
            rf"{TABLE} \(checkpoint \[5, 24\], model \[2, 24\]\)",
            id="table-heads",
        ),
        pytest.param(
            lambda s: s.update({TABLE: torch.ones(3)}), rf"{TABLE} \(checkpoint \[3\]", id="rank"
        ),
        pytest.param(lambda s: s.pop(TABLE), f"missing: {TABLE}$", id="missing"),
        pytest.param(
            lambda s: s.update({"layer_2.blocks.1.s_token_bias": torch.ones(3)}),
            r"s_token_bias \(checkpoint \[3\], model \[1, 2, 1, 2\]\)$",
            id="digest-bias-rank",
        ),
    ],
)
def test_misfits_are_named_and_change_nothing(change, message):
    model = small_cabvit()
    check_misfit(model, model.state_dict(), change, message)


# ---- Convolutions -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_conv_norm_is_a_convolution_and_a_batch_norm(kernel, dtype):
    layer = ConvNorm(6, 6, kernel, 2 if kernel == 3 else 1, 6 if kernel == 3 else 1).to(dtype)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    for _ in range(2):
        x = torch.randn(4, 5, 7, 6).to(dtype).requires_grad_()
        twin = copy.deepcopy(layer)
        ours = layer(x)
        plain = twin.bn(twin.c(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        torch.testing.assert_close(ours, plain, **tolerance)
        torch.testing.assert_close(layer.bn.running_var, twin.bn.running_var)
        grad = torch.randn_like(plain)
        grads = [
            torch.autograd.grad(y, [x, *m.parameters()], grad)
            for y, m in ((ours, layer), (plain, twin))
        ]
        torch.testing.assert_close(*grads, **tolerance)
        layer.eval()  # once more with the statistics of the first batch


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7)])
def test_weight_gradients_of_the_strided_convolution_are_right_in_bfloat16(size):
    """torch's own padding leaves parts of them uninitialised on small maps."""
    layer = ConvNorm(64, 64, 3, 2, 64).bfloat16()
    x, grads = torch.randn(8, *size, 64).bfloat16(), []
    for module, pixels in ((layer, x), (copy.deepcopy(layer).double(), x.double())):
        y = module._convolved(pixels, module.c.weight, None)
        grads.append(torch.autograd.grad(y, module.c.weight, torch.ones_like(y))[0])
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=0.02, atol=0.1)
