"""The command line: info and demo, their pictures and their messages."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from xattn_ops import CrossPatchAttention, InnerPatchAttention, _library, cli, info
from xattn_ops._version import __version__
from xattn_ops.benchmarks.runner import Check
from xattn_ops.benchmarks.timing import Timing
from xattn_ops.demo import measure, photo, pictures
from xattn_ops.demo.attention import cross_patch_weights, inner_patch_weights
from xattn_ops.demo.command import load_model
from xattn_ops.models import create_model
from xattn_ops.models.cabvit import attention_maps
from xattn_ops.models.coat import cls_attention
from xattn_ops.models.crossvit import cls_attention as crossvit_attention

PNGS = {"feature_maps", "ipsa_attention", "cpsa_attention", "latency"}
COAT_PNGS = {"feature_maps", "cls_attention", "latency"}
FAST = ["--batch", "1", "--seconds", "0.01"]


# ------------------------------------------------------------------------------------------ info


def test_info_names_versions_backends_and_what_is_missing(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"xattn_ops {__version__}" in out
    assert f"torch {torch.__version__}" in out
    assert "reference: yes" in out
    assert "inner_patch_attention on cpu, float32: " in out
    assert "cross_patch_attention on cpu, float32: " in out
    assert "conv_relative_attention on cpu, float32: " in out
    assert "conv_position_encoding on cpu, float32: " in out
    assert "digest_attention on cpu, float32: " in out
    assert "token_merge_enhance on cpu, float32: " in out
    assert ("CUDA: none" in out) or ("CUDA " in out)


def test_info_without_the_native_library_says_why_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_library, "NATIVE", False)
    monkeypatch.setattr(_library, "REASON", "no library: install a compiler")
    text = info.describe()
    assert "native library: no" in text
    assert "Missing\n  CPU kernels: no library: install a compiler" in text


def test_info_with_the_native_library_names_the_instruction_set(monkeypatch):
    monkeypatch.setattr(_library, "NATIVE", True)
    monkeypatch.setattr(_library, "isa", lambda: "avx2")
    monkeypatch.setattr(_library, "unknown_isa", lambda: "avx9000")
    text = info.describe()
    assert "native library: yes, CPU kernels for avx2" in text
    assert "XATTN_ISA=avx9000 is not available here" in text


@pytest.mark.parametrize(
    ("built", "reason", "said"),
    [
        (False, "no CUDA", "CUDA library: no"),
        (True, "", "CUDA library: yes"),
        (True, "no CUDA in torch", "CUDA library: yes, not loaded: no CUDA in torch"),
    ],
)
def test_info_tells_of_the_cuda_library(monkeypatch, built, reason, said):
    monkeypatch.setattr(info, "find_spec", lambda name: object() if built else None)
    monkeypatch.setattr(_library, "CUDA_REASON", reason)
    assert f"  {said}\n" in info.describe()


def test_info_on_a_cuda_torch_says_what_its_kernels_miss(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "CUDA_REASON", "no library: install nvcc")
    assert "Missing\n  CUDA kernels: no library: install nvcc" in info.describe()


def test_info_without_the_tools_says_how_to_get_them(monkeypatch):
    there = info._version
    monkeypatch.setattr(info, "_version", lambda name: None if name == "rich" else there(name))
    text = info.describe()
    assert "rich not installed" in text
    assert "rich (demo, bench): pip install 'xattn_ops[tools]'" in text


def test_info_shows_the_variables_that_steer_the_package(monkeypatch):
    monkeypatch.setenv("XATTN_BACKEND", "reference")
    assert "XATTN_BACKEND=reference" in info.describe()


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "xattn_ops", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"xattn_ops {__version__}"


def test_a_missing_tool_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'xattn_ops[tools]'" in capsys.readouterr().err


def test_a_missing_module_of_ours_is_not_taken_for_a_missing_tool(monkeypatch):
    monkeypatch.setitem(sys.modules, "xattn_ops.demo", None)
    with pytest.raises(ModuleNotFoundError, match=r"xattn_ops\.demo"):
        cli.main(["demo"])


# ------------------------------------------------------------------------------------------ demo


def test_demo_prints_its_tables_and_writes_its_pictures(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path), *FAST]) == 0
    out = capsys.readouterr().out
    assert "RANDOM weights" in out
    assert "grace_hopper.jpg" in out
    assert out.count("yes") >= 8  # two operators at four stages agree
    assert "71.05" in out  # MMACs of IPSA at stage 1 of CAT-T, by formula and by count
    assert_pictures(tmp_path, PNGS)


def assert_pictures(folder, names):
    """These and no others, each of some size and with something on it."""
    assert {path.stem for path in folder.iterdir()} == names
    for path in folder.iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 300, path
        assert pixels.std() > 20, path
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100, path


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        pytest.param("coat_lite_tiny", "60.63", id="serial"),
        pytest.param("coat_tiny", "322.33", id="parallel"),
        pytest.param("crossvit_tiny", "14.67", id="crossvit"),
    ],
)
def test_demo_shows_what_the_cls_tokens_look_at(model, macs, tmp_path, capsys):
    assert cli.main(["demo", "--model", model, "--out", str(tmp_path), *FAST]) == 0
    out = capsys.readouterr().out
    assert f"{model} with RANDOM weights" in out
    # two operators at four stages agree, or one in two branches
    assert out.count("yes") == (2 if model == "crossvit_tiny" else 8)
    assert macs in out  # MMACs of the attention at stage 1, by formula and by count
    assert_pictures(tmp_path, COAT_PNGS)


def test_demo_shows_what_a_token_takes_of_digests(tmp_path, capsys):
    assert cli.main(["demo", "--model", "cabvit_h_l1", "--out", str(tmp_path), *FAST]) == 0
    out = capsys.readouterr().out
    assert "cabvit_h_l1 with RANDOM weights" in out
    assert out.count("yes") >= 2  # one operator at two stages agrees
    assert out.count("55.57") == 2  # MMACs at stage 3, by formula and by count
    assert_pictures(tmp_path, {"feature_maps", "digest_attention", "latency"})


@pytest.mark.parametrize(
    ("model", "block", "names"),
    [
        ("cabvit_h_l1", [], [(3, 1), (3, 3), (3, 5), (4, 1)]),  # those of the paper's figure 6
        ("cabvit_h_l1", ["--block", "0"], [(3, 0), (4, 0)]),
        ("cabvit_h_l1", ["--block", "-5"], [(3, 1)]),
        ("cabvit_p_l0", ["--block", "-1"], [(1, 11)]),
    ],
)
def test_demo_draws_digests_of_the_blocks_that_are_asked_for(
    model, block, names, tmp_path, monkeypatch
):
    drawn = []
    draw = pictures.digest_attention_maps

    def digest_attention_maps(picture, maps, *rest):
        drawn.extend(maps)
        draw(picture, maps, *rest)

    monkeypatch.setattr(pictures, "digest_attention_maps", digest_attention_maps)
    demo = ["demo", "--model", model, "--size", "64", "--out", str(tmp_path), *FAST]
    assert cli.main([*demo, *block]) == 0
    assert [name for name, _ in drawn] == [f"stage {s}, block {b}" for s, b in names]
    stage, index = names[0]
    image = photo.load(None, 64).tensor
    expected = attention_maps(load_model(model, None), image, stage, index)
    torch.testing.assert_close(drawn[0][1], expected)


def test_demo_draws_the_block_that_is_asked_for(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "cls_attention_maps", lambda _, maps, *rest: drawn.append(maps))
    demo = ["demo", "--model", "coat_tiny", "--size", "64", "--out", str(tmp_path), *FAST]
    assert cli.main([*demo, "--block", "3"]) == 0
    assert cli.main(demo) == 0
    third, last = drawn
    assert [name for name, _ in third] == [f"stage {s}, block 3" for s in (2, 3, 4)]  # 1 has two
    assert [name for name, _ in last] == ["stage 1, block 1"] + [
        f"stage {s}, block 7" for s in (2, 3, 4)
    ]
    image = photo.load(None, 64).tensor
    model = load_model("coat_tiny", None)
    torch.testing.assert_close(third[1][1], cls_attention(model, image, stage=3, block=3)[0])
    torch.testing.assert_close(last[0][1], cls_attention(model, image, stage=1, block=1)[0])


def test_demo_draws_both_branches_of_every_stage_of_crossvit(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "cls_attention_maps", lambda _, maps, *rest: drawn.extend(maps))
    demo = ["demo", "--model", "crossvit_9", "--size", "64", "--out", str(tmp_path), *FAST]
    assert cli.main(demo) == 0
    names = [name for name, _ in drawn]
    assert names == [f"stage {s},\n{b} branch's CLS" for s in (1, 2, 3) for b in ("small", "large")]
    image, model = photo.load(None, 64).tensor, load_model("crossvit_9", None)
    small, large = crossvit_attention(model, image, 2)
    torch.testing.assert_close(drawn[2][1], small[0])
    torch.testing.assert_close(drawn[3][1], large[0])


def test_demo_takes_official_weights_of_crossvit(tmp_path, capsys):
    torch.manual_seed(3)
    checkpoint = tmp_path / "crossvit.pth"
    torch.save(create_model("crossvit_tiny").state_dict(), checkpoint)
    arguments = ["--model", "crossvit_tiny", "--weights", str(checkpoint), "--size", "48"]
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "out"), *FAST]) == 0
    assert "crossvit_tiny with official weights" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "out").iterdir()} == COAT_PNGS


def test_demo_takes_a_photo_of_any_size_and_official_weights(tmp_path, capsys):
    torch.manual_seed(3)
    checkpoint = tmp_path / "cat_tiny.pth"
    torch.save({"model": create_model("cat_tiny").state_dict()}, checkpoint)
    image = tmp_path / "odd.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 51, 3), np.uint8)).save(image)
    arguments = [str(image), "--weights", str(checkpoint), "--size", "100", "--threads", "1"]
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "out"), *FAST]) == 0
    out = capsys.readouterr().out
    assert "official weights on odd.png (100 x 100)" in out
    assert "random" not in out.lower()
    assert {path.stem for path in (tmp_path / "out").iterdir()} == PNGS


def test_demo_fails_where_an_operator_disagrees(tmp_path, monkeypatch, capsys):
    right = CrossPatchAttention.forward

    def wrong(self, x):
        return right(self, x) * (1 if self.backend == "reference" else 1.01)

    monkeypatch.setattr(CrossPatchAttention, "forward", wrong)
    arguments = ["demo", "--size", "64", "--out", str(tmp_path), *FAST]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "cpsa at stage 1 disagrees with its reference" in out
    assert "ipsa at stage 1 disagrees" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["nowhere.jpg"], "no image at nowhere.jpg", id="no-image"),
        pytest.param([__file__], "is not an image that can be read", id="not-an-image"),
        pytest.param(["--model", "cat_huge"], "no model 'cat_huge' to show", id="model"),
        pytest.param(["--weights", "nowhere.pth"], "no checkpoint at nowhere.pth", id="weights"),
        pytest.param(["--size", "8"], "--size must be at least 32 pixels, got 8", id="size"),
        pytest.param(["--batch", "0"], "--batch must be at least 1, got 0", id="batch"),
        pytest.param(["--block", "0"], "of CLS or of digests, and cat_tiny has", id="no-cls-token"),
        pytest.param(
            ["--model", "cabvit_h_l1", "--block", "6"],
            "--block must be -6 to 5, got 6",
            id="no-such-digests",
        ),
        pytest.param(
            ["--model", "crossvit_9", "--block", "0"],
            "of CLS or of digests, and crossvit_9 has one of each",
            id="no-choice-of-block",
        ),
        pytest.param(
            ["--model", "coat_lite_tiny", "--block", "2"],
            "--block must be -2 to 1, got 2",
            id="no-such-block",
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, tmp_path, capsys):
    assert cli.main(["demo", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    checkpoint = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(1)}, checkpoint)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_model("cat_tiny", checkpoint)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    checkpoint = tmp_path / "text.pth"
    checkpoint.write_text("weights")
    with pytest.raises(ValueError, match=r"text\.pth is not a checkpoint that can be read"):
        load_model("cat_tiny", checkpoint)


def test_a_portrait_is_cropped_to_a_square_near_its_top(tmp_path):
    pixels = np.zeros((200, 100, 3), np.uint8)
    pixels[25:125] = 255  # a quarter of the surplus lies above the square
    Image.fromarray(pixels).save(tmp_path / "tall.png")
    taken = photo.load(tmp_path / "tall.png", 100)
    assert taken.pixels.min() == 1
    assert taken.tensor.shape == (1, 3, 100, 100)
    white = (1 - torch.tensor(photo.MEAN)) / torch.tensor(photo.STD)
    torch.testing.assert_close(taken.tensor[0, :, 50, 50], white)


@pytest.mark.parametrize(
    ("height", "width"), [pytest.param(6, 10, id="whole"), pytest.param(7, 8, id="padded")]
)
def test_ipsa_maps_are_the_weights_of_the_module(height, width):
    """The drawn weights times v, projected, are the module's output."""
    module = InnerPatchAttention(8, 2, (3, 5)).double()
    torch.nn.init.normal_(module.relative_position_bias_table)
    x = torch.randn(2, height, width, 8).double()
    weights = inner_patch_weights(module, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    rows, columns = weights.shape[1:3]
    padded = torch.nn.functional.pad(x, (0, 0, 0, 5 * columns - width, 0, 3 * rows - height))
    v = module.qkv(padded)[..., 16:].view(2, rows, 3, columns, 5, 2, 4)
    v = v.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)  # [B, gh, gw, heads, N, D]
    out = (weights @ v).unflatten(4, (3, 5)).permute(0, 1, 4, 2, 5, 3, 6)
    out = module.proj(out.reshape(2, 3 * rows, 5 * columns, 8))[:, :height, :width]
    torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize(
    ("height", "width"), [pytest.param(6, 8, id="whole"), pytest.param(5, 7, id="padded")]
)
def test_cpsa_maps_are_the_weights_of_the_module(height, width):
    module = CrossPatchAttention((3, 4)).double()
    x = torch.randn(2, height, width, 3).double()
    weights = cross_patch_weights(module, x)  # [B, C, T, T]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    padded = torch.nn.functional.pad(x, (0, 0, 0, 8 - width, 0, 6 - height))
    tokens = padded.view(2, 2, 3, 2, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 4, 12)
    out = module.proj(weights @ module.qkv(tokens)[..., 24:]).view(2, 3, 2, 2, 3, 4)
    out = out.permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 8, 3)[:, :height, :width]
    torch.testing.assert_close(out, module(x))


