"""From a teacher's folder to a student's: formats, what is left out, interruption, bad files."""

import gzip
import json

import pytest
import torch

from allrounder.compression.folders import classify, distil_folder, general_text
from allrounder.data.text import Tokens, tokenize
from allrounder.errors import InputError
from allrounder.nets.encoders import load_tokenizer

transformers = pytest.importorskip("transformers")
WORDS = ["the", "a", "red", "blue", "green", "cat", "dog", "bird", "runs", "sleeps", "sings", "well", "here", "now"]
FAST = {"epochs": {"general": 1, "general-enhanced": 1, "task-adaptive": 1, "task-specific": 2}, "batch_size": 8,
        "teacher_epochs": 1, "max_length": 12, "layers": 2}  # fmt: skip


def sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield " ".join(WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=generator).tolist())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder / "teacher")
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(folder / "teacher")
    with gzip.open(folder / "general.txt.gz", "wt") as file:
        file.write("\n\nshort\n" + "\n".join(sentences(30, 1)))
    with (folder / "pets.jsonl").open("w") as file:
        for i, text in enumerate(sentences(60, 2)):
            label = "cat" if "cat" in text.split() else "dog" if "dog" in text.split() else "none"
            file.write(json.dumps({"text": text, "label": label, "split": ("train", "test")[i % 3 == 0]}) + "\n")
    return folder


def run(files, out, **options):
    options = FAST | {"task": files / "pets.jsonl", "general": files / "general.txt.gz"} | options
    return distil_folder(options.pop("teacher", files / "teacher"), out, **options)


@pytest.fixture(scope="module")
def made(files):
    return run(files, files / "student"), files / "student"


def test_the_result_is_an_ordinary_folder_with_its_account(files, made):
    account, out = made
    assert json.loads((out / "distillation.json").read_text()) == account
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.num_hidden_layers == 2
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "none"}
    tokenizer = load_tokenizer(out)
    rows = [json.loads(line) for line in (files / "pets.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    data = Tokens(tokenize(tokenizer, [row["text"] for row in rows], 12), torch.zeros(len(rows)))
    right = [model.config.id2label[i] for i in classify(model, data).argmax(-1).tolist()]
    share = 100 * sum(a == row["label"] for a, row in zip(right, rows, strict=True)) / len(rows)
    assert account["student"]["test"] == pytest.approx(share)
    assert account["kept"] == pytest.approx(100 * share / account["teacher"]["test"])
    assert account["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert account["teacher"]["parameters"] > account["student"]["parameters"]
    assert account["student"]["latency"] > 0
    assert [stage["name"] for stage in account["stages"]] == [
        "general", "general-enhanced", "task-adaptive", "task-specific",
    ]  # fmt: skip
    assert [stage["steps"] for stage in account["stages"]] == [4, 1, 4, 8]  # of 30, 6, 30 and 30 examples
    assert account["notes"] == []
    assert not (out.parent / ".student.work").exists()


class StopError(Exception):
    pass


def test_interrupted_in_a_stage_and_continued_it_is_the_same_student(files, made, tmp_path):
    def stop(name, done, total):
        if name == "task-adaptive" and done == 2:
            raise StopError

    with pytest.raises(StopError):
        run(files, tmp_path / "again", progress=stop)
    assert not (tmp_path / "again").exists()
    assert (tmp_path / ".again.work").is_dir()
    run(files, tmp_path / "again")
    assert not (tmp_path / ".again.work").exists()
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (made[1], tmp_path / "again"))
    assert first == second


def test_without_general_text_or_pretrained_model_stages_are_left_out_and_said(files, made, tmp_path):
    account = run(files, tmp_path / "a", general=None)
    assert [stage["name"] for stage in account["stages"]] == ["task-adaptive", "task-specific"]
    assert "were left out" in account["notes"][0]
    account = run(files, tmp_path / "b", teacher=made[1], layers=1)  # a folder with a head is a fine-tuned teacher
    assert [stage["name"] for stage in account["stages"]] == ["general-enhanced", "task-adaptive", "task-specific"]
    assert "'general' was left out" in account["notes"][0]
    account = run(files, tmp_path / "c", teacher=made[1], pretrained=files / "teacher", layers=1)
    assert account["stages"][0]["name"] == "general"


def test_general_text_reads_lines_of_four_words(files):
    tokenizer = load_tokenizer(files / "teacher")
    text = general_text(files / "general.txt.gz", tokenizer, max_length=6)
    assert len(text) == 30
    assert text.inputs["input_ids"].shape == (30, 6)
    assert text.targets.eq(-100).all()
    assert len(general_text(files / "general.txt.gz", tokenizer, most=7)) == 7


def test_bad_files_are_named(files, made, tmp_path):
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        run(files, made[1])
    with pytest.raises(InputError, match=r"is no .jsonl or .jsonl.gz file"):
        run(files, tmp_path / "x", task=files / "absent.jsonl")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        run(files, tmp_path / "x", general=files / "absent.txt")
    (tmp_path / "short.txt").write_text("one\ntwo words\n")
    with pytest.raises(InputError, match="no line of four or more words"):
        run(files, tmp_path / "y", general=tmp_path / "short.txt")
    other = tmp_path / "pets.jsonl"
    other.write_text((files / "pets.jsonl").read_text().replace('"none"', '"ant"'))
    with pytest.raises(InputError, match="label 0 is 'cat' for the teacher and 'ant' in the task 'pets'"):
        run(files, tmp_path / "z", teacher=made[1], task=other, layers=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is not a model folder|cannot be loaded|config.json"):
        run(files, tmp_path / "w", teacher=tmp_path / "empty")
