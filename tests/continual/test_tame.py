"""TAME: experts that are made, recalled, left alone, chosen and pruned."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.continual import Batch, Experience, Stream, evaluate, hide, learn, permuted, revisit
from allrounder.continual.change_detection import LossJump
from allrounder.continual.sparse_weights import pack, prune_globally, train_on, unpack
from allrounder.continual.tame import TAME, Switch, expert_accuracies
from allrounder.errors import InputError
from allrounder.nets import mlp
from allrounder.state import load_state, save_state
from allrounder.task import Examples, Task


def blobs(count, seed=0, classes=3, width=12):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))

    def examples(number):
        targets = torch.arange(number) % classes
        noise = 0.15 * torch.randn(number, width, generator=generator)
        return Examples(centres[targets] + noise, targets)

    task = Task("blobs", examples(288), examples(30), examples(90), outputs=classes)
    return hide(permuted(task, count, seed=1), "boundaries", "task_id_train", "class_list")


def expert(seed):
    return mlp([12, 24, 3], seed=seed)


def selector(experts, seed):
    return mlp([12, 24, experts], seed=seed)


def made(outputs=3, **options):
    options = {"buffer": 60, "window": 20, "selector_epochs": 40, "batch_size": 20} | options
    watch = LossJump(math.log(outputs), window=options.pop("window"))
    return TAME(options.pop("expert", expert), options.pop("selector", selector), outputs, detector=watch, **options)


def shown(learner, stream, epochs=5, **options):
    return learn(learner, stream, epochs=epochs, batch_size=16, **options)  # 18 batches a pass, 90 a stretch


@pytest.fixture(scope="module")
def three():
    learner = made()
    return learner, shown(learner, blobs(3))


def batches_of(stream, epochs):
    found = []
    for task in stream:
        generator = torch.Generator().manual_seed(4)
        for epoch in range(epochs):
            rows = torch.randperm(len(task.train), generator=generator).split(16)
            found += [Batch(task.train.inputs[part], task.train.targets[part], repeat=epoch) for part in rows]
    return found


# Experts.


def test_each_task_gets_an_expert_at_the_batch_where_it_begins_and_is_solved(three):
    learner, record = three
    assert learner.events == [Switch(0, None, 0, True), Switch(90, 0, 1, True), Switch(180, 1, 2, True)]
    assert record.average > 0.97
    assert len(record.matrix) == 1  # it answers at the end


def test_a_task_that_returns_recalls_its_expert():
    learner = made()
    record = shown(learner, revisit(blobs(3), [0, 1, 2, 1, 0]))
    assert [(e.batch, e.target, e.new) for e in learner.events[3:]] == [(270, 1, False), (360, 0, False)]
    assert len(learner.experts) == 3
    assert record.average > 0.97


def test_an_expert_does_not_change_by_a_bit_while_it_is_inactive():
    learner, batches = made(), batches_of(blobs(3), 5)
    for number, batch in enumerate(batches):
        if number == 91:
            frozen = {name: value.clone() for name, value in learner.network(0).state_dict().items()}
            watch = learner.experts[0].detector.state_dict()
        learner.observe(batch)
    assert learner.active == 2
    assert all(torch.equal(value, frozen[name]) for name, value in learner.network(0).state_dict().items())
    assert learner.experts[0].detector.state_dict() == watch  # a frozen threshold


def test_normalisation_statistics_of_inactive_experts_do_not_move_either():
    def normalised(seed):
        return nn.Sequential(nn.BatchNorm1d(12), mlp([12, 24, 3], seed=seed))

    learner = made(expert=normalised)
    for batch in batches_of(blobs(2), 5):
        learner.observe(batch)
        if len(learner.experts) == 1:
            last = learner.network(0)[0].running_mean.clone()
    assert learner.active == 1
    assert torch.equal(learner.network(0)[0].running_mean, last)


def test_inactive_experts_are_asked_only_at_an_alarm():
    calls = []

    def counting(seed):
        module = expert(seed)
        module.register_forward_hook(lambda *_: calls.append(seed))
        return module

    learner = made(expert=counting)
    for number, batch in enumerate(batches_of(blobs(3), 5)):
        learner.observe(batch)
        if number == 179:
            assert calls.count(0) == 180 + 1  # two a batch for 90 batches, one at the alarm of batch 90 before training
    assert calls.count(0) == 180 + 2


def test_a_step_is_plain_sgd_on_the_batch():
    learner, reference = made(lr=0.1, momentum=0.9, weight_decay=5e-4), expert(0)
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for batch in batches_of(blobs(1), 1):
        learner.observe(batch)
        optimiser.zero_grad()
        F.cross_entropy(reference(batch.inputs), batch.targets).backward()
        optimiser.step()
    pairs = zip(learner.network(0).parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert learner.gradients == 288


def test_a_shuffled_stream_has_one_expert_which_answers_alone():
    stream = blobs(2)
    order = torch.randperm(576, generator=torch.Generator().manual_seed(0))
    inputs, targets = (torch.cat([getattr(t.train, part) for t in stream])[order] for part in ("inputs", "targets"))
    mixed = Examples(inputs, targets)
    one = Experience("both", mixed, stream[0].validation, stream[0].test, task=0, classes=(0, 1, 2))
    learner = made()
    shown(learner, hide(Stream([one], outputs=3), "boundaries", "task_id_train", "class_list"), epochs=4)
    assert len(learner.experts) == 1
    inputs = stream[0].test.inputs
    with torch.no_grad():
        assert torch.equal(learner.predict(inputs), learner.network(0)(inputs))
    assert not learner.choose(inputs).any()


def test_experts_are_at_most_one_more_than_the_alarms_and_numbered_in_order(three):
    learner, _ = three
    assert len(learner.experts) <= 1 + len(learner.events[1:])
    assert [e.target for e in learner.events if e.new] == list(range(len(learner.experts)))


def test_the_first_fitting_expert_in_order_of_making_is_recalled():
    learner, batch = made(), Batch(torch.zeros(4, 12), torch.zeros(4, dtype=torch.long))
    learner.observe(batch)
    for _ in range(3):
        learner.experts.append(learner._new(len(learner.experts)))
    for number, fits in enumerate((True, False, True, True)):
        watch = learner.experts[number].detector
        watch.losses, watch.smoothed, watch.count = [100.0 if fits else -100.0] * 20, 0.0, 50
    learner.experts[0].detector.losses = [-100.0] * 20  # the active one raises the alarm
    learner.observe(batch)
    assert learner.events[-1] == Switch(1, 0, 2, False)


def test_owners_are_the_tasks_an_expert_was_mostly_trained_on(three):
    learner, _ = three
    true = [task for task in (7, 8, 9) for _ in range(90)]
    assert learner.owners(true) == [7, 8, 9]
    with pytest.raises(InputError, match="270 batches were observed, got the tasks of 2"):
        learner.owners([0, 1])


# The buffer.


def test_the_buffer_is_shared_equally_by_pairs_of_expert_and_label(three):
    learner, _ = three
    stored = learner.buffer.all()
    counts = torch.bincount(stored["experts"] * 3 + stored["targets"], minlength=9)
    assert len(learner.buffer) == 60
    assert counts.max() <= 7
    assert counts.min() >= 6


def test_an_example_enters_the_buffer_once_however_often_it_is_shown():
    learner = made(buffer=400)
    for batch in batches_of(blobs(1), 4):
        learner.observe(batch)
    assert learner.buffer.seen == 288
    assert len(learner.buffer.all()["inputs"].unique(dim=0)) == 288


def test_every_example_of_a_class_is_as_likely_to_be_kept():
    hits = torch.zeros(40)
    inputs = torch.zeros(40, 12)
    inputs[:, 0] = torch.arange(40)
    for seed in range(300):
        learner = made(outputs=1, expert=lambda s: nn.Linear(12, 1), buffer=8, seed=seed)
        for rows in torch.arange(40).split(10):
            learner.observe(Batch(inputs[rows] / 100, torch.zeros(10, dtype=torch.long)))
        hits[(learner.buffer.all()["inputs"][:, 0] * 100).round().long()] += 1
    assert hits.sum() == 2400
    chi = ((hits - 60) ** 2 / 60).sum() / 0.8  # without replacement: variance 300 x 0.2 x 0.8
    assert chi < 72  # 99.9 percent of chi-square with 39 degrees


def test_the_groups_of_the_buffer_come_from_the_learner_and_not_from_the_stream(monkeypatch):
    """With the change missed, two tasks share their groups: a group per true task would tell them apart."""
    learner, groups = made(window=400), set()  # grace of 200 batches: no alarm
    add = learner.buffer.add
    monkeypatch.setattr(learner.buffer, "add", lambda **given: (groups.update(given["groups"].tolist()), add(**given)))
    for batch in batches_of(blobs(2), 2):
        learner.observe(batch)
    assert groups == {0, 1, 2}


# The selector.


def test_the_answer_is_that_of_the_chosen_expert(three):
    learner, _ = three
    inputs = torch.cat([task.test.inputs[:20] for task in blobs(3)])
    chosen, logits = learner.choose(inputs), learner.predict(inputs)
    assert set(chosen.tolist()) == {0, 1, 2}
    for row in range(len(inputs)):
        with torch.no_grad():
            own = learner.network(int(chosen[row]))(inputs[row : row + 1])[0]
        torch.testing.assert_close(logits[row], own)


def test_predicting_changes_nothing(three):
    learner, _ = three
    inputs = blobs(3)[1].test.inputs
    before = {name: value.clone() for name, value in learner.network(1).state_dict().items()}
    keys, kept = learner.generator.get_state(), inputs.clone()
    assert torch.equal(learner.predict(inputs), learner.predict(inputs))
    assert all(torch.equal(value, before[name]) for name, value in learner.network(1).state_dict().items())
    assert torch.equal(keys, learner.generator.get_state())
    assert torch.equal(inputs, kept)


def test_with_several_experts_an_untrained_or_outdated_selector_is_refused():
    learner, batches = made(), batches_of(blobs(3), 5)
    for batch in batches[:100]:
        learner.observe(batch)
    with pytest.raises(InputError, match="there are 2 experts and it knows 0; end the stream or call train_selector"):
        learner.predict(batches[0].inputs)
    learner.train_selector()
    assert learner.predict(batches[0].inputs).shape == (16, 3)
    for batch in batches[100:]:
        learner.observe(batch)
    with pytest.raises(InputError, match="there are 3 experts and it knows 2"):
        learner.predict(batches[0].inputs)


def test_a_selector_of_the_wrong_width_is_refused():
    learner = made(selector=lambda experts, seed: nn.Linear(12, 5))
    with pytest.raises(InputError, match="selector gives 5 outputs for 2 experts"):
        shown(learner, blobs(2))


# Two ways to count.


def test_counts_within_the_expert_and_strictly_on_shared_labels(three):
    learner, record = three
    stream = blobs(3)
    honest = expert_accuracies(learner, stream, [0, 1, 2])
    for column, task in enumerate(stream.tasks):
        assert honest[task.name]["within"] == record.matrix[-1][column]
        assert honest[task.name]["strict"] <= min(honest[task.name]["within"], honest[task.name]["selected"])
        assert honest[task.name]["strict"] > 0.95
    wrong = expert_accuracies(learner, stream, [1, 2, 0])  # were the experts those of other tasks
    for task in stream.tasks:
        assert wrong[task.name]["within"] == honest[task.name]["within"]
        assert wrong[task.name]["strict"] < 0.05


def test_counts_on_labels_of_each_task_s_own():
    """Classes 0, 1 then 2, 3: an expert of the wrong task is right within its task by the place of its class."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 12, generator=generator)

    def part(classes, count):
        targets = torch.tensor(classes)[torch.arange(count) % 2]
        return Examples(centres[targets] + 0.1 * torch.randn(count, 12, generator=generator), targets)

    tasks = [
        Experience(f"{c}", part(c, 288), part(c, 10), part(c, 60), task=i, classes=c)
        for i, c in enumerate(((0, 1), (2, 3)))
    ]
    stream = hide(Stream(tasks, outputs=4), "boundaries", "task_id_train", "class_list", "task_id_predict")
    learner = made(4, expert=lambda seed: mlp([12, 24, 4], seed=seed))
    record = shown(learner, stream)
    found = expert_accuracies(learner, stream, [0, 1])
    assert len(learner.experts) == 2
    assert [row["strict"] for row in found.values()] == record.matrix[-1]
    assert record.average > 0.97
    learner.selector.open()[-1].bias.data.copy_(torch.tensor([1e4, 0.0]))  # always the first expert
    found = expert_accuracies(learner, stream, [0, 1])["(2, 3)"]
    assert found["strict"] == 0
    assert found["selected"] == 0
    inputs, targets = stream[1].test.inputs, stream[1].test.targets
    assert found["within"] == (learner.predict(inputs).argmax(1) == targets - 2).double().mean().item()


