"""The `compress` verbs, from a shell's point of view: small models made on the spot, folders in and out."""

import json

import pytest
import torch
from typer.testing import CliRunner

from allrounder.cli import app
from allrounder.errors import InputError

pytest.importorskip("transformers")
runner = CliRunner()


def invoke(*words):
    result = runner.invoke(app, ["compress", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A ResNet folder whose running statistics were updated."""
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("resnet")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(
            num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model = ResNetForImageClassification(config).train()
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(16, 3, 32, 32) * 1.5 + 0.3)
    model.eval().save_pretrained(folder)
    return folder


def test_genie_from_folder_to_folder(resnet, tmp_path):
    found = invoke(
        "genie", resnet, "--out", tmp_path / "small", "--image-shape", "3,32,32", "--count", 16, "--image-steps", 3,
        "--image-batch", 8, "--steps", 3, "--batch-size", 8, "--json",
    )  # fmt: skip
    account = json.loads(found.stdout)
    assert account["weights"] == account["activations"] == 4
    assert account["bytes"]["after"] < account["bytes"]["before"] / 3
    from allrounder.compression import QuantizedNetwork

    small = QuantizedNetwork.load(tmp_path / "small")
    assert small(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).shape == (2, 3)


def test_d_pruner_from_folder_to_folder(tmp_path):
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(30)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<pad>", *words])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<pad>")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "general.txt").write_text(" ".join(words[i % 20] for i in range(400)))
    (tmp_path / "domain.txt").write_text(" ".join(words[10 + i * 7 % 20] for i in range(400)))
    found = invoke(
        "d-pruner", tmp_path / "lm", "--out", tmp_path / "pruned", "--general", tmp_path / "general.txt", "--domain",
        tmp_path / "domain.txt", "--length", 16, "--rows", 4, "--examples", 4, "--epochs", 1, "--json",
    )  # fmt: skip
    account = json.loads(found.stdout)
    assert all(abs(share - 0.5) < 0.01 for share in account["sparsity"].values())
    again = LlamaForCausalLM.from_pretrained(tmp_path / "pruned")
    weight = again.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_errors_are_sentences_and_leave_nothing(resnet, tmp_path):
    with pytest.raises(InputError, match="image-shape is channels,height,width"):
        invoke("genie", resnet, "--out", tmp_path / "a", "--image-shape", "224")
    with pytest.raises(InputError, match="does not exist"):
        invoke("genie", tmp_path / "none", "--out", tmp_path / "a")
    with pytest.raises(InputError, match="needs a general and a domain text"):
        invoke("d-pruner", resnet, "--out", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        invoke("genie", resnet, "--out", tmp_path / "full")
    with pytest.raises(InputError, match=r"no \.jsonl"):
        invoke("ernie-tiny", resnet, "--out", tmp_path / "a", "--task", tmp_path / "task.csv")
    assert not (tmp_path / "a").exists()
