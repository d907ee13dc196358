"""Masks, the report, and the models that are refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import allrounder as ar
from allrounder.compression.pruning import keep_mask, prune_by
from allrounder.compression.pruning_baselines import magnitude, wanda
from allrounder.compression.pruning_layers import blocks_of, matrices
from allrounder.compression.sparsegpt import sparsegpt
from allrounder.nets import CausalTransformer

STRUCTURES = ("matrix", "row", "block", "2:4")


def small(**options):
    return CausalTransformer(30, **({"width": 16, "depth": 2, "heads": 2} | options))


def text(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(30, (4, 12), generator=generator) for _ in range(count)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.52, 0.9, 0.99])
def test_a_matrix_loses_its_share_to_within_one_weight(sparsity):
    scores = drawn(37, 53)
    lost = (~keep_mask(scores, sparsity)).sum().item()
    assert abs(lost - sparsity * scores.numel()) <= 1
    assert scores[keep_mask(scores, sparsity)].min() >= scores.flatten().sort().values[lost - 1 if lost else 0]


def test_ties_do_not_change_the_count():
    for structure in ("matrix", "row", "block"):
        assert keep_mask(torch.zeros(8, 64), 0.25, structure).sum() == 0.75 * 512
    assert keep_mask(torch.ones(3, 8), 0.5, "2:4").view(3, 2, 4).sum(-1).eq(2).all()


def test_rows_are_compared_by_themselves():
    scores = drawn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    keep = keep_mask(scores, 0.3, "row")
    assert keep.sum(1).eq(28).all()
    for row, kept in zip(scores, keep, strict=True):
        assert row[kept].min() > row[~kept].max()


def test_column_blocks_are_compared_by_themselves_and_one_block_is_plain():
    scores = drawn(8, 64) * torch.logspace(-3, 3, 64)
    keep = keep_mask(scores, 0.5, "block")  # 32 blocks of 2 columns
    assert keep.view(8, 32, 2).sum((0, 2)).eq(8).all()
    assert torch.equal(keep_mask(scores, 0.5, "block", blocks=1), keep_mask(scores, 0.5))
    wide = keep_mask(drawn(4, 4096), 0.5, "block")
    assert wide.view(4, 32, 128).sum((0, 2)).eq(256).all()  # the card: width 128 for 4096


def test_two_of_four_keeps_the_best_two_of_each_four():
    scores = drawn(5, 12)
    keep = keep_mask(scores, 0.5, "2:4").view(5, 3, 4)
    assert keep.sum(-1).eq(2).all()
    fours = scores.view(5, 3, 4)
    assert torch.equal(fours.masked_fill(~keep, 0).sum(-1), fours.sort().values[..., 2:].sum(-1))


def test_magnitude_removes_the_smallest_weights_and_nothing_else():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = magnitude(model, 0.4)
    names = set(result.sparsity)
    assert names == {name for name in before if name.startswith("blocks.") and "norm" not in name}
    for name, value in model.state_dict().items():
        if name not in names:
            assert torch.equal(value, before[name])
            continue
        lost = value == 0
        assert abs(lost.sum().item() - 0.4 * value.numel()) <= 1
        assert torch.equal(value[~lost], before[name][~lost])
        assert before[name][lost].abs().max() <= before[name][~lost].abs().min()


def test_the_result_counts_and_says_that_zeros_are_not_faster():
    model = small()
    result = magnitude(model, 0.5)
    weights = sum(m.weight.numel() for m in matrices(model))
    everything = sum(p.numel() for p in model.parameters())
    assert result.overall == pytest.approx(0.5 * weights / everything)
    assert result.dense_bytes == 4 * weights
    assert result.sparse_bytes == weights // 8 + 2 * weights
    assert "do not make dense products faster" in str(result)
    assert "2:4 zeros are faster only on kernels" in str(magnitude(small(), structure="2:4"))
    assert result.model is model
    assert result.covered > 0.95


def test_scores_must_fit_and_nothing_changes_when_they_do_not():
    model = small()
    scores = {m.name: m.weight.abs() for m in matrices(model)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, *_, last = scores
    with pytest.raises(ar.InputError, match=f"lack '{first}'"):
        prune_by(model, {name: value for name, value in scores.items() if name != first})
    with pytest.raises(ar.InputError, match="are for 'zzz'"):
        prune_by(model, scores | {"zzz": scores[first]})
    with pytest.raises(ar.InputError, match=r"are \(3, 3\), its weight is"):
        prune_by(model, scores | {last: torch.ones(3, 3)})
    with pytest.raises(ar.InputError, match=f"'{last}' are not finite"):
        prune_by(model, scores | {last: scores[last] * torch.nan})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "prune", [magnitude, lambda m, *a: wanda(m, text(), *a), lambda m, *a: sparsegpt(m, text(), *a)]
)
def test_sparsity_and_structure_are_checked_by_every_verb(prune):
    with pytest.raises(ar.InputError, match=r"got 52; did you mean 0\.52"):
        prune(small(), 52)
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ar.InputError, match="0 <= sparsity < 1"):
            prune(small(), bad)
    with pytest.raises(ar.InputError, match="structure is one of matrix, row, block, 2:4, got 'unit'"):
        prune(small(), 0.5, "unit")
    with pytest.raises(ar.InputError, match=r"2:4 is a sparsity of 0\.5, got 0\.6"):
        prune(small(), 0.6, "2:4")
    with pytest.raises(ar.InputError, match=r"needs inputs in fours, 'blocks\.0.*is \(6, 6\)"):
        prune(small(width=6, heads=1), 0.5, "2:4")


def test_masks_refuse_what_is_no_score():
    with pytest.raises(ar.InputError, match="scores are a matrix"):
        keep_mask(torch.ones(3), 0.5)
    with pytest.raises(ar.InputError, match="not finite"):
        keep_mask(torch.full((2, 2), torch.nan), 0.5)
    with pytest.raises(ar.InputError, match="blocks is at least 1"):
        keep_mask(torch.ones(2, 2), 0.5, "block", blocks=0)


def test_tied_layers_are_named():
    model = small()
    model.blocks[1].attention.key.weight = model.blocks[0].attention.key.weight
    with pytest.raises(ar.InputError, match=r"'blocks\.0\.attention\.key\.weight' is tied to 'blocks\.1"):
        magnitude(model)
    model = small()
    model.blocks[1] = model.blocks[0]
    with pytest.raises(ar.InputError, match="one and the same module"):
        magnitude(model)
    assert magnitude(small(tied=True)).overall > 0.4  # a head tied to the embedding is no matter: both are left alone


class Int8Linear(nn.Module):
    """A quantised layer as libraries make them: shaped like a linear one, with integers inside."""

    def __init__(self, size):
        super().__init__()
        self.in_features = self.out_features = size
        self.register_buffer("weight", torch.ones(size, size, dtype=torch.int8))


class LoraLinear(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.ModuleDict()


def test_quantised_wrapped_and_empty_layers_are_named():
    model = small()
    model.blocks[1].attention.out = Int8Linear(16)
    with pytest.raises(ar.InputError, match=r"'blocks\.1\.attention\.out' is quantised .*int8"):
        magnitude(model)
    model = small()
    model.blocks[0].attention.query.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ar.InputError, match=r"'blocks\.0\.attention\.query' is quantised .*uint8"):
        magnitude(model)
    model = small()
    model.blocks[0].attention.value = LoraLinear(model.blocks[0].attention.value)
    with pytest.raises(ar.InputError, match=r"'blocks\.0\.attention\.value' is LoRA-wrapped .*merge the adapter first"):
        magnitude(model)
    model = small()
    nn.utils.parametrizations.weight_norm(model.blocks[0].attention.value)
    with pytest.raises(ar.InputError, match=r"'blocks\.0\.attention\.value' has a parametrised weight"):
        magnitude(model)
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(ar.InputError, match=r"'0\.0' has no data"):
        magnitude(nn.Sequential(model))


def test_models_without_blocks_are_refused():
    with pytest.raises(ar.InputError, match="a Linear has no ModuleList of blocks"):
        magnitude(nn.Linear(4, 4))
    pair = small()
    pair.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ar.InputError, match="an encoder with a decoder"):
        magnitude(pair)


def test_the_largest_outermost_list_is_the_blocks():
    model = nn.Module()
    model.few = nn.ModuleList([nn.Linear(4, 4)])
    model.many = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(3)])
    assert blocks_of(model)[0] == "many"


def test_saving_needs_a_model_of_transformers(tmp_path):
    with pytest.raises(ar.InputError, match="a CausalTransformer has no save_pretrained"):
        magnitude(small()).save(tmp_path / "out")


def test_a_pruned_folder_is_an_ordinary_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    result = magnitude(model, 0.5, "row")
    result.save(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    content = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert content["method"] == "magnitude"
    assert len(content["matrices"]) == 14
    with pytest.raises(ar.InputError, match="not an empty folder"):
        result.save(tmp_path / "out")
