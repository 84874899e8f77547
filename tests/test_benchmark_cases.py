"""What the benchmark compares: plain formulations that compute the same, at the right shapes."""

from dataclasses import replace

import pytest
import torch
from support.benchmarks import TINY_GRID, tiny
from support.models import small_cabvit
from torch.utils.flop_counter import FlopCounterMode

from xattn_ops import (
    ClsCrossAttention,
    ConvPositionEncoding,
    ConvRelativeAttention,
    CrossPatchAttention,
    InnerPatchAttention,
    _linear,
)
from xattn_ops.benchmarks import baselines, cases
from xattn_ops.benchmarks.cases import FORWARD, STEP, OnGrid
from xattn_ops.clsattn import cls_cross_attention_reference
from xattn_ops.convrel import (
    conv_position_encoding_reference,
    conv_relative_attention_reference,
)
from xattn_ops.cpsa import cross_patch_attention_reference
from xattn_ops.digest import digest_attention_reference, token_merge_enhance_reference
from xattn_ops.ipsa import inner_patch_attention_reference
from xattn_ops.models import create_model
from xattn_ops.models.cabvit_blocks import CaBlock, ConvNeXtBlock
from xattn_ops.models.cabvit_convs import ConvNorm

# ------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("make_core", [baselines.eager_core, baselines.sdpa_core])
def test_plain_ipsa_is_the_reference(make_core):
    qkv, table = torch.randn(2, 6, 8, 24).double(), torch.randn(3 * 7, 4).double()
    expected = inner_patch_attention_reference(qkv, table, num_heads=4, window=(2, 4))
    from_table = baselines.ipsa_table(make_core, 4, (2, 4))(qkv, table)
    bias = baselines.gather_bias(table, baselines.relative_index(2, 4))
    from_dense = baselines.ipsa_dense(make_core, 4, (2, 4))(qkv, bias)
    torch.testing.assert_close(from_table, expected)
    torch.testing.assert_close(from_dense, expected)


def test_flex_ipsa_is_the_reference():
    qkv, table = torch.randn(1, 4, 4, 96), torch.randn(7 * 7, 2)
    expected = inner_patch_attention_reference(qkv, table, num_heads=2, window=(4, 4))
    bias = baselines.gather_bias(table, baselines.relative_index(4, 4))
    actual = baselines.ipsa_dense(baselines.flex_core, 2, (4, 4))(qkv, bias)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("attend", [baselines.attend_eager, baselines.attend_sdpa])
def test_plain_cpsa_is_the_reference(attend):
    shapes = [(2, 4, 9, 5), (18, 6), (18,), (6, 6), (6,)]
    operands = [torch.randn(shape).double() for shape in shapes]
    expected = cross_patch_attention_reference(*operands, patch=(2, 3))
    torch.testing.assert_close(baselines.cpsa(attend, (2, 3))(*operands), expected)


def test_a_plain_copy_computes_the_same_and_leaves_the_model_alone():
    modules = [InnerPatchAttention(8, 2, (3, 3)), CrossPatchAttention((3, 3))]
    model = torch.nn.Sequential(*modules).double()
    plain = baselines.plain_copy(model)
    x = torch.randn(2, 6, 6, 8).double()
    torch.testing.assert_close(plain(x), model(x))
    assert [type(m) for m in plain] == [baselines.PlainInnerPatch, baselines.PlainCrossPatch]
    assert [type(m) for m in model] == [InnerPatchAttention, CrossPatchAttention]


def test_plain_linears_are_those_of_torch_and_only_within(monkeypatch):
    monkeypatch.setattr(_linear, "PLAIN", False)
    with baselines.plain_linears():
        assert _linear.PLAIN
    assert not _linear.PLAIN


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("formulation", [baselines.convrel_eager, baselines.convrel_nhwc])
def test_plain_convrel_is_the_reference_with_its_gradients(formulation, prefix):
    shapes = [(2, prefix + 30, 36), (4, 1, 3, 3), (8, 1, 5, 5), (4,), (8,)]
    operands = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    qkv, *conv = operands
    options = {"num_heads": 3, "grid": (5, 6), "num_prefix_tokens": prefix}
    expected = conv_relative_attention_reference(qkv, conv[:2], conv[2:], **options)
    actual = formulation(3, (5, 6), prefix)(*operands)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, operands, grad) for out in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("formulation", [baselines.convpos_eager, baselines.convpos_nhwc])