def test_maps_of_several_heads_are_their_mean():
    module = CrossPatchAttention((2, 2), num_heads=2)
    weights = cross_patch_weights(module, torch.randn(1, 4, 4, 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, 4))


def test_maps_of_shifted_windows_are_refused():
    module = InnerPatchAttention(8, 2, (4, 4), shift=(2, 2))
    with pytest.raises(ValueError, match="without a shift"):
        inner_patch_weights(module, torch.zeros(1, 8, 8, 8))


def test_capture_finds_the_first_of_each_operator_in_every_stage():
    model = load_model("cat_tiny", None)
    captured, features = measure.capture(model, torch.zeros(1, 3, 64, 64))
    found = [(one.operator, one.stage, one.shape) for one in captured]
    shapes = ["16x16x64", "8x8x128", "4x4x256", "2x2x512"]
    expected = [(o, i, s) for o in ("ipsa", "cpsa") for i, s in enumerate(shapes, start=1)]
    assert found == expected
    assert len(features) == 4
    assert captured[0].module is model.layers[0].pre_ipsa_blocks[0].attn
    assert not captured[0].module._forward_pre_hooks


def test_capture_finds_coats_operators_on_their_grids():
    model = load_model("coat_tiny", None)
    captured, _ = measure.capture(model, torch.zeros(1, 3, 64, 96))
    found = [(one.operator, one.stage, one.shape) for one in captured]
    shapes = ["16x24x152", "8x12x152", "4x6x152", "2x3x152"]
    expected = [(o, i, s) for o in ("convrel", "convpos") for i, s in enumerate(shapes, start=1)]
    assert found == expected
    assert captured[0].module is model.serial_blocks1[0].factoratt_crpe
    assert captured[0].x.shape == (1, 1 + 16 * 24, 152)
    assert not captured[0].module._forward_pre_hooks


