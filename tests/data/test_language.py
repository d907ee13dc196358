"""Texts: what is a token, how they are split, and what a batch holds."""

import gzip
from itertools import islice

import pytest
import torch

from allrounder.data.language import corpus, windows
from allrounder.errors import InputError


def words(part, text):
    return " ".join(text.vocabulary[i] for i in part.tolist())


def test_a_file_is_split_90_5_5_without_losing_a_word(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(f"a b w{i}" for i in range(50)))  # 200 tokens with <eos>
    text = corpus(path)
    assert [len(part) for part in (text.train, text.validation, text.test)] == [180, 10, 10]
    assert text.train.dtype == torch.int64
    assert text.vocabulary[:4] == ("<unk>", "<eos>", "a", "b")  # by frequency, ties by code points
    assert len(text.vocabulary) == 4 + 45
    assert words(text.train[:8], text) == "a b w0 <eos> a b w1 <eos>"
    assert words(text.validation, text) == "a b <unk> <eos> a b <unk> <eos> a b"
    assert words(text.test[:2], text) == "<unk> <eos>"


def test_characters_are_what_they_are(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("ab\n\n é" * 20)
    text = corpus(path, level="char")
    assert "".join(text.vocabulary[i] for part in (text.train, text.validation, text.test) for i in part) == (
        "ab\n\n é" * 20
    )
    assert text.vocabulary == ("<unk>", "\n", " ", "a", "b", "é")


def test_the_texts_own_unknown_words_are_the_unknown_word(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("a <unk> b <unk> " * 20)
    text = corpus(path)
    assert text.vocabulary == ("<unk>", "a", "b")
    assert text.train[1] == text.train[3] == 0


def test_a_folder_is_its_texts_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("three four " * 10)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one two " * 10))
    (tmp_path / "notes.md").write_text("left out")
    text = corpus(tmp_path)
    everything = " ".join(words(part, text) for part in (text.train, text.validation, text.test)).split()
    assert everything[:2] == ["one", "two"]
    assert everything[20:23] == ["<eos>", "three", "four"]
    assert text.vocabulary.index("three") > 0


def test_a_text_of_the_data_folder_goes_by_its_name(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.txt").write_text("a b c d " * 10)
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(b"e f g h " * 10))
    assert "a" in corpus("own", folder=tmp_path).vocabulary
    assert "e" in corpus("other", folder=tmp_path).vocabulary


def test_wikitext_trains_on_nine_tenths_of_the_validation_text_and_keeps_the_test_text(tmp_path):
    place = tmp_path / "wikitext2_sample"
    place.mkdir()
    (place / "wikitext2_valid.txt").write_text("v " * 100)
    (place / "wikitext2_test.txt").write_text("t " * 30)
    text = corpus("wikitext2_sample", folder=tmp_path)
    assert (len(text.train), len(text.validation), len(text.test)) == (90, 11, 31)
    assert text.vocabulary == ("<unk>", "v")
    assert text.test.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("name", "level", "sizes", "vocabulary"),
    [
        ("tinyshakespeare", "char", (1003854, 55770, 55770), 66),
        ("tinyshakespeare", "word", (211885, 11771, 11772), 23852),
        ("wikitext2_sample", "word", (194712, 21635, 244102), 12950),
    ],
)
def test_the_real_texts(data_folder, name, level, sizes, vocabulary):
    text = corpus(name, folder=data_folder, level=level)
    parts = (text.train, text.validation, text.test)
    assert tuple(map(len, parts)) == sizes
    assert len(text.vocabulary) == vocabulary
    assert all(part.min() >= 0 and part.max() < vocabulary for part in parts)
    share = (text.test == 0).float().mean().item()
    assert share == 0 if level == "char" else 0.05 < share < 0.15


def test_windows_are_stretches_of_the_text():
    tokens = torch.arange(100, 150)
    batches = list(islice(windows(tokens, 7, 64, seed=0), 20))
    assert all(batch.shape == (64, 8) and batch.dtype == torch.int64 for batch in batches)
    rows = torch.cat(batches)
    assert (rows.diff(dim=1) == 1).all()
    assert set(rows[:, 0].tolist()) == set(range(100, 143))  # every start, the last one too
    counts = rows[:, 0].bincount(minlength=143)[100:]
    assert counts.min() > 10  # about 30 each


def test_windows_follow_their_seed_alone():
    tokens = torch.arange(50)
    state = torch.get_rng_state()
    first, again, other = (torch.cat(list(islice(windows(tokens, 3, 4, seed=s), 5))) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_can_be_written_to():
    tokens = torch.arange(50)
    next(windows(tokens, 3, 4, seed=0)).zero_()
    assert torch.equal(tokens, torch.arange(50))


@pytest.mark.parametrize(
    ("tokens", "length", "batch", "message"),
    [
        (torch.arange(5), 5, 1, "windows of 5 need a text of 6 tokens, got 5"),
        (torch.zeros(2, 5, dtype=torch.int64), 2, 1, r"one row of integers, got \(2, 5\)"),
        (torch.rand(5), 2, 1, "one row of integers, got .* torch.float32"),
        (torch.arange(5), 0, 1, "at least 1, got 0 and 1"),
        (torch.arange(5), 2, 0, "at least 1, got 2 and 0"),
    ],
)
def test_windows_that_cannot_be(tokens, length, batch, message):
    with pytest.raises(InputError, match=message):
        windows(tokens, length, batch, seed=0)


def test_texts_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.delenv("ALLROUNDER_DATA", raising=False)
    with pytest.raises(InputError, match="level is 'word' or 'char', got 'byte'"):
        corpus("tinyshakespeare", folder=tmp_path, level="byte")
    with pytest.raises(InputError, match="needs a data folder: give 'folder', set ALLROUNDER_DATA"):
        corpus("tinyshakespeare")
    with pytest.raises(InputError, match="has no text 'plays': no plays.txt"):
        corpus("plays", folder=tmp_path)
    with pytest.raises(InputError, match="does not exist; give another"):
        corpus("plays", folder=tmp_path / "absent")
    with pytest.raises(InputError, match="is no text file and no folder"):
        corpus(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="is no text file and no folder"):
        corpus(tmp_path)
    with pytest.raises(InputError, match=r"needs wikitext2_valid.txt"):
        corpus("wikitext2_sample", folder=tmp_path)
    (tmp_path / "short.txt").write_text("one two three")
    with pytest.raises(InputError, match="has 4 word tokens, too few to be split"):
        corpus(tmp_path / "short.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9" * 50)
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        corpus(tmp_path / "latin.txt")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        corpus(tmp_path / "cut.txt.gz")
