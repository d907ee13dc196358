"""Texts as tasks for causal language models, and documents of text files."""

import gzip
import json
import math

import pytest
import torch

import allrounder as ar
from allrounder.data.causal import InversePerplexity, language_suite, sequence_loss, text_file
from allrounder.data.documents import documents


class Letters:
    """A tokenizer of single characters; `~` ends a text."""

    eos_token_id = 126

    def __len__(self):
        return 128

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


class TestDocuments:
    def test_a_text_file_is_one_document_and_a_line_of_jsonl_is_one(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\ntwo\n")
        assert documents(tmp_path / "a.txt") == [("one\ntwo\n", None)]
        rows = [
            {"text": "said", "other": "unsaid", "split": "test"},
            {"id": "7", "question": "why", "contexts": ["since", "then"], "n": 3, "task_id": "x/1"},
            {"n": 4},
        ]
        with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
            file.write("\n".join(json.dumps(row) for row in rows))
        assert documents(tmp_path / "b.jsonl.gz") == [("said", "test"), ("why\nsince\nthen", None)]

    def test_a_separator_that_python_counts_as_a_line_end_does_not_split_a_row(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
        assert documents(tmp_path / "a.jsonl") == [("one\u2028two", None)]

    def test_marks_of_windows_and_halves_of_surrogate_pairs_are_no_text(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "cut \\ud83d"}\r\n{"text": "\\ud83d\\ude00"}\r\n')
        assert documents(tmp_path / "a.jsonl") == [("cut ?", None), ("\U0001f600", None)]
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
        assert documents(tmp_path / "a.txt") == [("one", None)]

    def test_bad_files(self, tmp_path):
        (tmp_path / "list.jsonl").write_text('{"text": "a"}\n\n[1]\n')
        (tmp_path / "broken.jsonl").write_text("{")
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        whole = gzip.compress(bytes(range(256)) * 9)
        (tmp_path / "damaged.txt.gz").write_bytes(whole[:12] + b"\xff" * 99 + whole[111:])
        for name, message in (
            ("list.jsonl", "line 3 of .* is a JSON list, not an object"),
            ("broken.jsonl", "line 1 of .* is not a JSON object"),
            ("empty.txt", "has no text"),
            ("bytes.txt", "cannot be read as UTF-8 text"),
            ("damaged.txt.gz", "cannot be read as UTF-8 text"),
            ("none.txt", "cannot be read"),
            ("a.pdf", "is no text file"),
        ):
            with pytest.raises(ar.InputError, match=message):
                documents(tmp_path / name)


def test_the_metric_is_one_over_the_perplexity_however_it_is_batched():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator)
    targets = torch.randint(11, (5, 7), generator=generator)
    log_p = logits.double().log_softmax(-1).gather(-1, targets[..., None])
    expected = math.exp(log_p.mean().item())
    metric = InversePerplexity()
    for part in ((0, 1), (1, 4), (4, 5)):
        metric.update(logits[slice(*part)], targets[slice(*part)])
    assert metric.compute() == pytest.approx(expected, rel=1e-5)
    assert metric(logits, targets) == pytest.approx(expected, rel=1e-5)
    assert sequence_loss(logits, targets).item() == pytest.approx(-math.log(expected), rel=1e-5)
    metric.reset()
    assert math.isnan(metric.compute())


class TestSuite:
    def suite(self, tmp_path, tasks, **options):
        return language_suite(tasks, tokenizer=Letters(), folder=tmp_path, **options)

    def test_targets_are_the_next_tokens_and_documents_end_with_the_end_token(self, tmp_path):
        lines(tmp_path / "abc.jsonl", [{"text": "abcdefg"} for _ in range(20)])
        task = self.suite(tmp_path, ["abc"], length=7)["abc"]
        rows = torch.cat([task.train.inputs["input_ids"], task.train.targets[:, -1:]], dim=1)
        assert rows.shape == (16, 8)
        assert rows.tolist() == [[*map(ord, "abcdefg"), Letters.eos_token_id]] * 16
        assert torch.equal(task.train.inputs["input_ids"][:, 1:], task.train.targets[:, :-1])
        assert task.outputs == 128

    def test_no_document_is_in_two_splits_and_the_seed_shares_them_out(self, tmp_path):
        words = [chr(97 + i // 10) + chr(97 + i % 10) for i in range(100)]
        lines(tmp_path / "words.jsonl", [{"text": word} for word in words])

        def parts(seed):
            task = self.suite(tmp_path, ["words"], length=2, seed=seed)["words"]
            return [{bytes(row.tolist()) for row in task.split(s).inputs["input_ids"]} for s in ("train", "test")]

        train, test = parts(0)
        assert len(train) == 80
        assert len(test) == 10
        assert not train & test
        assert parts(0) == [train, test]
        assert parts(1) != [train, test]

    def test_named_splits_are_kept_and_validation_comes_from_train(self, tmp_path):
        rows = [{"text": "aaaa", "split": "train"}] * 18 + [{"text": "zzzz", "split": "test"}] * 3
        lines(tmp_path / "s.jsonl", rows)
        task = self.suite(tmp_path, ["s"], length=4)["s"]
        assert [len(task.split(name)) for name in ("train", "validation", "test")] == [16, 2, 3]
        assert (task.test.inputs["input_ids"] == ord("z")).any()
        assert not (task.train.inputs["input_ids"] == ord("z")).any()

    def test_a_long_text_is_divided_in_its_order(self, tmp_path):
        (tmp_path / "long.txt").write_text("".join(f"{chr(97 + i // 4)}" * 999 + "\n" for i in range(100)))
        task = self.suite(tmp_path, ["long"], length=10, train=10_000, test=10_000)["long"]
        letters = {name: set(task.split(name).targets.flatten().tolist()) for name in ("train", "validation", "test")}
        both = {10, Letters.eos_token_id}
        assert max(letters["train"] - both) <= min(letters["validation"] - both)
        assert max(letters["validation"] - both) <= min(letters["test"] - both)

    def test_a_text_without_line_ends_is_divided_between_words(self, tmp_path):
        (tmp_path / "flat.txt").write_text(" ".join(f"{chr(97 + i // 1600)}" * 9 for i in range(40_000)))
        task = self.suite(tmp_path, ["flat"], length=10, train=99_999, validation=9999, test=9999)["flat"]
        rows = [
            torch.cat([s.inputs["input_ids"], s.targets[:, -1:]], 1).flatten().tolist()
            for s in (task.train, task.validation, task.test)
        ]
        assert [len(part) for part in rows] == pytest.approx([320_000, 40_000, 40_000], rel=0.05)
        for part in rows:
            assert {len(w) for w in bytes(part).decode().replace("~", " ").split()[:-1]} == {9}

    def test_sizes_are_kept(self, tmp_path):
        lines(tmp_path / "abc.jsonl", [{"text": "abc" * 9}] * 200)
        task = self.suite(tmp_path, ["abc"], length=6, train=3, validation=2, test=1)["abc"]
        assert [len(task.split(name)) for name in ("train", "validation", "test")] == [3, 2, 1]

    def test_bad_input(self, tmp_path, monkeypatch):
        lines(tmp_path / "abc.jsonl", [{"text": "abc"}] * 20)
        lines(tmp_path / "odd.jsonl", [{"text": "abc", "split": "train"}, {"text": "abc"}])
        for tasks, options, message in (
            (["abc"], {"length": 1}, "rows 2 tokens"),
            (["abc"], {"length": 50}, "too little validation text for a row of 50 tokens"),
            (["none"], {}, "has no text 'none': no none.txt, none.jsonl"),
            (["odd"], {}, "has a split None; it is one of train"),
            (["abc", str(tmp_path / "abc.jsonl")], {"length": 2}, "must differ, got abc"),
        ):
            with pytest.raises(ar.InputError, match=message):
                self.suite(tmp_path, tasks, **options)
        tokenizer = Letters()
        tokenizer.eos_token_id = None
        with pytest.raises(ar.InputError, match="no end-of-text token"):
            language_suite(["abc"], tokenizer=tokenizer, folder=tmp_path)
        monkeypatch.delenv("ALLROUNDER_DATA", raising=False)
        with pytest.raises(ar.InputError, match="'abc' is no text file; give the path of one"):
            text_file("abc")


def test_scores_of_a_gathered_metric_are_those_of_all_outputs(tmp_path):
    lines(tmp_path / "abc.jsonl", [{"text": "abcdefg"}] * 200)
    suite = language_suite(["abc"], tokenizer=Letters(), folder=tmp_path, length=7)
    table = torch.nn.Embedding(128, 128)
    found = ar.score(lambda inputs, task: table(inputs["input_ids"]), suite)["abc"]
    inputs, targets = suite["abc"].test[:]
    assert found == pytest.approx(suite["abc"].metric(table(inputs["input_ids"]), targets), rel=1e-5)
