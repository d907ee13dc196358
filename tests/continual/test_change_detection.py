"""Changes found from losses: the rule on scripted losses, and a learner with boundaries driven by it."""

import math
from statistics import fmean, pstdev

import pytest
import torch
from torch import nn

from allrounder.continual import EWC, SI, Batch, Finetune, LwF, hide, learn, permuted
from allrounder.continual.change_detection import AtChanges, LossJump
from allrounder.errors import InputError
from allrounder.nets import mlp
from allrounder.state import load_state, save_state
from allrounder.task import Examples, Task


def noisy(count, middle=0.1, spread=0.01, seed=0):
    return (middle + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def alarms(detector, losses):
    found = []
    for index, loss in enumerate(losses):
        if detector.update(loss):
            found.append(index)
            detector.reset()
            detector.update(loss)
    return found


def test_the_first_threshold_is_the_loss_of_guessing_and_three_floors():
    assert LossJump(math.log(10)).threshold == math.log(10) + 0.015


def test_a_window_of_constant_losses_has_the_threshold_constant_plus_three_floors():
    watch = LossJump(math.log(10), window=35)
    for _ in range(35):
        assert not watch.update(0.7)
    assert watch.threshold == pytest.approx(0.715, abs=1e-12)


def test_the_band_is_as_wide_as_the_deviation_of_the_whole_window():
    watch = LossJump(0.0, window=4, grace=99)
    for loss in (1.0, 0.0, 1.0):
        watch.update(loss)
    assert watch.threshold == pytest.approx(0.5 + 3 * 0.5, abs=1e-12)


def test_the_window_forgets_the_loss_of_guessing_after_as_many_losses():
    watch = LossJump(5.0, window=4)
    for _ in range(3):
        watch.update(1.0)
    assert watch.losses == [5.0, 1.0, 1.0, 1.0]
    watch.update(1.0)
    assert watch.losses == [1.0] * 4


def test_the_card_s_scripted_jump_is_seen_at_the_first_batch_with_its_numbers():
    watch = LossJump(0.1, window=35, smoothing=0.2)
    for loss in noisy(60):
        assert not watch.update(loss)
    assert 0.12 < watch.threshold < 0.15
    assert watch._next(2.3) == pytest.approx(0.54, abs=0.01)
    assert watch.update(2.3)


def test_the_alarm_is_the_rule_of_the_paper_recomputed_slowly():
    losses = noisy(200, 0.5, 0.05) + noisy(50, 1.2, 0.05, seed=1)
    watch, smoothed = LossJump(2.3, window=20, smoothing=0.3, deviations=2.5, floor=0.01, grace=0), None
    window, expected, found = [2.3], [], []
    for index, loss in enumerate(losses):
        new = loss if smoothed is None else 0.3 * loss + 0.7 * smoothed
        if new > fmean(window) + 2.5 * max(pstdev(window), 0.01):
            expected.append(index)
        else:
            smoothed, window = new, [*window, loss][-20:]
        if watch.update(loss):
            found.append(index)
    assert found == expected
    assert len(found) > 5
    assert found[-1] >= 200


def test_without_smoothing_one_loss_over_the_band_is_enough_and_with_it_several_are_needed():
    sharp, slow = (LossJump(1.0, window=10, smoothing=a) for a in (1.0, 0.1))
    for _ in range(20):
        sharp.update(1.0)
        slow.update(1.0)
    assert sharp.update(1.02)
    # (1 - 0.9^n) 0.1 > 0.015 first for n = 2; the window widens a little with the first
    assert not slow.update(1.1)
    assert slow.smoothed == pytest.approx(1.01)


def test_an_alarming_loss_is_not_remembered():
    watch = LossJump(1.0, window=10)
    for _ in range(10):
        watch.update(0.5)
    before = watch.state_dict()
    assert watch.update(4.0)
    assert watch.state_dict() == before


def test_asking_whether_a_loss_exceeds_changes_nothing_and_ignores_the_grace_period():
    watch = LossJump(1.0, window=10)
    watch.update(0.5)
    before = watch.state_dict()
    assert watch.exceeds(9.0)
    assert not watch.exceeds(0.5)
    assert watch.state_dict() == before


def test_no_alarm_within_the_grace_period_and_one_right_after_it():
    watch = LossJump(0.1, window=6)
    assert watch.grace == 3
    assert [watch.update(loss) for loss in (9.0, 0.1, 0.1)] == [False] * 3
    assert watch.update(900.0)


def test_the_loss_stays_finite_in_the_threshold_for_equal_inputs():
    losses = noisy(300, 0.3, 0.05)
    assert alarms(LossJump(math.log(2), window=50), losses) == []  # one stationary task


def test_slow_drift_gives_no_alarm_and_the_same_rise_at_once_does():
    rise = [0.1 + 0.002 * i for i in range(500)]
    assert alarms(LossJump(0.1, window=35), rise) == []
    assert alarms(LossJump(0.1, window=35), [0.1] * 250 + [1.1] * 250) == [250]


def test_a_very_steady_loss_needs_a_higher_floor():
    losses = [0.001] * 100 + [0.2] + [0.001] * 100
    assert alarms(LossJump(0.1, window=35), losses) == [100]
    assert alarms(LossJump(0.1, window=35, floor=0.05), losses) == []


def test_a_first_loss_above_guessing_is_refused_without_grace_and_told_with_its_numbers():
    with pytest.raises(
        InputError, match=r"loss at start 2\.9 is above log\(10\)=2\.30: the detector would fire at once"
    ):
        LossJump(math.log(10), grace=0).update(2.9)
    assert not LossJump(math.log(10), grace=0).update(math.log(10))
    with pytest.raises(InputError, match="the loss of guessing, 0.25"):
        LossJump(0.25, grace=0).update(2.9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": float("nan")}, "start is the loss of guessing"),
        ({"window": 1}, "window needs at least 2"),
        ({"smoothing": 0.0}, "smoothing is"),
        ({"smoothing": 1.5}, "smoothing is"),
        ({"floor": 0.0}, "floor"),
        ({"deviations": -1.0}, "deviations"),
        ({"grace": -1}, "grace"),
    ],
)
def test_settings_outside_their_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        LossJump(**({"start": 1.0} | options))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(loss):
    with pytest.raises(InputError, match="finite"):
        LossJump(1.0).update(loss)