def test_capture_finds_crossvits_operators_on_the_grid_that_they_look_at():
    model = load_model("crossvit_9", None)
    captured, _ = measure.capture(model, torch.zeros(1, 3, 64, 64))
    found = [(one.operator, one.stage, one.shape) for one in captured]
    assert found == [("clsattn", 1, "4x4x256"), ("clsattn", 2, "5x5x128")]
    assert captured[0].module is model.blocks[0].fusion[0].attn
    cls, patches, norm = captured[0].inputs
    assert (cls.shape, patches.shape) == ((1, 1, 256), (1, 16, 256))
    assert norm is model.blocks[0].fusion[0].norm1
    exact = captured[0].arguments(3, torch.float64)
    assert (exact[0].shape, exact[1].dtype, exact[2].weight.dtype) == (
        (3, 1, 256), torch.float64, torch.float64
    )  # fmt: skip
    assert norm.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["cat_tiny", "coat_lite_tiny", "crossvit_9", "cabvit_h_l1"])
def test_the_papers_macs_are_those_counted(name):
    captured, _ = measure.capture(load_model(name, None), torch.zeros(1, 3, 64, 64))
    measured = [measure.measure(one, 1, 0.0) for one in captured]
    formulas = [(one.captured.operator, one.formula_macs) for one in measured]
    counted = [(one.captured.operator, one.counted_macs) for one in measured]
    assert formulas == counted


