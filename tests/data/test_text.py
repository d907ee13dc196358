"""jsonl sets: what is read, how it is split and drawn, what a model gets, and every way in which a row can be wrong."""

import gzip
import json
from collections import Counter

import pytest
import torch

import allrounder as ar
from allrounder.data.text import Tokens, draw, text_suite, tokenize
from allrounder.nets.encoders import find_minilm, load_tokenizer
from allrounder.task import Batches


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_minilm())


def write(path, rows, suffix=".jsonl"):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    path = path.with_name(path.name + suffix)
    path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith(".gz") else lines.encode())
    return path


def rows(count, classes=("red", "blue"), split=None, start=0):
    """Rows with texts that differ; `split=None` leaves the field out."""
    named = {} if split is None else {"split": split}
    return [
        {"text": f"number {start + i} " + "very " * (i % 7), "label": classes[i % len(classes)]} | named
        for i in range(count)
    ]


def texts(split, tokenizer):
    return {tokenizer.decode(ids, skip_special_tokens=True) for ids in split.inputs["input_ids"]}


def suite_of(folder, tokenizer, *names, **options):
    return text_suite(list(names), tokenizer=tokenizer, folder=folder, **options)


def test_rows_without_splits_are_shared_out_80_10_10(tmp_path, tokenizer):
    write(tmp_path / "own", rows(100))
    task = suite_of(tmp_path, tokenizer, "own")["own"]
    parts = [texts(task.split(split), tokenizer) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [80, 10, 10]
    assert len(set.union(*parts)) == 100  # disjoint, and nothing is lost
    assert task.classes == ("blue", "red")
    assert Counter(task.test.targets.tolist()) == {0: 5, 1: 5}


def test_the_datas_own_splits_are_kept(tmp_path, tokenizer):
    splits = {"train": 40, "dev": 20, "test": 30}
    made = [row for i, (split, n) in enumerate(splits.items()) for row in rows(n, split=split, start=1000 * i)]
    write(tmp_path / "own" / "own", made, ".jsonl.gz")
    task = suite_of(tmp_path, tokenizer, "own", train=1000, validation=1000, test=1000)["own"]
    for i, (split, count) in enumerate(zip(("train", "validation", "test"), splits.values())):
        found = texts(task.split(split), tokenizer)
        assert len(found) == count
        assert {int(text.split()[1]) // 1000 for text in found} == {i}


def test_validation_comes_from_train_and_never_from_test(tmp_path, tokenizer):
    write(tmp_path / "own", rows(40, split="train") + rows(40, split="test", start=1000))
    task = suite_of(tmp_path, tokenizer, "own", validation=300)["own"]
    train, validation, test = (texts(task.split(split), tokenizer) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (30, 10, 40)  # at most a quarter of train
    assert not train & validation
    assert all(int(text.split()[1]) < 1000 for text in train | validation)


def test_drawing_keeps_the_shares_of_classes_and_depends_on_the_seed(tmp_path, tokenizer):
    made = rows(600, ("a", "a", "a", "b"), split="train") + rows(200, ("a", "a", "a", "b"), split="test", start=5000)
    write(tmp_path / "own", made)
    first, again, other = (
        suite_of(tmp_path, tokenizer, "own", train=100, validation=40, test=50, seed=seed)["own"] for seed in (0, 0, 1)
    )
    assert Counter(first.train.targets.tolist()) == {0: 75, 1: 25}
    assert Counter(first.validation.targets.tolist()) == {0: 30, 1: 10}
    for split in ("train", "validation", "test"):
        assert texts(first.split(split), tokenizer) == texts(again.split(split), tokenizer)
        assert texts(first.split(split), tokenizer) != texts(other.split(split), tokenizer)


@pytest.mark.parametrize("count", [1, 7, 50, 99])
def test_draw_keeps_shares_within_one(count):
    labels = [0] * 60 + [1] * 30 + [2] * 9 + [3]
    chosen, rest = draw(labels, count, torch.Generator().manual_seed(3))
    assert sorted(chosen + rest) == list(range(100))
    for label, number in Counter(labels).items():
        assert abs(sum(labels[i] == label for i in chosen) - count * number / 100) <= 1.0


def test_labels_are_numbered_as_their_names_or_numbers_are_ordered(tmp_path, tokenizer):
    made = [
        {"text": f"row {i}", "label": 10 * (i % 3), "label_name": ("low", "mid", "top")[i % 3], "split": split}
        for split in ("train", "test") for i in range(12)
    ]  # fmt: skip
    write(tmp_path / "own", made)
    task = suite_of(tmp_path, tokenizer, "own")["own"]
    assert task.classes == ("low", "mid", "top")
    inputs, targets = task.test[:]
    for ids, target in zip(inputs["input_ids"], targets):
        assert int(tokenizer.decode(ids, skip_special_tokens=True).split()[1]) % 3 == target


def test_parts_of_a_file_and_rows_of_no_class(tmp_path, tokenizer):
    def part(**fields):
        return [row | fields for split in ("train", "test") for row in rows(20, split=split)]

    write(tmp_path / "several", part(task="one") + part(task="two"))
    out = [{"text": "something else", "label": -1, "domain": None, "split": "oos_train"}]
    numbered = [row | {"label": i % 2} for i, row in enumerate(part(domain="home"))]
    write(tmp_path / "scoped", out + numbered + [row | {"domain": "work", "label": 2} for row in numbered])
    suite = suite_of(tmp_path, tokenizer, "several/one", "scoped", "scoped/home")
    assert [task.outputs for task in suite.values()] == [2, 3, 2]
    assert len(suite["scoped"].test) == 2 * len(suite["scoped/home"].test) == 40
    with pytest.raises(ar.InputError, match="no rows of one task; it holds one, two"):
        suite_of(tmp_path, tokenizer, "several")
    with pytest.raises(ar.InputError, match="no rows of 'three'; it holds one, two"):
        suite_of(tmp_path, tokenizer, "several/three")


def test_batches_are_cut_to_their_longest_text(tmp_path, tokenizer):
    write(tmp_path / "own", rows(70, split="train") + rows(40, split="test"))
    task = suite_of(tmp_path, tokenizer, "own")["own"]
    whole = task.train.inputs
    assert isinstance(task.train, Tokens)
    for inputs, _ in Batches(task.train, 4, seed=1):
        assert inputs["attention_mask"][:, -1].any()
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    (inputs, _), longest = task.train[torch.tensor([0])], int(whole["attention_mask"][0].sum())
    assert torch.equal(inputs["input_ids"][0], whole["input_ids"][0, :longest])
    assert task.train[0][0]["input_ids"].shape == whole["input_ids"].shape[1:]  # one example is not cut
    lengths = task.test.inputs["attention_mask"].sum(1)
    assert torch.equal(lengths, lengths.sort().values)  # what is only scored is in order of length
    kept = task.train.take(5, seed=2)
    assert isinstance(kept, Tokens)
    assert len(kept) == 5


def test_texts_are_tokenised_as_the_tokenizer_does_and_truncated(tokenizer):
    found = tokenize(tokenizer, ["Hello there", "one " * 50], 16)
    assert found["input_ids"].shape == (2, 16)
    assert found["input_ids"][0, :4].tolist() == tokenizer("Hello there")["input_ids"]
    assert found["attention_mask"].sum(1).tolist() == [4, 16]
    assert found["input_ids"][1, -1] == tokenizer.sep_token_id


GOOD = rows(12, split="train") + rows(12, split="test")
BAD = {
    "{oops": "line 25 is not JSON",
    '["a", 1]': "line 25 is a list",
    '{"label": "red", "split": "train"}': "line 25 lacks the field 'text'",
    '{"text": "hello", "split": "train"}': "line 25 lacks the field 'label'",
    '{"text": "  ", "label": "red", "split": "train"}': "line 25: 'text' or 'label' is empty",
    '{"text": "hello", "label": "", "split": "train"}': "line 25: 'text' or 'label' is empty",
    '{"text": 3, "label": "red", "split": "train"}': "line 25: 'text' must be a string",
    '{"text": "hello", "label": 1.5, "split": "train"}': "line 25: 'text' must be a string and 'label'",
    '{"text": "hello", "label": "red", "split": "trian"}': "line 25: split 'trian' is not one of",
    '{"text": "hello", "label": "green", "split": "test"}': "line 25: the label 'green' does not occur in the training",
    '{"text": "hello", "label": 3, "split": "train"}': "strings and integers as labels",
    '{"text": "hello", "label": "red"}': "names the split of some rows only",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named(tmp_path, tokenizer, line):
    write(tmp_path / "own", [*GOOD, line])
    with pytest.raises(ar.InputError, match=BAD[line]):
        suite_of(tmp_path, tokenizer, "own")


def test_wrong_files_and_arguments(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "own", GOOD)
    with pytest.raises(ar.InputError, match="has no text task 'other'"):
        suite_of(tmp_path, tokenizer, "other")
    with pytest.raises(ar.InputError, match="does not exist"):
        suite_of(tmp_path / "nowhere", tokenizer, "own")
    with pytest.raises(ar.InputError, match="at least 1 example"):
        suite_of(tmp_path, tokenizer, "own", test=0)
    write(tmp_path / "untested", rows(12, split="train"))
    with pytest.raises(ar.InputError, match="has no test rows"):
        suite_of(tmp_path, tokenizer, "untested")
    write(tmp_path / "single", rows(12, ("red",)))
    with pytest.raises(ar.InputError, match=r"1 class\(es\)"):
        suite_of(tmp_path, tokenizer, "single")
    write(tmp_path / "few", rows(2, split="train") + rows(12, split="test"))
    with pytest.raises(ar.InputError, match="too few training rows"):
        suite_of(tmp_path, tokenizer, "few")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-12])
    with pytest.raises(ar.InputError, match="torn"):
        suite_of(tmp_path, tokenizer, "torn")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9", "label": 1}\n')
    with pytest.raises(ar.InputError, match="cannot be read"):
        suite_of(tmp_path, tokenizer, "latin")
    monkeypatch.delenv("ALLROUNDER_DATA")
    with pytest.raises(ar.InputError, match="set ALLROUNDER_DATA"):
        suite_of(None, tokenizer, "own")
    monkeypatch.setenv("ALLROUNDER_DATA", str(tmp_path))
    assert list(suite_of(None, tokenizer, "own")) == ["own"]


REAL = {
    "banking77": (77, "card_arrival"),
    "hwu64": (64, "alarm_query"),
    "clinc150": (150, "accept_reservations"),
    "clinc150/travel": (15, "book_flight"),
    "tweeteval/hate": (2, "not-hate"),
    "offensive_language_votes": (3, "hate_speech"),
    "pubmedqa": (3, "yes"),
}


def test_the_real_sets(data_folder, tokenizer):
    suite = suite_of(data_folder, tokenizer, *REAL, train=40, validation=20, test=30)
    for name, (outputs, first) in REAL.items():
        task = suite[name]
        assert (task.outputs, task.classes[0]) == (outputs, first)
        assert [len(task.split(split)) for split in ("train", "validation", "test")] == [40, 20, 30]
        assert task.test.inputs["attention_mask"][:, :3].all()
    assert suite["pubmedqa"].test.inputs["input_ids"].shape[1] == 64  # the abstract follows the question