def test_a_detector_goes_on_from_its_state(tmp_path):
    one, other = LossJump(1.0, window=8), LossJump(1.0, window=8)
    for loss in noisy(20):
        one.update(loss)
    save_state(one.state_dict(), tmp_path / "d.safetensors")
    other.load_state_dict(load_state(tmp_path / "d.safetensors"))
    assert other.state_dict() == one.state_dict()
    assert other.threshold == one.threshold
    with pytest.raises(InputError, match="remembers 8 losses, this one 4"):
        LossJump(1.0, window=4).load_state_dict(one.state_dict())


# A learner with boundaries on a stream without.


class Scripted:
    """Raises the alarm at given calls."""

    def __init__(self, calls):
        self.calls, self.count = calls, 0

    def update(self, loss):
        self.count += 1
        return self.count in self.calls

    def reset(self):
        pass

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Witness(EWC):
    """Notes what it is told."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.log = []

    def begin_task(self, info):
        self.log.append(("begin", len(list(info.batches))))
        super().begin_task(info)

    def observe(self, batch):
        self.log.append("observe")
        return super().observe(batch)

    def end_task(self, info):
        self.log.append(("end", sum(len(batch) for batch in info.batches)))
        super().end_task(info)


@pytest.fixture
def stream():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 10, generator=generator)

    def examples(count):
        targets = torch.arange(count) % 3
        return Examples(centres[targets] + 0.1 * torch.randn(count, 10, generator=generator), targets)

    task = Task("blobs", examples(240), examples(30), examples(90), outputs=3)
    return permuted(task, 3, seed=1)


def bare(stream):
    return hide(stream, "boundaries", "task_id_train", "class_list")


def test_a_learner_is_told_of_a_task_before_the_batch_that_changed():
    inner = Witness(mlp([4, 3], seed=0), 3, strength=1.0, lr=0.01)
    learner = AtChanges(inner, Scripted({3}), memory=6)
    data = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        learner.observe(Batch(data, torch.tensor([0, 1, 2, 0, 1])))
    learner.end_stream()
    assert inner.log == [
        ("begin", 0), "observe", "observe", ("end", 6), ("begin", 0), "observe", "observe", ("end", 6),
    ]  # fmt: skip
    assert learner.alarms == [2]
    assert learner.held()["examples of the present task"] == 6 * (4 * 4 + 8)
    assert learner.gradients == inner.gradients == 20
    assert learner.predict(data).shape == (5, 3)


def watched(kind, seed=0, **options):
    inner = kind(mlp([10, 32, 3], seed=seed), 3, lr=0.1, momentum=0.9, seed=seed, **options)
    return AtChanges(inner, LossJump(math.log(3), window=20), memory=100)


@pytest.mark.parametrize(
    ("kind", "options"), [(EWC, {"strength": 2.0}), (SI, {"strength": 0.5}), (LwF, {"strength": 1.0})]
)
def test_learners_with_boundaries_run_on_a_stream_without_and_find_its_changes(kind, options, stream):
    with pytest.raises(InputError, match="use TAME's detector"):
        learn(watched(kind, **options).inner, bare(stream), batch_size=16)
    learner = watched(kind, **options)
    record = learn(learner, bare(stream), epochs=4, batch_size=16)
    assert learner.alarms[0] == 60  # 15 batches a pass
    assert len(learner.alarms) <= 3  # a penalty keeps later losses unsteady
    assert kind is not EWC or learner.alarms == [60, 120]
    assert len(record.matrix) == 3


def test_predictions_change_nothing_in_a_watched_learner(stream):
    learner = watched(EWC)
    learn(learner, bare(stream), batch_size=16)
    before = [parameter.clone() for parameter in learner.inner.parameters]
    state = learner.memory.generator.get_state()
    one, two = (learner.predict(stream[0].test.inputs) for _ in range(2))
    assert torch.equal(one, two)
    assert all(torch.equal(old, new) for old, new in zip(before, learner.inner.parameters, strict=True))
    assert torch.equal(state, learner.memory.generator.get_state())


def test_a_watched_learner_stopped_in_a_task_goes_on_with_the_same_result(stream, tmp_path):
    batches = [
        Batch(*part) for task in stream for part in zip(task.train.inputs.split(16), task.train.targets.split(16))
    ]
    whole, first, second = watched(EWC), watched(EWC), watched(EWC, seed=5)
    for batch in batches * 2:
        whole.observe(batch)
    for batch in (batches * 2)[:37]:
        first.observe(batch)
    save_state(first.state_dict(), tmp_path / "s.safetensors")
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    for batch in (batches * 2)[37:]:
        second.observe(batch)
    assert second.alarms == whole.alarms
    assert all(torch.equal(a, b) for a, b in zip(second.inner.parameters, whole.inner.parameters, strict=True))


def test_a_checkpoint_of_another_inner_learner_or_detector_is_refused(stream, tmp_path):
    learn(watched(EWC), bare(stream), batch_size=16, folder=tmp_path)
    for other, word in (
        (watched(EWC, strength=3.0), "inner"),
        (watched(LwF), "inner"),
        (AtChanges(watched(EWC).inner, LossJump(math.log(3), window=21), memory=100), "window"),
    ):
        with pytest.raises(InputError, match=f"is a run with {word}"):
            learn(other, bare(stream), batch_size=16, folder=tmp_path)


def test_an_inner_learner_that_needs_more_than_boundaries_is_refused():
    with pytest.raises(InputError, match="needs class_list"):
        AtChanges(Finetune(nn.Linear(2, 2), 2, mask="task"), LossJump(1.0))
