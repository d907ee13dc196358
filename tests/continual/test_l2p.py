"""L2P: which prompts an example takes, what it reads of them, and how it is trained."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.continual.driver import learn
from allrounder.continual.l2p import L2P
from allrounder.continual.learner import Batch, TaskInfo, check
from allrounder.continual.stream import hide, split_by_class
from allrounder.errors import InputError
from allrounder.state import load_state, save_state
from allrounder.task import Examples, Task

transformers = pytest.importorskip("transformers")

CLASSES = 4


class Sentence(nn.Module):
    """A small random BERT and the mean over its mask, with dropout that must stay off."""

    def __init__(self):
        super().__init__()
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "initializer_range": 0.3,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = transformers.BertModel(
                transformers.BertConfig(vocab_size=30, **sizes), add_pooling_layer=False
            )

    def forward(self, inputs):
        mask = inputs["attention_mask"]
        states = self.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def texts():
    """Four classes, each with three words of its own, at random lengths."""
    generator = torch.Generator().manual_seed(0)

    def part(each):
        targets = torch.arange(CLASSES).repeat_interleave(each)
        words = 3 * targets.unsqueeze(1) + torch.randint(1, 4, (len(targets), 6), generator=generator)
        lengths = torch.randint(3, 7, (len(targets), 1), generator=generator)
        mask = (torch.arange(6) < lengths).long()
        return Examples({"input_ids": words * mask, "attention_mask": mask}, targets)

    return Task("texts", part(12), part(4), part(8), outputs=CLASSES)


def learner(backbone=None, **changed):
    return L2P(backbone or Sentence(), CLASSES, **({"pool": 6, "length": 2, "select": 3, "lr": 0.02} | changed))


@pytest.fixture(scope="module")
def trained():
    made = learner()
    learn(made, split_by_class(texts(), 2), epochs=3, batch_size=8)
    return made


@pytest.fixture
def divided(trained, inputs):
    """The same with keys that examples do not agree on."""
    made = copy.deepcopy(trained)
    with torch.no_grad():
        queries = made.backbone.eval()(inputs)
        made.backbone.train()
        made.model["key"].copy_((queries - queries.mean(0))[:: len(queries) // 6][:6])
    assert len({tuple(row.sort().values.tolist()) for row in made.choose(inputs)[0]}) > 4
    return made


@pytest.fixture(scope="module")
def inputs():
    return texts().test.inputs


def test_an_example_takes_the_prompts_whose_keys_are_most_like_its_query(divided, inputs):
    chosen, cosines = divided.choose(inputs)
    with torch.no_grad():
        query = divided.backbone.eval()(inputs)
    divided.backbone.train()
    expected = F.cosine_similarity(query.unsqueeze(1), divided.model["key"].unsqueeze(0), dim=-1)
    assert torch.equal(chosen.sort(1).values, expected.argsort(1, descending=True)[:, :3].sort(1).values)
    torch.testing.assert_close(cosines, expected.gather(1, chosen))


def test_answers_are_the_head_on_the_mean_output_of_the_chosen_prompts(divided, inputs):
    """An own forward pass of the encoder's parts, one example at a time."""
    made, model = divided, divided.backbone.eval().model
    chosen, _ = made.choose(inputs)
    with torch.no_grad():
        for row in range(4):
            length = int(inputs["attention_mask"][row].sum())
            words = model.embeddings(inputs["input_ids"][row : row + 1, :length])
            prompts = made.model["prompts"][chosen[row]].flatten(0, 1).unsqueeze(0)
            states = torch.cat([words[:, :1], prompts, words[:, 1:]], 1)
            for layer in model.encoder.layer:
                states = layer(states)
            pooled = states[0, 1 : 1 + 3 * 2].mean(0)
            logits = pooled @ made.model["weight"].T + made.model["bias"]
            torch.testing.assert_close(made.predict(inputs)[row], logits, atol=1e-5, rtol=1e-4)
    made.backbone.train()