def test_capture_finds_the_last_digest_attention_of_every_stage_with_its_tables():
    model, image = load_model("cabvit_h_l1", None), torch.randn(1, 3, 96, 64)
    captured, _ = measure.capture(model, image)
    assert [(one.operator, one.stage, one.shape) for one in captured] == [
        ("digest", 3, "6x4x192"),
        ("digest", 4, "3x2x320"),
    ]
    block = model.cab_blocks(3)[-1]
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(image)
    x, grid, digests = seen[0]
    one = captured[0]
    assert one.module.num_digests == digests.shape[1] == 5 * 2
    expected = block.proj(block.attend(block.norm1(x), digests, block.tables_on(grid)))
    torch.testing.assert_close(one.module(*one.arguments()), expected)


def test_the_map_of_cls_is_drawn_whatever_its_range(tmp_path):
    maps = [("even", torch.zeros(4, 3, 3)), ("negative", -torch.rand(4, 2, 3))]
    pictures.cls_attention_maps(photo.load(None, 64), maps, tmp_path / "cls.png", "Title")
    assert_pictures(tmp_path, {"cls"})


def test_principal_colours_are_in_range_whatever_the_map():
    colours = pictures.principal_colours(torch.randn(8, 5, 6))
    assert colours.shape == (5, 6, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    flat = pictures.principal_colours(torch.zeros(2, 1, 2))  # fewer than three components
    assert flat.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("fused", "faster"),
    [
        pytest.param({}, "3.0x", id="calm"),
        pytest.param({"iqr": 0.9}, "busy", id="spread"),
        pytest.param({"waited": 0.9}, "busy", id="waited"),
    ],
)
def test_the_demo_gives_no_ratio_on_a_busy_machine(fused, faster):
    eager, ours = Timing(3.0, 3.0, 0.1, 9, 1, 1), Timing(1.0, 1.0, 0.1, 9, 1, 1)
    check = Check("output", 0, 0, 0, True)
    one = measure.Measured(None, check, 1, 1, 1, replace(ours, **fused), eager)
    assert one.faster == faster
