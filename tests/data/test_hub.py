"""Hugging Face data sets read from local folders, and the whole of the CLIP path on a tiny random CLIP."""

import copy
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

import allrounder as ar
from allrounder.data import hub
from allrounder.data.hub import Pixels, hub_image_suite, hub_text_suite
from allrounder.data.text import Tokens
from allrounder.nets.encoders import (
    ClipImageEncoder,
    clip_heads,
    find_minilm,
    load_processor,
    load_tokenizer,
)  # fmt: skip
from allrounder.nets.multitask import MultiTaskModel
from allrounder.saving import save
from allrounder.scoring import score

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
COLOURS = {"deep_red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_minilm())


def table(folder, split, columns, types=None):
    folder.mkdir(exist_ok=True)
    features = datasets.Features(types) if types else None
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def sentences(count, start=0):
    return [f"sentence {start + i}" for i in range(count)]


LABELLED = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}


def numbers(split, tokenizer):
    return {int(tokenizer.decode(ids, skip_special_tokens=True).split()[1]) for ids in split.inputs["input_ids"]}


def test_text_from_parquet_with_its_splits(tmp_path, tokenizer):
    folder = tmp_path / "my.reviews"
    for split, (count, start) in {"train": (40, 0), "validation": (20, 100), "test": (30, 200)}.items():
        columns = {"text": sentences(count, start), "label": [i % 2 for i in range(count)]}
        table(folder, split, columns, LABELLED)
    suite = hub_text_suite([str(folder)], tokenizer=tokenizer, train=24, validation=12, test=100)
    task = suite["my_reviews"]
    assert task.classes == ("bad", "good")
    assert isinstance(task.train, Tokens)
    assert Counter(task.train.targets.tolist()) == {0: 12, 1: 12}
    found = {split: numbers(task.split(split), tokenizer) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 24, "validation": 12, "test": 30}
    assert found["train"] < set(range(40))
    assert found["validation"] < set(range(100, 120))
    assert found["test"] == set(range(200, 230))
    inputs, targets = task.test[:]
    for ids, target in zip(inputs["input_ids"], targets):
        assert int(tokenizer.decode(ids, skip_special_tokens=True).split()[1]) % 2 == target


def test_hidden_test_labels_give_way_to_validation(tmp_path, tokenizer):
    for split, count, start in (("train", 40, 0), ("validation", 20, 100), ("test", 30, 200)):
        labels = [-1 if split == "test" else i % 2 for i in range(count)]
        table(tmp_path / "hidden", split, {"text": sentences(count, start), "label": labels}, LABELLED)
    task = hub_text_suite([str(tmp_path / "hidden")], tokenizer=tokenizer)["hidden"]
    assert numbers(task.test, tokenizer) == set(range(100, 120))
    assert len(numbers(task.validation, tokenizer)) == 10
    assert numbers(task.train, tokenizer) | numbers(task.validation, tokenizer) == set(range(40))


def test_one_split_and_labels_that_are_plain_strings(tmp_path, tokenizer):
    columns = {"id": list(range(50)), "utterance": sentences(50), "title": ["x"] * 50, "label": ["no", "yes"] * 25}
    table(tmp_path / "plain", "train", columns)
    task = hub_text_suite([str(tmp_path / "plain")], tokenizer=tokenizer)["plain"]
    assert task.classes == ("no", "yes")
    assert [len(task.split(split)) for split in ("train", "validation", "test")] == [40, 5, 5]
    assert not numbers(task.test, tokenizer) & numbers(task.train, tokenizer)