def test_plain_convpos_is_the_reference(formulation, prefix):
    shapes = [(2, prefix + 30, 7), (7, 1, 5, 5), (7,)]
    operands = [torch.randn(shape).double() for shape in shapes]
    options = {"grid": (5, 6), "num_prefix_tokens": prefix}
    expected = conv_position_encoding_reference(*operands, **options)
    torch.testing.assert_close(formulation((5, 6), prefix)(*operands), expected)


@pytest.mark.parametrize(
    ("function", "channels"),
    [
        pytest.param(baselines.convrel_nhwc(2, (5, 6)), 24, id="convrel"),
        pytest.param(baselines.convpos_nhwc((5, 6)), 8, id="convpos"),
    ],
)
def test_the_nhwc_formulations_convolve_in_channels_last_memory(function, channels, monkeypatch):
    seen = []
    convolve = torch.nn.functional.conv2d

    def conv2d(image, *args, **options):
        seen.append(image)
        return convolve(image, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    function(torch.randn(2, 31, channels), torch.randn(8, 1, 3, 3), torch.randn(8))
    (image,) = seen
    assert image.shape == (2, 8, 5, 6)
    assert image.stride(1) == 1


@pytest.mark.parametrize("make_core", [baselines.eager_core, baselines.sdpa_core])
def test_plain_digest_attention_is_the_reference_with_its_gradients(make_core):
    shapes = [(2, 30, 36), (2, 4, 24), (3, 30), (3, 4)]
    operands = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    expected = digest_attention_reference(*operands, num_heads=3, grid=(5, 6))
    actual = baselines.digest_table(make_core, 3, (5, 6))(*operands)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, operands, grad) for out in (actual, expected)]
    torch.testing.assert_close(*gradients)
    bias = baselines.dense_digest_bias(*operands[2:], baselines.offset_index((5, 6)))
    torch.testing.assert_close(baselines.digest_dense(make_core, 3)(*operands[:2], bias), expected)


@pytest.mark.parametrize("formulation", [baselines.merge_eager, baselines.merge_nhwc])
def test_plain_token_merge_is_the_reference_with_its_gradients(formulation):
    shapes = [(2, 30, 7), (7, 1, 5, 5), (7, 1, 3, 3), (7,)]
    operands = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    expected = token_merge_enhance_reference(*operands, grid=(5, 6), stride=2)
    actual = formulation((5, 6), 2)(*operands)
    torch.testing.assert_close(actual, expected)
    grads = [torch.randn_like(out) for out in expected]
    gradients = [torch.autograd.grad(outs, operands, grads) for outs in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_token_merge_is_timed_at_the_stages_of_the_models():
    shapes = [(s.size, s.channels, s.window, s.stride) for s in cases.SHAPES["merge"]]
    stages = [((14, 14), 192), ((14, 14), 320), ((7, 7), 320)]
    assert shapes == [(*stage, 7, 4) for stage in stages]
    assert [s.digests for s in cases.SHAPES["merge"]] == [16, 16, 4]
    outs = tiny("merge").ours["fused"].forward()
    assert [tuple(out.shape) for out in outs] == [(2, 9, 7), (2, 30, 7)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("options", [{}, {"digest_scale": False}], ids=["scale", "no-scale"])
def test_a_plain_copy_of_a_cabvit_computes_the_same(options, training):
    model = small_cabvit(drop_path=0.0, **options).double().train(training)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 64, 96).double()
    plain = baselines.plain_copy(model)
    kinds = {type(m) for m in plain.modules()}
    assert {baselines.PlainCaBlock, baselines.PlainConvNeXtBlock, baselines.PlainConvNorm} <= kinds
    assert not {CaBlock, ConvNeXtBlock, ConvNorm} & kinds
    assert plain.state_dict().keys() == model.state_dict().keys()
    outs = [plain(x), model(x)]
    torch.testing.assert_close(*outs)
    if training:  # a plain one in evaluation has its bias gathered beforehand
        pairs = zip(outs, (plain, model), strict=True)
        grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in pairs]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


