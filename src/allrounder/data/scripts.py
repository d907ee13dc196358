"""`scripts`: glyphs of eight real writing systems, drawn from the fonts inside matplotlib, with no download.

Digits, Latin, Greek, Cyrillic, Armenian, Georgian, Arabic letters and arrows: one task each, 28 x 28 grey,
with random rotation, slant, size, place, contrast and noise. Train and validation come from twelve
DejaVu and STIX fonts, test from four fonts that were held out. Fonts share drawings (all DejaVu fonts have
the same arrows), so a held-out glyph that looks like a training glyph of its class is left out too.
`blocks` gives the same kind of pictures of six other blocks of Unicode, for pretraining a base.

Use it for experiments that need many classes, any number of examples, or a test of controlled difficulty
(`look`); not as evidence about photographs or handwriting. The default suite takes about two seconds and
100 MB. The same seed and matplotlib give the same pictures (rounded to 256 levels, so that the last bits of
a machine's arithmetic do not matter).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..task import Examples, Suite, Task

__all__ = ["LOOKS", "blocks", "scripts"]

TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral",
    "STIXGeneralItalic", "STIXGeneralBolIta",
)  # fmt: skip
TEST_FONTS = ("DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneralBol")


def _letters(*spans: tuple[int, int]) -> str:
    return "".join(chr(code) for first, last in spans for code in range(first, last + 1))


ALPHABETS = {
    "digits": _letters((0x30, 0x39)),
    "latin": _letters((0x61, 0x7A)),
    "greek": _letters((0x3B1, 0x3C9)),
    "cyrillic": _letters((0x430, 0x44F)),
    "armenian": _letters((0x561, 0x586)),
    "georgian": _letters((0x10D0, 0x10F0)),
    "arabic": _letters((0x627, 0x63A), (0x641, 0x64A)),
    "arrows": _letters((0x2190, 0x21AF)),
}
BLOCKS = {
    "capitals": _letters((0x41, 0x5A)),
    "box-drawing": _letters((0x2550, 0x257F)),
    "braille": _letters((0x2801, 0x283F)),
    "hebrew": _letters((0x5D0, 0x5EA)),
    "ogham": _letters((0x1681, 0x169A)),
    "weather-signs": _letters((0x2600, 0x262F)),
}
SIDE = 28
MASTER = 2 * SIDE  # glyphs are drawn once at this size, then sampled down with their jitter
INK = 40  # the longer side of a glyph on its master
SAME = 0.1  # two masters that differ in less than this share of their ink are one drawing: equal outlines reach 0.098


def _striped(images: Tensor, generator: torch.Generator) -> Tensor:
    phase = torch.rand(len(images), 1, 1, 1, generator=generator)
    stripes = ((torch.arange(SIDE).view(1, 1, 1, SIDE) / 6 + phase) % 1 < 0.5).float()
    return torch.maximum(images, 0.4 * stripes)


def _occluded(images: Tensor, generator: torch.Generator) -> Tensor:
    corner = torch.randint(4, 15, (2, len(images), 1, 1), generator=generator)
    line = torch.arange(SIDE)
    inside = [(line >= start) & (line < start + 9) for start in corner]
    return images.masked_fill((inside[0].unsqueeze(3) & inside[1].unsqueeze(2)), 0.5)


def _dithered(images: Tensor, generator: torch.Generator) -> Tensor:
    bayer = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
    return (images > ((bayer + 0.5) / 16).repeat(SIDE // 4, SIDE // 4)).float()


LOOKS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "plain": lambda x, generator: x,
    "inverted": lambda x, generator: 1 - x,
    "outlined": lambda x, generator: F.max_pool2d(x, 3, 1, 1) - x,
    "striped": _striped,
    "rotated": lambda x, generator: x.rot90(1, (2, 3)),
    "blurred": lambda x, generator: F.avg_pool2d(x, 5, 1, 2),
    "occluded": _occluded,
    "dithered": _dithered,
}
"""Name -> (images `(N, 1, 28, 28)`, generator) -> images of the same shape, in [0, 1]."""


def _picture(bitmap: Tensor) -> Tensor:
    """Ink cropped, scaled and centred on a master, `(MASTER, MASTER)` float32 in [0, 1]."""
    rows, columns = bitmap.amax(1).nonzero(), bitmap.amax(0).nonzero()
    ink = bitmap[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    height, width = (max(1, round(INK * length / max(ink.shape))) for length in ink.shape)
    ink = F.interpolate(ink[None, None] / 255, (height, width), mode="bilinear", antialias=True)[0, 0]
    top, left = (MASTER - height) // 2, (MASTER - width) // 2
    return F.pad(ink, (left, MASTER - width - left, top, MASTER - height - top)).clamp(0, 1)


@lru_cache(maxsize=64)
def _masters(fonts: tuple[str, ...], letters: str) -> tuple[Tensor, Tensor]:
    """Masters `(fonts, letters, MASTER, MASTER)`, and which of them exist `(fonts, letters)`."""
    from pathlib import Path

    import matplotlib
    import numpy as np
    from matplotlib import ft2font

    unhinted = ft2font.LoadFlags.NO_HINTING if hasattr(ft2font, "LoadFlags") else ft2font.LOAD_NO_HINTING  # type: ignore[attr-defined]
    masters = torch.zeros(len(fonts), len(letters), MASTER, MASTER)
    there = torch.zeros(len(fonts), len(letters), dtype=torch.bool)
    for i, name in enumerate(fonts):
        font = ft2font.FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"))
        font.set_size(128, 72)
        for j, letter in enumerate(letters):
            if font.get_char_index(ord(letter)) == 0:  # .notdef
                continue
            font.set_text(letter, 0.0, flags=unhinted)
            font.draw_glyphs_to_bitmap(antialiased=True)
            bitmap = torch.from_numpy(np.array(font.get_image())).float()
            if bitmap.numel() and bitmap.any():
                masters[i, j], there[i, j] = _picture(bitmap), True
    return masters, there


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Difference of two stacks of masters as a share of their ink: `(m, ...)`, `(n, ...)` -> `(m, n)`."""
    a, b = a.flatten(1), b.flatten(1)
    return torch.cdist(a, b, p=1) / torch.maximum(a.sum(1)[:, None], b.sum(1)).clamp_min(1)