def test_data_sets_that_are_not_clear(tmp_path, tokenizer):
    table(tmp_path / "two", "train", {"first": sentences(9), "second": sentences(9), "label": [0, 1, 2] * 3})
    with pytest.raises(ar.InputError, match=r"has 2 columns that could be the text, of first \(Value\), second"):
        hub_text_suite([str(tmp_path / "two")], tokenizer=tokenizer)
    with pytest.raises(ar.InputError, match="has no columns that could be the image"):
        hub_image_suite([str(tmp_path / "two")], processor=None)
    table(tmp_path / "bare", "train", {"text": sentences(9)})
    with pytest.raises(ar.InputError, match="has no columns that could be the label"):
        hub_text_suite([str(tmp_path / "bare")], tokenizer=tokenizer)
    table(tmp_path / "untrained", "test", {"text": sentences(9), "label": [0, 1, 2] * 3})
    with pytest.raises(ar.InputError, match="has the splits test; one must be called train"):
        hub_text_suite([str(tmp_path / "untrained")], tokenizer=tokenizer)
    for split, label in (("train", "a"), ("test", "b")):
        table(tmp_path / "new", split, {"text": sentences(9), "label": [label] * 9})
    with pytest.raises(ar.InputError, match="the label 'b' does not occur in the training rows"):
        hub_text_suite([str(tmp_path / "new")], tokenizer=tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ar.InputError, match=r"cannot be loaded .* give org/name"):
        hub_text_suite([str(tmp_path / "empty")], tokenizer=tokenizer)
    with pytest.raises(ar.InputError, match="at least 1 example"):
        hub_text_suite([], tokenizer=tokenizer, train=0)


def test_hub_names_reach_the_client_and_become_task_names(monkeypatch, tokenizer):
    asked = []

    def load(path, name=None):
        asked.append((path, name))
        columns = {"text": sentences(40), "label": [i % 2 for i in range(40)]}
        return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=datasets.Features(LABELLED)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    suite = hub_text_suite(["org/data.v1:en", "org/other"], tokenizer=tokenizer)
    assert asked == [("org/data.v1", "en"), ("org/other", None)]
    assert list(suite) == ["org/data_v1/en", "org/other"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIP folder, tiny and random: model, tokenizer of whole words, image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *["a", "photo", "of", "texture", "deep", "red", "green", "blue", "."]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=16, **special)
    fast.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(words)}
    config = transformers.CLIPConfig(
        text_config=shape | ids | {"max_position_embeddings": 16},
        vision_config=shape | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of images by split and class; sizes and shades differ, some are grey-scale files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures") / "colours"
    for split, count in (("train", 10), ("test", 6)):
        for name, colour in COLOURS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, value + 3 * i) for value in colour)
                picture = Image.new("RGB", (20 + i, 30), shade)
                (picture.convert("L") if i == 5 else picture).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def suite(clip, pictures):
    return hub_image_suite([str(pictures)], processor=load_processor(clip), train=12, validation=6, test=18)


def perturbed(state, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in state.items()
    }


def test_images_from_folders_are_what_the_processor_makes(suite, clip, pictures):
    from PIL import Image

    task = suite["colours"]
    assert task.classes == tuple(sorted(COLOURS))
    assert [len(task.split(split)) for split in ("train", "validation", "test")] == [12, 6, 18]
    assert isinstance(task.test, Pixels)
    assert task.test.inputs.dtype == torch.uint8
    pixels, targets = task.test[:]
    processor, wanted = load_processor(clip), {}
    for number, name in enumerate(task.classes):
        images = [Image.open(file).convert("RGB") for file in (pictures / "test" / name).iterdir()]
        wanted[number] = processor(images, return_tensors="pt")["pixel_values"]
    for image, target in zip(pixels, targets.tolist()):
        gap = (wanted[target] - image).abs().flatten(1).amax(1)
        assert gap.min() < 1e-5
    kept = task.train.take(4, seed=1)
    assert isinstance(kept, Pixels)
    assert kept[:][0].shape == (4, 3, 16, 16)
    assert task.train[0][0].shape == (3, 16, 16)


