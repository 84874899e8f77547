"""The demo: its command, its tables, its pictures and its messages."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from xattn_ops import CrossPatchAttention, cli
from xattn_ops.benchmarks.runner import Check
from xattn_ops.benchmarks.timing import Timing
from xattn_ops.demo import measure, photo, pictures
from xattn_ops.demo.command import load_model
from xattn_ops.models import create_model
from xattn_ops.models.cabvit import attention_maps
from xattn_ops.models.coat import cls_attention
from xattn_ops.models.crossvit import cls_attention as crossvit_attention

PNGS = {"feature_maps", "ipsa_attention", "cpsa_attention", "latency"}
COAT_PNGS = {"feature_maps", "cls_attention", "latency"}
FAST = ["--batch", "1", "--seconds", "0.01"]


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