def _held_out(letters: str) -> tuple[Tensor, Tensor]:
    """Masters of the test fonts, without the drawings that training fonts have for the same letter."""
    seen, known = _masters(TRAIN_FONTS, letters)
    masters, there = _masters(TEST_FONTS, letters)
    new = [_distance(masters[:, j], seen[known[:, j], j]).lt(SAME).any(1).logical_not() for j in range(len(letters))]
    return masters, there & torch.stack(new, 1)


def _draw(masters: Tensor, there: Tensor, count: int, look: str, generator: torch.Generator) -> Examples:
    """`count` pictures with jitter; classes in equal shares, fonts of a class equally likely."""
    classes = there.shape[1]
    labels = (torch.arange(count) % classes)[torch.randperm(count, generator=generator)]
    order = there.int().sort(dim=0, descending=True, stable=True).indices  # the fonts that have a class come first
    pick = (torch.rand(count, generator=generator) * there.sum(0)[labels]).long()
    images = masters[order[pick, labels], labels].unsqueeze(1)
    low = torch.tensor([-0.2, -0.2, 0.8, 0.8, -0.15, -0.15, 0.6])
    high = torch.tensor([0.2, 0.2, 1.15, 1.15, 0.15, 0.15, 1.0])
    draw = low + (high - low) * torch.rand(count, 7, generator=generator)
    turn, slant, wide, tall, right, down, contrast = draw.unbind(1)
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack(
        [cos / wide, (slant * cos - sin) / wide, right, sin / tall, (slant * sin + cos) / tall, down], 1
    )
    grid = F.affine_grid(theta.view(-1, 2, 3), [count, 1, SIDE, SIDE], align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False) * contrast.view(-1, 1, 1, 1)
    images = LOOKS[look](images, generator)
    images = images + 0.08 * torch.randn(images.shape, generator=generator)
    return Examples(images.clamp_(0, 1).mul_(255).round_().div_(255), labels)


def _check(look: str, **counts: int) -> None:
    if look not in LOOKS:
        raise InputError(f"look is one of {', '.join(LOOKS)}, got {look!r}")
    for split, count in counts.items():
        if count < 1:
            raise InputError(f"each split needs at least one example, got {split}={count}")


def _generator(seed: int, task: int, split: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + 10 * task + split)


def scripts(*, seed: int = 0, train: int = 2000, validation: int = 400, test: int = 600, look: str = "plain") -> Suite:
    """The suite.

    Args:
        seed: of fonts, jitter and noise.
        train, validation, test: examples a task; classes differ by one example at most.
        look: how pictures are changed, one of `LOOKS`.

    Returns:
        Eight tasks with inputs `(N, 1, 28, 28)` float32 in [0, 1], ink bright, and 10 to 38 classes: the
        letters that both the training and the held-out fonts have.

    Raises:
        InputError: for an unknown look, or a split without examples.

    >>> suite = scripts(train=40, validation=20, test=20)
    >>> suite["latin"].outputs, suite["latin"].train.inputs.shape
    (26, torch.Size([40, 1, 28, 28]))
    """
    _check(look, train=train, validation=validation, test=test)
    tasks = []
    for i, (name, letters) in enumerate(ALPHABETS.items()):
        seen, held_out = _masters(TRAIN_FONTS, letters), _held_out(letters)
        kept = seen[1].any(0) & held_out[1].any(0)
        classes = tuple(letter for letter, keep in zip(letters, kept.tolist()) if keep)
        splits = [
            _draw(masters[:, kept], there[:, kept], count, look, _generator(seed, i, split))
            for split, (count, (masters, there)) in enumerate([(train, seen), (validation, seen), (test, held_out)])
        ]
        tasks.append(Task(name, *splits, outputs=len(classes), classes=classes))
    return Suite(tasks, name="scripts")


def blocks(*, seed: int = 0, train: int = 3000, validation: int = 400, look: str = "plain") -> Suite:
    """Other blocks of Unicode, for pretraining: none of the letters of `scripts`.

    Args:
        seed, train, validation, look: as in `scripts`.

    Returns:
        Six tasks: Latin capitals, box drawing, Braille, Hebrew, Ogham and weather signs, from the training
        fonts of `scripts`. Their test split is their validation split: they are not for reporting. Signs that
        become one picture when centred and scaled (single Braille dots) are one class.
    """
    _check(look, train=train, validation=validation)
    tasks = []
    for i, (name, letters) in enumerate(BLOCKS.items(), start=len(ALPHABETS)):
        masters, there = _masters(TRAIN_FONTS, letters)
        first = masters[
            there.int().argmax(0), torch.arange(len(letters))
        ]  # (letters, ...) in the first font that has it
        doubled = _distance(first, first).lt(SAME).tril(-1).any(1)
        kept = there.any(0) & ~doubled
        classes = tuple(letter for letter, keep in zip(letters, kept.tolist()) if keep)
        made = [
            _draw(masters[:, kept], there[:, kept], count, look, _generator(seed, i, split))
            for split, count in enumerate([train, validation])
        ]
        tasks.append(Task(name, made[0], made[1], made[1], outputs=len(classes), classes=classes))
    return Suite(tasks, name="blocks")
