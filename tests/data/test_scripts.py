"""Glyphs: the right letters, from the right fonts, and test drawings that no training font has."""

import matplotlib
import pytest
import torch

import allrounder as ar
from allrounder.data.scripts import (
    ALPHABETS,
    BLOCKS,
    LOOKS,
    TEST_FONTS,
    TRAIN_FONTS,
    _draw,
    _held_out,
    _masters,
    blocks,
    scripts,
)

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def suite():
    return scripts(seed=3, train=80, validation=45, test=60)


def test_eight_tasks_of_grey_pictures(suite):
    assert list(suite) == ["digits", "latin", "greek", "cyrillic", "armenian", "georgian", "arabic", "arrows"]
    sizes = [suite[name].outputs for name in ("digits", "latin", "cyrillic", "armenian", "georgian")]
    assert sizes == [10, 26, 32, 38, 33]
    assert all(20 <= suite[name].outputs <= 32 for name in ("greek", "arabic", "arrows"))
    for task in suite.values():
        for split, count in zip(SPLITS, (80, 45, 60), strict=True):
            images, labels = task.split(split)[:]
            assert images.shape == (count, 1, 28, 28)
            assert images.dtype == torch.float32
            assert images.min() >= 0
            assert images.max() <= 1
            torch.testing.assert_close(images * 255, (images * 255).round(), rtol=0, atol=1e-4)
            assert 0.03 < images.mean() < 0.4  # ink bright on dark
            counts = labels.bincount(minlength=task.outputs)
            assert counts.max() - counts.min() <= 1