# Pruning.


def test_packing_is_lossless_and_takes_the_least_of_three_forms():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(50, 41, generator=generator)
    forms = {}
    for name, share in (("dense", 1.0), ("half", 0.5), ("few", 0.02)):
        state = {"w": full * (torch.rand(50, 41, generator=generator) < share), "n": torch.tensor(3)}
        packed = pack(state)
        back = unpack(packed)
        assert torch.equal(back["w"], state["w"])
        assert back["w"].dtype == torch.float32
        assert back["n"] == 3
        forms[name] = packed["w"]
    assert isinstance(forms["dense"], torch.Tensor)
    assert set(forms["half"]) == {"values", "shape", "bits"}
    assert len(forms["half"]["bits"]) == 257  # 2050 bits
    assert set(forms["few"]) == {"values", "shape", "places"}


def test_the_smallest_weights_of_all_layers_together_go_and_biases_stay():
    model = mlp([12, 24, 3], seed=0)
    model[0].weight.data.mul_(10)
    before = [p.clone() for p in model.parameters()]
    weights = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    masks = prune_globally(model, 0.9)
    kept = sum(int(mask.sum()) for _, mask in masks)
    assert kept == round(0.1 * 360)
    cut = weights.sort(descending=True).values[kept - 1]
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(new, old * (old.abs() >= cut) if old.ndim == 2 else old)
    with pytest.raises(InputError, match="convolutions or linear layers"):
        prune_globally(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(InputError, match="sparsity"):
        prune_globally(model, 1.0)


def test_training_after_pruning_leaves_removed_weights_at_zero():
    model, data = mlp([12, 24, 3], seed=0), blobs(1)[0].train
    masks = prune_globally(model, 0.8)
    before = model[0].weight.clone()
    made = train_on(
        model, data.inputs, data.targets, epochs=2, batch_size=32, lr=0.1, weight_decay=1e-4,
        generator=torch.Generator().manual_seed(0), masks=masks,
    )  # fmt: skip
    assert made == 576
    for weight, mask in masks:
        assert not weight[~mask].any()
    assert not torch.equal(model[0].weight, before)


@pytest.fixture(scope="module")
def pruned():
    learner = made(sparsity=0.9, selector_sparsity=0.5, pruning_epochs=20, pruning_buffer=100)
    return learner, shown(learner, blobs(3))


def test_pruned_experts_take_fewer_bytes_and_still_answer(pruned, three):
    learner, record = pruned
    assert record.average > 0.95
    dense, sparse = three[0].held(), learner.held()
    assert dense["experts"] == 2 * 4 * (12 * 24 + 24 + 24 * 3 + 3)
    assert sparse["experts"] < 0.3 * dense["experts"]
    assert sparse["selector"] < 0.7 * dense["selector"]
    assert sparse["examples for pruning"] == 0  # the last expert was left at the end of the stream
    assert all(one.module is None for one in learner.experts)
    for number in range(3):
        weights = [p for p in learner.network(number).parameters() if p.ndim == 2]
        assert sum(int((p != 0).sum()) for p in weights) <= 36


def test_a_pruned_expert_is_recalled_and_trains_on():
    learner = made(sparsity=0.8, pruning_epochs=20, pruning_buffer=100)
    record = shown(learner, revisit(blobs(2), [0, 1, 0]))
    assert [(e.target, e.new) for e in learner.events] == [(0, True), (1, True), (0, False)]
    assert record.average > 0.95


def test_examples_for_pruning_are_those_of_the_active_expert_alone():
    learner = made(sparsity=0.8, pruning_epochs=1, pruning_buffer=1000)
    stream = blobs(2)
    for batch in batches_of(stream, 5):
        learner.observe(batch)
    known = stream[1].train.inputs
    assert len(learner.recent) == 1000
    assert learner.held()["examples for pruning"] == 1000 * (12 * 4 + 8)
    assert (learner.recent.all()["inputs"][:, None] == known[None]).all(2).any(1).all()


# Going on.


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("stop", [37, 90, 150, 300])
def test_a_learner_stopped_anywhere_goes_on_with_the_same_result(stop, sparsity, tmp_path):
    options = {"sparsity": sparsity, "selector_sparsity": sparsity / 2, "pruning_epochs": 3}
    batches = batches_of(revisit(blobs(3), [0, 1, 0, 2]), 5)
    whole, first, second = (made(**options) for _ in range(3))
    for batch in batches:
        whole.observe(batch)
    for batch in batches[:stop]:
        first.observe(batch)
    save_state(first.state_dict(), tmp_path / "s.safetensors")
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    for batch in batches[stop:]:
        second.observe(batch)
    whole.end_stream()
    second.end_stream()
    inputs = torch.cat([task.test.inputs for task in blobs(3)])
    assert second.events == whole.events
    assert second.held() == whole.held()
    assert second.gradients == whole.gradients
    assert torch.equal(second.predict(inputs), whole.predict(inputs))


def test_a_finished_learner_is_saved_with_its_selector(pruned, three, tmp_path):
    inputs = blobs(3)[0].test.inputs
    for learner, options in ((three[0], {}), (pruned[0], {"pruning_buffer": 100})):
        save_state(learner.state_dict(), tmp_path / "s.safetensors")
        other = made(**options)
        other.load_state_dict(load_state(tmp_path / "s.safetensors"))
        assert torch.equal(other.predict(inputs), learner.predict(inputs))
        assert other.held() == learner.held()


def test_the_driver_resumes_at_a_boundary_with_the_same_result(tmp_path):
    stream = blobs(3)
    expected = shown(made(), stream)

    class Stopped(TAME):
        def observe(self, batch):
            if self.batches == 130:
                raise KeyboardInterrupt
            return super().observe(batch)

    learner = made()
    learner.__class__ = Stopped
    with pytest.raises(KeyboardInterrupt):
        shown(learner, stream, folder=tmp_path)
    fresh = made()
    state = load_state(tmp_path / "learner.safetensors")
    state["identity"]["learner"] = "TAME"  # it was stopped by a subclass
    save_state(state, tmp_path / "learner.safetensors")
    assert shown(fresh, stream, folder=tmp_path).matrix == expected.matrix
    assert fresh.batches == 270


def test_a_checkpoint_of_a_learner_with_other_settings_or_networks_is_refused(tmp_path):
    stream = blobs(1)
    shown(made(), stream, folder=tmp_path)
    for other, word in (
        (made(lr=0.05), "lr"),
        (made(window=21), "detector"),
        (made(expert=lambda seed: mlp([12, 25, 3], seed=seed)), "expert's shapes"),
    ):
        with pytest.raises(InputError, match=f"is a run with {word}"):
            shown(other, stream, folder=tmp_path)
    state = made().state_dict()
    with pytest.raises(InputError, match="expert 0 are of another network"):
        made(expert=lambda seed: mlp([12, 25, 3], seed=seed)).load_state_dict(state)
    with pytest.raises(InputError, match="'events' is in one of them only"):
        made().load_state_dict({name: value for name, value in state.items() if name != "events"})


def test_the_same_seed_gives_the_same_answers_and_torch_s_generator_is_left_alone(three):
    learner = made()
    shown(learner, blobs(3))
    inputs = blobs(3)[2].test.inputs
    assert torch.equal(learner.predict(inputs), three[0].predict(inputs))
    state = torch.get_rng_state()
    again = made(sparsity=0.5, pruning_epochs=2)
    for batch in batches_of(blobs(2), 5):
        again.observe(batch)
    again.end_stream()
    again.predict(inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_double_precision_is_kept():
    learner = made(expert=lambda seed: expert(seed).double(), selector=lambda n, seed: selector(n, seed).double())
    for batch in batches_of(blobs(2), 5):
        learner.observe(Batch(batch.inputs.double(), batch.targets, repeat=batch.repeat))
    learner.end_stream()
    assert learner.predict(blobs(2)[0].test.inputs.double()).dtype == torch.float64


# Bad input.


def test_streams_of_another_kind_are_refused():
    with pytest.raises(InputError, match="outputs"):
        learn(made(4, expert=lambda seed: nn.Linear(12, 4)), blobs(2))
    many = Examples(torch.zeros(4, 12), torch.zeros(4, 3))
    multi = Stream([Experience("m", many, many, many, task=0, classes=(0, 1, 2))], outputs=3)
    with pytest.raises(InputError, match="these are multi-label"):
        learn(made(), multi)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"buffer": 2}, "buffer of 2 cannot hold one example of each of 3 classes"),
        ({"sparsity": 1.0}, "sparsities are shares"),
        ({"selector_sparsity": -0.1}, "sparsities are shares"),
        ({"lr": 0.0}, "positive learning rates"),
        ({"selector_lr": float("inf")}, "positive learning rates"),
        ({"selector_epochs": 0}, "at least 1"),
        ({"pruning_epochs": -1}, "pruning_epochs at least 0"),
    ],
)
def test_settings_outside_their_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        made(**options)