def test_answers_do_not_depend_on_the_rest_of_the_batch(divided, inputs):
    one = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(6)]
    alone = torch.cat([divided.predict(some) for some in one])
    torch.testing.assert_close(divided.predict(inputs)[:6], alone, atol=1e-5, rtol=1e-4)


def test_keys_move_by_the_pull_alone_towards_the_queries():
    task = texts()
    batch = Batch(*task.train[:12])
    for pull in (0.0, 0.1):
        made = learner(pull=pull)
        made.begin_task(TaskInfo(0, (0, 1), [batch]))
        keys, chosen = made.model["key"].detach().clone(), made.choose(batch.inputs)
        made.observe(batch)
        moved = (made.model["key"] != keys).any(1)
        if pull == 0:
            assert not moved.any()
        else:
            assert set(moved.nonzero().flatten().tolist()) == set(chosen[0].unique().tolist())
            with torch.no_grad():
                made.backbone.eval()
                queries = F.normalize(made.backbone(batch.inputs), dim=1)
            cosines = queries @ F.normalize(made.model["key"].detach(), dim=1).T
            assert cosines.gather(1, chosen[0]).mean() > chosen[1].mean()


def test_the_loss_is_masked_to_the_tasks_classes():
    made = learner()
    batch = Batch(*texts().train[:24])
    made.begin_task(TaskInfo(0, (0, 1), [batch]))
    before = made.model["weight"].detach().clone()
    with torch.no_grad():
        logits, cosines = made.answer(batch.inputs)
    told = made.observe(batch)
    expected = F.cross_entropy(logits[:, :2], batch.targets) - 0.1 * cosines.mean()
    assert told["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(made.model["weight"][2:], before[2:])
    assert made.gradients == 24


def test_it_learns_a_task_and_leaves_the_backbone_alone(trained):
    fresh = Sentence().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in trained.backbone.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in trained.backbone.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.backbone.modules())
    made, task = learner(), texts()
    learn(made, split_by_class(task, CLASSES), epochs=6, batch_size=8)
    assert (made.predict(task.test.inputs).argmax(1) == task.test.targets).double().mean() > 0.8


def test_state_goes_through_a_file_and_holds_no_backbone(tmp_path, trained, inputs):
    save_state(trained.state_dict(), tmp_path / "state")
    other = learner(seed=3)
    other.load_state_dict(load_state(tmp_path / "state"))
    assert torch.equal(other.predict(inputs), trained.predict(inputs))
    assert set(trained.state_dict()["model"]) == {"prompts", "key", "weight", "bias"}


def test_same_seed_same_result_and_predict_changes_nothing(trained, inputs):
    again = learner()
    learn(again, split_by_class(texts(), 2), epochs=3, batch_size=8)
    before = copy.deepcopy(again.state_dict()["model"])
    assert torch.equal(again.predict(inputs), trained.predict(inputs))
    assert torch.equal(again.predict(inputs), trained.predict(inputs))
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict()["model"].items())


def test_a_vision_transformer_takes_prompts_too():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
                self.vit = transformers.ViTModel(config, add_pooling_layer=False)

        def forward(self, pixels):
            return self.vit(pixel_values=pixels).last_hidden_state[:, 0]

    made = learner(Vision())
    batch = Batch(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1]))
    made.begin_task(TaskInfo(0, (0, 1), [batch]))
    first = made.observe(batch)["loss"]
    for _ in range(10):
        last = made.observe(batch)["loss"]
    assert last < first
    assert made.predict(batch.inputs)[:, 2:].eq(float("-inf")).all()


def test_wrong_input_is_named(inputs):
    with pytest.raises(InputError, match="select is 1 to pool"):
        learner(select=7)
    with pytest.raises(InputError, match="no transformers encoder"):
        learner(nn.Linear(3, 3))
    with pytest.raises(InputError, match="no class yet"):
        learner().predict(inputs)
    with pytest.raises(InputError, match="give features="):
        learner(features=5).choose(inputs)
    for offer in ("boundaries", "class_list"):
        with pytest.raises(InputError, match="L2P"):
            check(learner(), hide(split_by_class(texts(), 2), offer))