def test_cabvit_is_compared_in_both_memory_layouts():
    case = cases.model_case("cabvit_h_l1", 1, torch.float32, FORWARD)
    assert list(case.plain) == ["eager", "compile", "nhwc", "nhwc + compile"]
    image = case.plain["nhwc"].arguments[0]
    assert image.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(case.plain["nhwc"].forward(), case.plain["eager"].forward())


def test_digest_attention_is_timed_at_the_shapes_of_the_models_and_of_a_larger_image():
    shapes = [(s.tokens, s.digests, s.heads, s.head_dim) for s in cases.SHAPES["digest"]]
    assert shapes == [(196, 80, 6, 32), (196, 16, 6, 32), (49, 4, 10, 32), (784, 245, 6, 32)]
    assert [str(s) for s in cases.SHAPES["digest"]][:1] == ["14x14 6x32 m=80"]


def test_a_plain_copy_of_coats_modules_computes_the_same():
    modules = [ConvPositionEncoding(12), ConvRelativeAttention(12, 3, windows={3: 1, 5: 2})]
    model = torch.nn.Sequential(*(OnGrid(module, (5, 6)) for module in modules)).double()
    plain = baselines.plain_copy(model)
    x = torch.randn(2, 31, 12).double()
    torch.testing.assert_close(plain(x), model(x))
    expected = [baselines.PlainConvPosition, baselines.PlainConvRelative]
    assert [type(m.module) for m in plain] == expected
    assert [type(m.module) for m in model] == [ConvPositionEncoding, ConvRelativeAttention]


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize(
    "formulation", [baselines.cls_eager, baselines.cls_sdpa, baselines.cls_absorbed]
)
def test_plain_cls_attention_is_the_reference(formulation, norm):
    shapes = [(2, 1, 12), (2, 7, 12), *[(12, 12), (12,)] * 3, *[(12,)] * 2 * norm]
    operands = [torch.randn(shape).double() for shape in shapes]
    options = {"norm_weight": operands[8], "norm_bias": operands[9]} if norm else {}
    expected = cls_cross_attention_reference(*operands[:8], num_heads=3, **options)
    torch.testing.assert_close(formulation(3)(*operands), expected)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(12, 1e-6).double(), None])
def test_a_plain_copy_of_crossvits_module_computes_the_same(norm):
    module = ClsCrossAttention(12, 3).double()
    plain = baselines.plain_copy(module)
    x = torch.randn(2, 1, 12).double(), torch.randn(2, 7, 12).double()
    torch.testing.assert_close(plain(*x, norm), module(*x, norm))
    assert (type(plain), type(module)) == (baselines.PlainClsCross, ClsCrossAttention)


@pytest.mark.parametrize("name", ["cat_tiny", "coat_tiny", "crossvit_9"])
def test_a_plain_copy_of_a_model_holds_no_fused_operator_and_shares_what_the_model_shares(name):
    model = create_model(name)
    plain = baselines.plain_copy(model)
    fused = {InnerPatchAttention, CrossPatchAttention, ConvRelativeAttention, ConvPositionEncoding}
    fused |= {ClsCrossAttention}
    assert fused & {type(m) for m in model.modules()}
    assert not fused & {type(m) for m in plain.modules()}
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in plain.named_parameters()] == names


