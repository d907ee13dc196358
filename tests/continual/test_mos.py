"""MOS: merging, alignment and retrieval against slow references, and what its reference code got wrong."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.continual.driver import learn
from allrounder.continual.gaussian_stats import GaussianStats
from allrounder.continual.learner import Batch, TaskInfo, check
from allrounder.continual.mos import MOS
from allrounder.continual.simple_cil import SimpleCIL
from allrounder.continual.stream import hide, split_by_class
from allrounder.errors import InputError
from allrounder.state import load_state, save_state
from allrounder.task import Examples, Task

WIDTH, CLASSES = 12, 6


class Blocks(nn.Module):
    """Two residual blocks on vectors, frozen and random."""

    def __init__(self, seed=0, width=WIDTH):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            linear = nn.Linear(width, width, device="meta").to_empty(device="cpu")
            for value in linear.parameters():
                value.data = 0.3 * torch.randn(value.shape, generator=generator)
            self.blocks.append(linear)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).relu()
        return x


class Vectors(nn.Module):
    """Tokens `(B, T, d)` to their mean after two blocks."""

    def __init__(self):
        super().__init__()
        self.inner = Blocks()

    def forward(self, inputs):
        return self.inner(inputs["tokens"]).mean(1)


PLACES = [("blocks.0", "blocks.0"), ("blocks.1", "blocks.1")]


def clusters(seed=0, each=12, noise=0.6):
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, WIDTH, generator=generator)

    def part(count):
        targets = torch.arange(CLASSES).repeat_interleave(count)
        return Examples(centres[targets] + noise * torch.randn(len(targets), WIDTH, generator=generator), targets)

    return Task("clusters", part(each), part(4), part(8), outputs=CLASSES)


def learner(backbone=None, **changed):
    settings = {
        "epochs": 3, "rank": 3, "lr": 0.05, "weight_decay": 0.0, "dropout": 0.0, "align_epochs": 5, "align_lr": 0.05,
        "replay": 12, "places": PLACES,
    } | changed  # fmt: skip
    return MOS(backbone or Blocks(), CLASSES, **settings)


def stream(groups=2):
    return split_by_class(clusters(), groups)


def trained(groups=2, **changed):
    made = learner(**changed)
    learn(made, stream(groups), epochs=3, batch_size=8)
    return made


def info(classes, seed=0, number=0):
    task = clusters(seed)
    rows = torch.isin(task.train.targets, torch.tensor(classes)).nonzero().flatten()
    return TaskInfo(number, tuple(classes), [Batch(*task.train[rows])])


def run_task(made, classes, steps=2):
    boundary = info(classes)
    made.begin_task(boundary)
    for _ in range(steps):
        made.observe(boundary.batches[0])
    made.end_task(boundary)


@pytest.fixture(scope="module")
def mos():
    return trained()


@pytest.fixture(scope="module")
def inputs():
    return clusters(1).test.inputs


# adapters and merging


def test_merging_without_gradient_has_its_closed_form():
    made = learner(merge=0.1)
    run_task(made, [0, 1])
    run_task(made, [2, 3])
    made.begin_task(info([4, 5]))
    start = {name: torch.randn_like(value) for name, value in made.adapter.items()}
    made.adapter.load_state_dict(start)
    mean = {name: value.mean(0) for name, value in made.stored.items()}
    own = {1: 0.9, 10: 0.3487, 100: 2.7e-5}
    for step in range(1, 101):
        made.merge_step()
        if step in own:
            share = 0.9**step
            assert share == pytest.approx(own[step], rel=0.02)
            for name, value in made.adapter.items():
                torch.testing.assert_close(
                    value.detach(), share * start[name] + (1 - share) * mean[name], atol=1e-5, rtol=1e-5
                )


def test_a_step_is_followed_by_one_merge_with_the_mean_of_all_earlier_adapters():
    made, plain = learner(merge=0.25), learner(merge=0.0)
    for one in (made, plain):
        run_task(one, [0, 1])
        run_task(one, [2, 3])
    plain.load_state_dict(copy.deepcopy(made.state_dict()))
    boundary = info([4, 5])
    for one in (made, plain):
        one.begin_task(boundary)
        one.observe(boundary.batches[0])
    for name, value in made.adapter.items():
        expected = 0.75 * plain.adapter[name] + 0.25 * (made.stored[name][0] + made.stored[name][1]) / 2
        torch.testing.assert_close(value, expected)


def test_the_first_task_never_merges_and_zero_is_the_identity():
    whole, none = learner(merge=0.5), learner(merge=0.0)
    for made in (whole, none):
        run_task(made, [0, 1])
    assert all(torch.equal(whole.stored[name], none.stored[name]) for name in whole.stored)
    before = {name: value.detach().clone() for name, value in none.adapter.items()}
    none.begin_task(info([2, 3]))
    none.merge_step()
    assert all(torch.equal(none.adapter[name], value) for name, value in before.items())


def test_a_new_adapter_is_the_frozen_backbone():
    made, batch = learner(lr=1e-30), info([0, 1]).batches[0]
    run_task(made, [0, 1])
    assert torch.equal(made.features(batch.inputs, 0), made.backbone(batch.inputs))


def test_a_task_begins_at_the_last_adapter_and_stored_ones_never_change():
    made = learner()
    run_task(made, [0, 1])
    assert all(torch.equal(made.adapter[name], value[0]) for name, value in made.stored.items())
    first = {name: value[0].clone() for name, value in made.stored.items()}
    run_task(made, [2, 3])
    assert all(torch.equal(made.stored[name][0], value) for name, value in first.items())
    assert not torch.equal(made.stored["up"][0], made.stored["up"][1])


# pitfalls of the reference code


def test_evaluation_changes_nothing_however_often_and_answers_the_same(mos, inputs):
    before = copy.deepcopy(mos.state_dict())
    answers = [mos.predict(inputs) for _ in range(30)]
    assert all(torch.equal(answers[0], later) for later in answers)
    after = mos.state_dict()
    for part in ("adapter", "head", "stored"):
        assert all(torch.equal(before[part][name], value) for name, value in after[part].items())
    assert torch.equal(before["prototypes"], after["prototypes"])
    assert torch.equal(before["generator"], after["generator"])


def test_forward_passes_merge_nothing_in_training_either(monkeypatch):
    made, merges, passes = learner(merge=0.3), [], []
    run_task(made, [0, 1])
    original = made.merge_step
    monkeypatch.setattr(made, "merge_step", lambda: (merges.append(1), original()))
    handle = made.backbone.register_forward_hook(lambda *_: passes.append(1))
    made.begin_task(info([2, 3]))
    inputs = info([2, 3]).batches[0].inputs
    before = {name: value.detach().clone() for name, value in made.adapter.items()}
    for _ in range(12):
        made._through(inputs, made.adapter)
    assert all(torch.equal(made.adapter[name], value) for name, value in before.items())
    for _ in range(3):
        made.observe(info([2, 3]).batches[0])
    handle.remove()
    assert (len(merges), len(passes)) == (3, 15)


def test_the_statistics_pass_leaves_the_adapter_as_it_was_stored(mos):
    assert all(torch.equal(mos.adapter[name], value[-1]) for name, value in mos.stored.items())


def test_answers_do_not_depend_on_the_rest_of_the_batch(mos, inputs):
    alone = torch.cat([mos.predict(inputs[row : row + 1]) for row in range(len(inputs))])
    torch.testing.assert_close(mos.predict(inputs), alone, atol=1e-5, rtol=1e-5)


# loss


def test_masked_outputs_get_no_gradient():
    made, boundary = learner(), info([2, 3])
    made.begin_task(boundary)
    before = made.head.weight.detach().clone()
    made.observe(boundary.batches[0])
    outside = [0, 1, 4, 5]
    assert torch.equal(made.head.weight[outside], before[outside])
    assert made.head.weight.grad[outside].abs().max() == 0
    assert (made.head.weight[[2, 3]] != before[[2, 3]]).any()


def test_the_step_is_gradient_descent_on_the_loss_as_written():
    """An own implementation in autograd: masked CE, R with earlier means, lr a tenth for the head."""
    made = learner(relation=0.4, merge=0.0, weight_decay=0.0)
    run_task(made, [0, 1])
    boundary = info([2, 3])
    made.begin_task(boundary)
    batch = boundary.batches[0]
    a = {name: value.detach().clone().requires_grad_() for name, value in made.adapter.items()}
    w, b = (value.detach().clone().requires_grad_() for value in (made.head.weight, made.head.bias))
    x = batch.inputs
    for i, block in enumerate(made.backbone.blocks):
        hidden = (x @ a["down"][i].T + a["down_bias"][i]).relu()
        adapted = 0.1 * (hidden @ a["up"][i].T + a["up_bias"][i])
        x = x + (block(x) + adapted).relu()  # this place adds before the block's relu
    logits = (x @ w.T + b)[:, [2, 3]]
    rows = torch.cat([made.stats.means[0][None], made.stats.means[1][None], x])
    relation = -(rows @ rows.T / 0.8).log_softmax(1).diagonal().mean()
    loss = F.cross_entropy(logits, batch.targets - 2) + 0.4 * relation
    loss.backward()
    told = made.observe(batch)
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in a.items():
        torch.testing.assert_close(made.adapter[name], value - 0.05 * value.grad)
    torch.testing.assert_close(made.head.weight, w - 0.005 * w.grad)
    torch.testing.assert_close(made.head.bias, b - 0.005 * b.grad)


def test_learning_rates_fall_along_a_cosine_over_the_passes():
    made, boundary = learner(epochs=4), info([0, 1])
    made.begin_task(boundary)
    rates = []
    for repeat in range(4):
        made.observe(Batch(boundary.batches[0].inputs, boundary.batches[0].targets, repeat=repeat))
        rates.append([group["lr"] for group in made.optimiser.param_groups])
    torch.testing.assert_close(torch.tensor(rates)[:, 0], 0.025 * (1 + torch.cos(torch.arange(4) * torch.pi / 4)))
    torch.testing.assert_close(torch.tensor(rates)[:, 1] * 10, torch.tensor(rates)[:, 0])


# statistics and alignment


def test_statistics_are_those_of_the_features_with_the_tasks_own_adapter(mos):
    task = clusters()
    for label in range(CLASSES):
        x = task.train.inputs[task.train.targets == label]
        own, first = mos.features(x, label // 2).double(), mos.features(x, 0)
        torch.testing.assert_close(mos.stats.means[label].double(), own.mean(0), atol=1e-6, rtol=1e-6)
        factor = mos.stats.factors[label].double()
        torch.testing.assert_close(factor @ factor.T, torch.cov(own.T) + 1e-4 * torch.eye(WIDTH), atol=1e-5, rtol=1e-5)
        assert torch.equal(factor, factor.tril())
        torch.testing.assert_close(mos.prototypes[label], first.mean(0), atol=1e-6, rtol=1e-6)


def test_replayed_samples_have_their_class_mean_and_covariance():
    stats, generator = GaussianStats(), torch.Generator().manual_seed(0)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    stats.add(2, torch.randn(40, 5, generator=generator, dtype=torch.float64) @ mix + 3)
    stats.add(0, torch.randn(40, 5, generator=generator, dtype=torch.float64))
    count = 20_000
    features, labels = stats.sample([2, 0], count, generator)
    assert labels.tolist() == [2] * count + [0] * count
    for label in (2, 0):
        drawn = features[labels == label]
        covariance = stats.factors[label] @ stats.factors[label].T
        assert ((drawn.mean(0) - stats.means[label]).abs() < 3 * (covariance.diagonal() / count).sqrt()).all()
        torch.testing.assert_close(torch.cov(drawn.T), covariance, atol=0.05 * covariance.abs().max().item(), rtol=0.05)


def test_diagonal_covariances_keep_variances_and_nothing_else():
    stats, generator = GaussianStats(diagonal=True, ridge=0.5), torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    stats.add(0, features)
    torch.testing.assert_close(stats.factors[0].square(), features.var(0) + 0.5)
    drawn, _ = stats.sample([0], 20_000, generator)
    covariance = torch.cov(drawn.T)
    torch.testing.assert_close(covariance.diagonal(), features.var(0) + 0.5, rtol=0.05, atol=0)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.3
    assert stats.bytes == 2 * 4 * 4


def test_one_cholesky_a_class_in_all(monkeypatch):
    calls, original = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda *args: (calls.append(1), original(*args))[1])
    trained(align_epochs=4)
    assert len(calls) == CLASSES


def test_fewer_examples_than_features_are_enough_with_the_ridge():
    stats = GaussianStats()
    stats.add(0, torch.randn(2, 50, generator=torch.Generator().manual_seed(0)))
    assert stats.factors[0].isfinite().all()
    assert stats.factors[0].diagonal().square().min() >= 0.99e-4


def test_alignment_trains_the_head_alone_and_begins_with_the_second_task():
    aligned, plain = learner(relation=0.0, align_lr=0.5), learner(relation=0.0, align_epochs=0)
    for made in (aligned, plain):
        run_task(made, [0, 1])
    assert torch.equal(aligned.head.weight, plain.head.weight)
    for made in (aligned, plain):
        run_task(made, [2, 3])
    assert not torch.equal(aligned.head.weight[:4], plain.head.weight[:4])
    assert torch.equal(aligned.head.weight[4:], plain.head.weight[4:])  # classes to come
    assert all(torch.equal(aligned.stored[name], value) for name, value in plain.stored.items())


def test_alignment_is_what_keeps_earlier_tasks(mos):
    test = clusters().test
    accuracy = lambda made: (made.predict(test.inputs).argmax(1) == test.targets).double().mean()  # noqa: E731
    assert accuracy(mos) > 0.85
    head_only = lambda made: (made.retrieve(test.inputs).logits.argmax(1) == test.targets).double().mean()  # noqa: E731
    assert head_only(mos) > head_only(trained(align_epochs=0)) + 0.2


# retrieval


def slow_retrieval(made, x, rounds=4):
    """The loop of the card for one example: (adapter, logits, answer)."""
    prototypes = made.prototypes
    features = made.features(x[None], 0)[0]
    cosines = torch.stack([F.cosine_similarity(features, prototypes[c], dim=0) for c in range(CLASSES)])
    b = int(made.task_of[cosines.argmax()])
    for turn in range(rounds):
        z = made.head(made.features(x[None], b))[0]
        named = int(made.task_of[z.argmax()])
        if named == b or turn == rounds - 1:
            break
        b = named
    return b, z, z.softmax(0) + (made.tasks * cosines).softmax(0)


def restless(mos, seed=0):
    """A learner whose head often names another task."""
    made = copy.deepcopy(mos)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.head.weight.copy_(torch.randn(made.head.weight.shape, generator=generator))
        for value in made.stored.values():
            value.copy_(2 * torch.randn(value.shape, generator=generator))
    return made


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_retrieval_in_batches_is_the_loop_over_examples(mos, inputs, seed, rounds):
    made = mos if seed is None else restless(mos, seed)
    found = made.retrieve(inputs, rounds)
    for row, x in enumerate(inputs):
        adapter, logits, answer = slow_retrieval(made, x, rounds)
        assert found.adapter[row] == adapter
        torch.testing.assert_close(found.logits[row], logits, atol=1e-4, rtol=1e-4)
        if rounds == 4:
            torch.testing.assert_close(made.predict(inputs)[row], answer, atol=1e-5, rtol=1e-4)


def test_retrieval_needs_a_round(mos, inputs):
    with pytest.raises(InputError, match="rounds is at least 1, got 0"):
        mos.retrieve(inputs, 0)


def test_retrieval_ends_at_a_fixed_point_or_after_the_fourth_round(mos, inputs):
    for seed in range(6):
        made = restless(mos, seed)
        found, later = made.retrieve(inputs), made.retrieve(inputs, 5)
        named = made.task_of[found.logits.argmax(1)]
        fixed = named == found.adapter
        assert torch.equal(found.adapter[fixed], later.adapter[fixed])
        torch.testing.assert_close(found.logits, made.logits(inputs, found.adapter), atol=1e-4, rtol=1e-4)
        if (~fixed).any():
            return  # one that did not come to rest was met
    pytest.fail("every example came to rest: the fourth round was never reached")


def test_no_pair_of_example_and_adapter_is_computed_twice(mos, inputs):
    made, seen = restless(mos), []
    original = made._through

    def noted(given, adapters, which=None, dropout=0.0):
        single = (
            None
            if which is not None
            else [torch.equal(adapters["up"], made.stored["up"][k]) for k in range(made.tasks)]
        )
        rows = [(inputs == x).all(1).nonzero().item() for x in given]
        used = which.tolist() if single is None else [single.index(True)] * len(rows)
        seen.extend(zip(rows, used, strict=True))
        return original(given, adapters, which, dropout)

    made._through = noted
    found = made.retrieve(inputs)
    assert len(seen) == len(set(seen)) == found.passes
    assert len(inputs) < found.passes <= made.tasks * len(inputs)


def test_a_head_that_names_the_right_task_finds_the_oracle_adapter(mos, inputs):
    made = copy.deepcopy(mos)
    with torch.no_grad():
        made.head.weight.zero_()
        made.head.bias.copy_(torch.eye(CLASSES)[4])  # task 2, whatever the features
    found = made.retrieve(inputs)
    assert found.adapter.eq(2).all()
    assert torch.equal(found.logits, made.logits(inputs, 2))


def test_with_one_task_it_is_the_adapter_and_the_ensemble(inputs):
    made = learner()
    run_task(made, [0, 1, 2, 3, 4, 5])
    features = made.features(inputs, 0)
    cosines = F.normalize(features) @ F.normalize(made.prototypes).T
    torch.testing.assert_close(made.predict(inputs), made.head(features).softmax(1) + cosines.softmax(1))
    assert made.retrieve(inputs).passes == len(inputs)


def test_dicts_of_tokens_go_through_retrieval():
    places = [("inner.blocks.0", "inner.blocks.0"), ("inner.blocks.1", "inner.blocks.1")]
    made, task = learner(Vectors(), places=places), clusters()
    for number, classes in enumerate(([0, 1], [2, 3])):
        rows = torch.isin(task.train.targets, torch.tensor(classes)).nonzero().flatten()
        x, y = task.train[rows]
        boundary = TaskInfo(number, tuple(classes), [Batch({"tokens": x.unsqueeze(1).expand(-1, 3, -1)}, y)])
        made.begin_task(boundary)
        made.observe(boundary.batches[0])
        made.end_task(boundary)
    tokens = {"tokens": task.test.inputs.unsqueeze(1).expand(-1, 3, -1)}
    for seed in range(3):
        found = restless(made, seed).retrieve(tokens)
        assert found.logits.shape == (len(task.test), CLASSES)
    assert (made.predict(tokens)[:, 4:] == float("-inf")).all()


# protocol


def test_same_seed_same_result_and_another_seed_another(mos, inputs):
    assert torch.equal(trained().predict(inputs), mos.predict(inputs))
    assert not torch.equal(trained(seed=1).predict(inputs), mos.predict(inputs))


def test_the_backbone_is_frozen_and_left_as_it_was(mos):
    assert not any(p.requires_grad for p in mos.backbone.parameters())
    assert all(torch.equal(value, Blocks().state_dict()[name]) for name, value in mos.backbone.state_dict().items())
    assert mos.backbone.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in mos.backbone.modules())


def test_float64_backbones_are_learned_in_float64():
    made = learner(Blocks().double())
    task = clusters()
    boundary = TaskInfo(0, (0, 1), [Batch(task.train.inputs[:24].double(), task.train.targets[:24])])
    made.begin_task(boundary)
    made.observe(boundary.batches[0])
    made.end_task(boundary)
    assert made.predict(task.test.inputs.double()).dtype == torch.float64


def test_state_goes_through_a_file_and_training_goes_on_the_same(tmp_path, inputs):
    one, other = learner(), learner(seed=5)
    run_task(one, [0, 1])
    run_task(one, [2, 3])
    save_state(one.state_dict(), tmp_path / "state")
    other.load_state_dict(load_state(tmp_path / "state"))
    assert torch.equal(one.predict(inputs), other.predict(inputs))
    for made in (one, other):
        run_task(made, [4, 5])
    assert torch.equal(one.predict(inputs), other.predict(inputs))
    assert one.held() == other.held()
    assert one.held()["adapters"] == 3 * sum(value.numel() for value in one.adapter.values()) * 4
    assert one.held()["class means and covariances"] == CLASSES * (WIDTH**2 + WIDTH) * 4


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, inputs, mos):
    class StoppedError(Exception):
        pass

    def stop(name, done, total):
        if name.endswith("-2"):
            raise StoppedError

    with pytest.raises(StoppedError):
        learn(learner(), stream(), epochs=3, batch_size=8, folder=tmp_path, progress=stop)
    again = learner()
    learn(again, stream(), epochs=3, batch_size=8, folder=tmp_path)
    assert torch.equal(again.predict(inputs), mos.predict(inputs))


def test_a_checkpoint_of_one_learner_is_not_continued_with_another(tmp_path):
    learn(learner(), stream(), epochs=3, batch_size=8, folder=tmp_path)
    with pytest.raises(InputError, match="learner 'MOS', this one has 'SimpleCIL'"):
        learn(SimpleCIL(Blocks(), CLASSES), stream(), epochs=3, batch_size=8, folder=tmp_path)
    with pytest.raises(InputError, match=r"merge 0\.1, this one has 0\.0"):
        learn(learner(merge=0.0), stream(), epochs=3, batch_size=8, folder=tmp_path)
    saved = load_state(tmp_path / "learner.safetensors")["learner"]
    with pytest.raises(InputError, match="does not fit SimpleCIL"):
        SimpleCIL(Blocks(), CLASSES).load_state_dict(saved)
    with pytest.raises(InputError, match="'prototypes' is in one of them only|'adapter' is in one"):
        learner().load_state_dict(SimpleCIL(Blocks(), CLASSES).state_dict())
    with pytest.raises(InputError, match="made with other settings"):
        learner(rank=4).load_state_dict(saved)


def test_a_class_that_comes_again_is_overwritten_and_said():
    made = learner()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_task(made, [0, 1])
    with pytest.warns(UserWarning, match="class 1 comes again"):
        run_task(made, [1, 2])
    assert made.task_of.tolist() == [0, 1, 1, -1, -1, -1]
    assert len(made.stats.means) == 3


def test_wrong_input_is_named(inputs):
    with pytest.raises(InputError, match=r"merge is a share within \[0, 1\)"):
        learner(merge=1.0)
    with pytest.raises(InputError, match="merge"):
        learner(merge=-0.1)
    with pytest.raises(InputError, match="no token blocks"):
        MOS(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), 4, epochs=1)
    with pytest.raises(InputError, match="learning rates"):
        learner(lr=0.0)
    with pytest.raises(InputError, match="epochs and replay"):
        learner(replay=0)
    with pytest.raises(InputError, match="ridge"):
        learner(ridge=0.0)
    for offer in ("boundaries", "class_list"):
        with pytest.raises(InputError, match="MOS"):
            check(learner(), hide(stream(), offer))
    made = learner()
    batch = info([0, 1]).batches[0]
    with pytest.raises(InputError, match="finished no task"):
        made.predict(inputs)
    with pytest.raises(InputError, match="begin_task"):
        made.observe(batch)
    with pytest.raises(InputError, match="no task to end"):
        made.end_task(info([0, 1]))
    with pytest.raises(InputError, match="classes of a task"):
        made.begin_task(TaskInfo(0, None, [batch]))
    with pytest.raises(InputError, match="class 1 has 1 examples"):
        made.begin_task(TaskInfo(0, (0, 1), [Batch(batch.inputs[:13], batch.targets[:13])]))
    with pytest.raises(InputError, match="target 1, which is not among"):
        made.begin_task(TaskInfo(0, (0,), [batch]))
    with pytest.raises(InputError, match="outputs 0 to 5"):
        made.begin_task(TaskInfo(0, (0, 1), [Batch(batch.inputs, batch.targets + 5)]))
    made.begin_task(info([0, 1]))
    with pytest.raises(InputError, match="told of 3 passes"):
        made.observe(Batch(batch.inputs, batch.targets, repeat=3))
    with pytest.raises(InputError, match="the loss is nan"):
        made.observe(Batch(batch.inputs * float("nan"), batch.targets))
    made.end_task(info([0, 1]))
    with pytest.raises(InputError, match="adapters 0 to 0, one for each finished task; got 1"):
        made.features(inputs, 1)
    with pytest.raises(InputError, match="give features="):
        run_task(learner(features=5), [0, 1])
    stats = GaussianStats()
    with pytest.raises(InputError, match="at least 2 examples"):
        stats.add(0, torch.zeros(1, 3))
    with pytest.raises(InputError, match="not all finite"):
        stats.add(0, torch.full((2, 3), float("nan")))
    stats.add(0, torch.eye(3))
    with pytest.raises(InputError, match="has 4 features"):
        stats.add(1, torch.eye(4))
    with pytest.raises(InputError, match="class 1 was not added"):
        stats.sample([1], 3, torch.Generator())