def test_bad_batches_are_refused_with_a_sentence():
    batch = Batch(torch.zeros(2, 12), torch.tensor([0, 3]))
    with pytest.raises(InputError, match="target 3; the learner has outputs 0 to 2"):
        made().observe(batch)
    with pytest.raises(InputError, match="at least one example"):
        made().observe(Batch(torch.zeros(0, 12), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(InputError, match="finite"):
        made().observe(Batch(torch.full((2, 12), float("nan")), torch.tensor([0, 1])))
    with pytest.raises(InputError, match=r"an expert gives \(2, 4\); expected \(B, 3\)"):
        made(expert=lambda seed: nn.Linear(12, 4)).observe(Batch(torch.zeros(2, 12), torch.tensor([0, 1])))


def test_before_anything_was_observed_there_is_no_answer_and_no_selector():
    with pytest.raises(InputError, match="has seen no class yet"):
        made().predict(torch.zeros(2, 12))
    with pytest.raises(InputError, match="buffer is empty"):
        made().train_selector()


def test_a_maker_that_gives_the_same_network_twice_is_refused():
    one = expert(0)
    with pytest.raises(InputError, match="must make a new one at each call"):
        shown(made(expert=lambda seed: one), blobs(2))


def test_without_grace_a_network_that_starts_above_guessing_is_refused_and_one_of_zeros_is_not():
    def loud(seed):
        model = expert(seed)
        model[-1].bias.data.copy_(torch.tensor([9.0, 0.0, 0.0]))
        return model

    def quiet(seed):
        model = expert(seed)
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
        return model

    watch = LossJump(math.log(3), window=20, grace=0)
    batch = batches_of(blobs(1), 1)[0]
    with pytest.raises(InputError, match=r"is above log\(3\)=1.10: the detector would fire at once"):
        TAME(loud, selector, 3, detector=watch).observe(batch)
    learner = TAME(quiet, selector, 3, detector=watch, buffer=60)
    shown(learner, blobs(3))
    assert [e.batch for e in learner.events] == [0, 90, 180]


def test_stretches_of_a_few_batches_stay_with_one_expert_and_do_not_break():
    learner = made(window=40)
    short = [batch for _ in range(3) for task in blobs(2) for batch in batches_of([task], 1)[:2]]
    for batch in short:
        learner.observe(batch)
    assert len(learner.experts) == 1
    assert evaluate(learner, blobs(1)).keys() == {"blobs-order-0"}


def test_tasks_may_have_different_numbers_of_classes():
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(5, 12, generator=generator)

    def part(classes, count):
        targets = torch.tensor(classes)[torch.arange(count) % len(classes)]
        return Examples(centres[targets] + 0.1 * torch.randn(count, 12, generator=generator), targets)

    tasks = [
        Experience(f"{c}", part(c, 288), part(c, 10), part(c, 60), task=i, classes=c)
        for i, c in enumerate(((0, 1), (2, 3, 4)))
    ]
    stream = hide(Stream(tasks, outputs=5), "boundaries", "task_id_train", "class_list", "task_id_predict")
    learner = made(5, expert=lambda seed: mlp([12, 24, 5], seed=seed))
    assert shown(learner, stream).average > 0.95
    assert len(learner.experts) == 2


def test_inputs_may_be_dicts():
    class Named(nn.Module):
        def __init__(self, width, seed):
            super().__init__()
            self.net = mlp([12, 24, width], seed=seed)

        def forward(self, inputs):
            return self.net(inputs["x"])

    learner = made(expert=lambda seed: Named(3, seed), selector=Named)
    for batch in batches_of(blobs(2), 5):
        learner.observe(Batch({"x": batch.inputs}, batch.targets, repeat=batch.repeat))
    learner.end_stream()
    assert learner.predict({"x": blobs(2)[1].test.inputs}).shape == (90, 3)