# ----------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("operator", "tokens"),
    [
        pytest.param("ipsa", 54, id="ipsa"),
        pytest.param("ipsa_module", 54, id="ipsa-module"),
        pytest.param("cpsa", 54, id="cpsa"),
        pytest.param("convrel", 32, id="convrel"),
        pytest.param("convrel_module", 32, id="convrel-module"),
        pytest.param("convpos", 32, id="convpos"),
        pytest.param("clsattn", 12, id="clsattn"),
        pytest.param("digest", 30, id="digest"),
        pytest.param("merge", 30, id="merge"),
    ],
)
def test_a_case_knows_its_tokens(operator, tokens):
    assert tiny(operator).tokens == tokens


@pytest.mark.parametrize("operator", ["convrel", "convrel_module", "convpos", "digest", "merge"])
def test_the_work_of_a_case_is_what_the_counter_counts_of_the_plain_formulation(operator):
    case = tiny(operator)
    with FlopCounterMode(display=False) as counter:
        case.plain["eager"].forward()
    assert case.macs == counter.get_total_flops() // 2


def test_the_work_of_cls_attention_is_the_absorbed_forms():
    case = tiny("clsattn")
    with FlopCounterMode(display=False) as counter:
        case.plain["absorbed"].forward()
    assert case.macs == counter.get_total_flops() // 2
    with FlopCounterMode(display=False) as counter:
        case.plain["eager"].forward()
    assert case.macs < counter.get_total_flops() // 2


def test_cls_attention_is_timed_at_the_branches_of_crossvit_15():
    shapes = cases.SHAPES["clsattn"]
    assert [(s.patches, s.channels, s.heads) for s in shapes] == [(400, 192, 6), (196, 384, 6)]
    assert [shapes[0].at(side).patches for side in (112, 224, 896)] == [100, 400, 6400]
    assert tiny("clsattn").apart == ("absorbed",)


def test_conv_relative_attention_is_timed_at_the_shapes_of_the_models_and_of_a_detector():
    shapes = cases.SHAPES["convrel"]
    sizes = [(shape.height, shape.width, shape.head_dim) for shape in shapes]
    models = [(56, 56, 8), (28, 28, 16), (14, 14, 40), (7, 7, 64), (56, 56, 19), (28, 28, 27)]
    assert sizes == [*models, (128, 128, 8), (256, 256, 8)]
    rest = {(shape.heads, shape.prefix, shape.windows) for shape in shapes}
    assert rest == {(8, 1, ((3, 2), (5, 3), (7, 3)))}


def test_a_shape_may_have_fewer_images_than_asked_for():
    shape = replace(TINY_GRID, most_batch=1)
    case = cases.BUILDERS["convrel"](shape, 8, torch.float32, FORWARD)
    assert case.batch == case.ours["fused"].arguments[0].shape[0] == 1
    assert case.shape == "5x6 3x4 B=1"


def test_every_case_of_the_command_can_be_built():
    names = {name for group in cases.OPERATORS.values() for name in group}
    assert names | set(cases.BLOCKS.values()) == cases.BUILDERS.keys() == cases.SHAPES.keys()
    assert cases.OPERATORS.keys() == cases.MODELS.keys() >= cases.BLOCKS.keys()
    for models in cases.MODELS.values():
        for name in models:
            cases.check_model(name)


@pytest.mark.parametrize("direction", [FORWARD, STEP])
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_short_formats_are_also_compared_with_float32(operator, direction):
    """Many processors multiply them slowly; a user would take float32 there and round."""
    case = tiny(operator, direction, torch.bfloat16)
    variant = case.baselines()["float32"]
    grads = [torch.ones_like(out) for out in variant.forward()]
    results = variant.forward() if direction == FORWARD else variant.step(grads)
    exact = case.oracle.forward() if direction == FORWARD else case.oracle.step(grads)
    for result, wanted in zip(results, exact, strict=True):
        assert result.dtype == torch.bfloat16
        # a rounding to bfloat16, or of float32 where the exact gradient is zero
        torch.testing.assert_close(result.double(), wanted, rtol=0.01, atol=1e-5)
    assert "float32" not in tiny(operator, direction).baselines()


def test_parameters_inside_a_module_keep_their_dtype():
    case = tiny("cab", dtype=torch.bfloat16)
    assert case.baselines() is case.plain