def test_a_seed_says_everything_and_nothing_global_moves(suite):
    state, params = torch.get_rng_state(), dict(matplotlib.rcParams)
    again, other = (scripts(seed=seed, train=80, validation=45, test=60) for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(matplotlib.rcParams) == params
    for name in suite:
        for split in SPLITS:
            assert torch.equal(suite[name].split(split).inputs, again[name].split(split).inputs)
            assert torch.equal(suite[name].split(split).targets, again[name].split(split).targets)
            assert not torch.equal(suite[name].split(split).inputs, other[name].split(split).inputs)


def test_tasks_and_splits_are_drawn_apart(suite):
    pictures = [
        image.numpy().tobytes() for task in suite.values() for split in SPLITS for image in task.split(split).inputs
    ]
    assert len(set(pictures)) == len(pictures)
    assert not torch.equal(suite["greek"].train.targets % 10, suite["digits"].train.targets)


def charmap(name):
    from matplotlib import ft2font

    return ft2font.FT2Font(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf").get_charmap()


def test_classes_are_letters_that_both_groups_of_fonts_have(suite):
    assert not set(TRAIN_FONTS) & set(TEST_FONTS)
    train, test = (set().union(*map(charmap, fonts)) for fonts in (TRAIN_FONTS, TEST_FONTS))
    for name, task in suite.items():
        assert set(task.classes) <= set(ALPHABETS[name])
        assert {ord(letter) for letter in task.classes} <= train & test


def test_letters_that_a_font_lacks_are_not_there():
    letters = "a\u0561" + chr(0x10FFFF)
    masters, there = _masters(("STIXGeneral", "DejaVuSans"), letters)
    assert there.tolist() == [[True, False, False], [True, True, False]]
    assert masters[0, 1].abs().max() == 0
    assert masters[1, 1].max() > 0.9


@pytest.mark.parametrize("name", list(ALPHABETS))
def test_no_training_font_has_a_test_drawing(name):
    seen, known = _masters(TRAIN_FONTS, ALPHABETS[name])
    masters, new = _held_out(ALPHABETS[name])
    there = _masters(TEST_FONTS, ALPHABETS[name])[1]
    assert not (new & ~there).any()
    for font in range(len(TEST_FONTS)):
        for j in range(len(ALPHABETS[name])):
            if there[font, j]:
                drawing, others = masters[font, j], [seen[i, j] for i in known[:, j].nonzero().flatten()]
                nearest = min((drawing - other).abs().sum() / max(drawing.sum(), other.sum()) for other in others)
                assert new[font, j] == (nearest >= 0.1)


def test_shared_drawings_are_found():
    _, new = _held_out(ALPHABETS["arrows"])
    by_font = dict(zip(TEST_FONTS, new.any(1).tolist(), strict=True))
    assert by_font == {
        "DejaVuSans-Bold": False, "DejaVuSansMono": False, "DejaVuSerif-Italic": False, "STIXGeneralBol": True,
    }  # fmt: skip


def test_only_the_test_split_is_drawn_from_held_out_masters(monkeypatch):
    import sys

    def blank(letters):
        masters, there = _held_out(letters)
        return torch.zeros_like(masters), there

    monkeypatch.setattr(sys.modules["allrounder.data.scripts"], "_held_out", blank)
    task = scripts(train=40, validation=40, test=40)["georgian"]
    ink = {split: task.split(split).inputs.amax((1, 2, 3)).min().item() for split in SPLITS}
    assert ink["test"] < 0.35  # noise alone: 784 draws of deviation 0.08
    assert ink["train"] > 0.5
    assert ink["validation"] > 0.5


def test_only_fonts_that_have_a_class_are_drawn_and_all_of_them():
    there = torch.tensor([[False, True], [True, False], [True, True]])
    level = torch.tensor([[0.0, 0.5], [0.5, 0.0], [1.0, 1.0]])  # a font is known by its grey level
    masters = level[:, :, None, None].expand(-1, -1, 56, 56)
    images, labels = _draw(masters, there, 400, "plain", torch.Generator().manual_seed(0))[:]
    middle = images[:, 0, 12:16, 12:16].mean((1, 2))
    assert middle.min() > 0.2
    for label in (0, 1):
        assert (
            0.25 < (middle[labels == label] > 0.55).float().mean() < 0.6
        )  # the bright font: half, its contrast 0.6 to 1


def test_pictures_stand_upright_and_are_not_mirrored():
    masters, there = _masters(("DejaVuSans",), "L")
    images = _draw(masters, there, 300, "plain", torch.Generator().manual_seed(0)).inputs.mean((0, 1))
    assert images[:, :12].sum() > 1.3 * images[:, 16:].sum()  # the stem is left
    assert images[16:].sum() > 1.3 * images[:12].sum()  # the foot is below


def test_looks():
    clear, generator = torch.zeros(5, 1, 28, 28), torch.Generator().manual_seed(0)
    clear[:, :, 8:20, 10:18] = 1
    made = {name: look(clear, generator) for name, look in LOOKS.items()}
    assert all(image.shape == clear.shape and 0 <= image.min() <= image.max() <= 1 for image in made.values())
    assert torch.equal(made["inverted"], 1 - clear)
    assert torch.equal(made["rotated"][0, 0], clear[0, 0].rot90())
    assert made["outlined"][0, 0, 10:18, 12:16].max() == 0
    assert made["outlined"].sum() == 5 * (14 * 10 - 12 * 8)
    assert torch.equal(made["striped"] == 1, clear == 1)
    assert 0.4 < (made["striped"][clear == 0] > 0).float().mean() < 0.6
    assert (made["occluded"] == 0.5).sum() == 5 * 81
    torch.testing.assert_close(made["blurred"].sum(), clear.sum())
    grey = LOOKS["dithered"](torch.full((1, 1, 28, 28), 0.25), generator)
    assert set(grey.unique().tolist()) == {0.0, 1.0}
    assert grey.mean() == 0.25


def test_a_look_changes_pictures_and_not_labels(suite):
    other = scripts(seed=3, train=80, validation=45, test=60, look="inverted")
    for name in suite:
        assert torch.equal(other[name].train.targets, suite[name].train.targets)
        assert other[name].train.inputs.mean() > 0.6


def test_blocks_for_pretraining_share_no_letter_with_the_suite():
    made = blocks(train=60, validation=30)
    assert list(made) == ["capitals", "box-drawing", "braille", "hebrew", "ogham", "weather-signs"]
    assert not set("".join(ALPHABETS.values())) & set("".join(BLOCKS.values()))
    for name, task in made.items():
        assert set(task.classes) <= set(BLOCKS[name])
    assert made["capitals"].outputs == 26
    single = [chr(0x2801), chr(0x2802), chr(0x2804), chr(0x2808), chr(0x2810), chr(0x2820)]
    assert sum(dot in made["braille"].classes for dot in single) == 1


def test_bad_input():
    with pytest.raises(ar.InputError, match="look is one of plain, inverted.*got 'bold'"):
        scripts(look="bold")
    with pytest.raises(ar.InputError, match="test=0"):
        scripts(test=0)
    with pytest.raises(ar.InputError, match="train=-1"):
        blocks(train=-1)