def test_the_usual_eight_by_their_short_names(monkeypatch, clip, pictures):
    load, asked = hub._load, []
    monkeypatch.setattr(hub, "_load", lambda source: (asked.append(source), load(str(pictures)))[1])
    found = hub_image_suite(processor=load_processor(clip), train=3, validation=3, test=3)
    assert list(found) == list(hub.CLIP_TASKS)
    assert asked == list(hub.CLIP_TASKS.values())
    assert list(hub_image_suite(["dtd"], processor=load_processor(clip))) == ["dtd"]


def test_clip_gives_its_own_zero_shot_answers(suite, clip):
    model = MultiTaskModel(ClipImageEncoder(clip), clip_heads(clip, suite)).eval()
    whole, words = transformers.CLIPModel.from_pretrained(clip).eval(), load_tokenizer(clip)
    pixels, _ = suite["colours"].test[:]
    texts = [f"a photo of a {name}." for name in ("blue", "deep red", "green")]
    with torch.no_grad():
        inputs = words(texts, padding=True, return_tensors="pt")
        want = whole(
            pixel_values=pixels, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits_per_image
        assert torch.allclose(model(pixels, "colours"), want, atol=1e-4)
    named = ar.Suite([ar.Task("dtd", *[suite["colours"].test] * 3, outputs=3, classes=suite["colours"].classes)])
    usual, own = clip_heads(clip, named), clip_heads(clip, named, prompt="a photo of a {} texture.")
    assert torch.equal(usual["dtd"].weight, own["dtd"].weight)
    assert not torch.equal(usual["dtd"].weight, model.heads["colours"].weight)
    with pytest.raises(ar.InputError, match="a prompt has one"):
        clip_heads(clip, suite, prompt="a photo")


def test_the_projection_stays_and_the_tower_is_trained(suite, clip):
    model = MultiTaskModel(ClipImageEncoder(clip), clip_heads(clip, suite))
    encoder = model.backbone
    assert all(name.startswith("vision_model.") for name in encoder.state_dict())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    head, projection = model.heads["colours"].weight.clone(), encoder.projection.clone()
    expert = ar.fit(model, suite, steps=40, lr=3e-3, batch_size=12)
    assert score(expert, suite, split="train")["colours"] > 0.8
    assert torch.equal(encoder.projection, projection)
    assert torch.equal(expert.heads["colours"].weight, head)
    assert not torch.equal(encoder.state_dict()["vision_model.post_layernorm.weight"], before["vision_model.post_layernorm.weight"])  # fmt: skip  # noqa: E501


def test_a_merged_tower_is_a_whole_clip_again(suite, clip, tmp_path):
    encoder = ClipImageEncoder(clip).eval()
    base = encoder.state_dict()
    merged = ar.merging.average({"a": perturbed(base, 1), "b": perturbed(base, 2)})
    save(encoder.checkpoint(merged), tmp_path / "merged", like=clip)
    whole = transformers.CLIPModel.from_pretrained(tmp_path / "merged").eval()
    before = transformers.CLIPModel.from_pretrained(clip)
    assert torch.equal(whole.text_projection.weight, before.text_projection.weight)
    assert torch.equal(whole.logit_scale, before.logit_scale)
    here = ar.load_weights(copy.deepcopy(encoder), merged)
    pixels, _ = suite["colours"].test[:]
    with torch.no_grad():
        features = F.normalize(whole.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        assert torch.allclose(here(pixels), features, atol=1e-5)
        assert not torch.allclose(encoder(pixels), features, atol=1e-3)
        assert torch.allclose(ClipImageEncoder(tmp_path / "merged").eval()(pixels), features, atol=1e-5)


def test_a_tower_alone_is_no_clip(clip, tmp_path):
    transformers.CLIPModel.from_pretrained(clip).vision_model.save_pretrained(tmp_path / "tower")
    with pytest.raises(ar.InputError, match=r"cannot be loaded as CLIPModel|lacks"):
        ClipImageEncoder(tmp_path / "tower")
