"""The loop over stages: who is called with what, what changes, interruption and continuation."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.compression.stages import Stage, _factor, distil
from allrounder.errors import InputError
from allrounder.nets import mlp
from allrounder.task import Examples


class Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.modes = inner, 0, set()

    def forward(self, x):
        self.calls += 1
        self.modes.add((self.training, torch.is_grad_enabled()))
        return self.inner(x)


class Projected(nn.Module):
    """A loss with weights of its own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(3))

    def forward(self, student, teacher, targets):
        return F.mse_loss(student @ self.w, teacher)


class Poison:
    """Targets that must not be looked at."""

    def __getattr__(self, name):
        raise AssertionError("targets were read")


class Unlabelled(Examples):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], Poison()


def hard(student, teacher, targets):
    return F.cross_entropy(student, targets)


def mse(student, teacher, targets):
    return F.mse_loss(student, teacher)


def examples(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))


def student(seed=1):
    return nn.Sequential(mlp([4, 8], seed=seed), nn.ReLU(), nn.Dropout(0.2), mlp([8, 3], seed=seed + 1))


@pytest.fixture
def setting():
    first, second = (Counted(nn.Sequential(mlp([4, 6, 3], seed=s), nn.BatchNorm1d(3))) for s in (5, 6))
    latent = Projected()
    data = Unlabelled(examples(seed=3).inputs, torch.zeros(40))
    stages = [
        Stage("one", data, {"latent": latent}, first, steps=5, lr=1e-2, batch_size=8),
        Stage("two", data, {"latent": latent}, second, steps=6, lr=1e-2, batch_size=8),
        Stage("three", examples(), {"latent": latent, "hard": hard}, second, {"latent": 0.1}, steps=7, lr=1e-2,
              batch_size=8),
    ]  # fmt: skip
    return first, second, latent, stages


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_table_drives_teacher_data_and_loss(setting):
    first, second, _, stages = setting
    history = distil(student(), stages)
    assert (first.calls, second.calls) == (5, 13)
    assert first.modes | second.modes == {(False, False)}  # evaluation mode, no gradient
    assert {name: {loss: len(v) for loss, v in found.items()} for name, found in history.items()} == {
        "one": {"latent": 5}, "two": {"latent": 6}, "three": {"latent": 7, "hard": 7},
    }  # fmt: skip


def test_teachers_are_bit_identical_and_in_their_mode_afterwards(setting):
    first, second, _, stages = setting
    second.eval()
    before = copy.deepcopy(first), copy.deepcopy(second)
    distil(student(), stages)
    assert same(first, before[0])
    assert same(second, before[1])
    assert first.training
    assert first.inner[1].training
    assert not second.training


def test_one_stage_is_adamw_with_warm_up_and_linear_fall():
    data, mine = examples(16), student().eval()
    mine[2].p = 0.0
    slow = copy.deepcopy(mine)
    losses = {"hard": hard, "small": lambda s, t, y: s.square().mean()}
    stage = Stage("only", data, losses, weights={"small": 0.3}, steps=10, lr=1e-2, batch_size=16, warmup=0.3)
    distil(mine, [stage])
    optimiser = torch.optim.AdamW(slow.parameters(), lr=1e-2, weight_decay=0.01)
    for rate in (1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7):
        optimiser.param_groups[0]["lr"] = 1e-2 * rate
        optimiser.zero_grad()
        output = slow(data.inputs)
        (F.cross_entropy(output, data.targets) + 0.3 * output.square().mean()).backward()
        optimiser.step()
    for a, b in zip(mine.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert [_factor(k, 4, 0.0) for k in range(4)] == [1, 0.75, 0.5, 0.25]


def test_same_seed_same_bits_and_the_global_generator_is_left_alone(setting):
    *_, latent, stages = setting
    start = copy.deepcopy(latent.state_dict())
    found = []
    for seed in (0, 0, 1):
        latent.load_state_dict(start)
        state, mine = torch.get_rng_state(), student()
        distil(mine, stages, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        assert not mine.training
        found.append(mine)
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_batches_depend_on_the_stages_name_and_the_seed_alone():
    def order(names, wanted, seed=0):
        seen = []

        def look(output, teacher, targets):
            seen.append(targets.tolist())
            return output.mean()

        plain = lambda s, t, y: s.mean()  # noqa: E731
        data = Examples(torch.zeros(40, 4), torch.arange(40))
        stages = [Stage(n, data, {"l": look if n == wanted else plain}, steps=4, batch_size=8) for n in names]
        distil(student(), stages, seed=seed)
        return seen

    assert order(["a", "b"], "b") == order(["b"], "b")
    assert order(["a"], "a") != order(["b"], "b")
    assert order(["a"], "a") != order(["a"], "a", seed=1)


def test_loss_weights_are_trained_and_kept_over_stages(setting):
    *_, latent, stages = setting
    distil(student(), stages[:1])
    after_one = latent.w.detach().clone()
    assert not torch.equal(after_one, torch.eye(3))
    distil(student(), stages[1:2])
    assert not torch.equal(latent.w, after_one)


def test_what_no_loss_reaches_does_not_move():
    mine = student()
    mine.register_parameter("spare", nn.Parameter(torch.ones(2)))
    before = mine.spare.detach().clone()
    distil(mine, [Stage("only", examples(), {"hard": lambda s, t, y: F.cross_entropy(s, y)}, steps=3, lr=1e-2)])
    assert torch.equal(mine.spare, before)


class StopError(Exception):
    pass


@pytest.mark.parametrize("where", [("one", 3), ("two", 1), ("two", 6), ("three", 4)])
def test_interrupted_anywhere_and_continued_gives_the_same_bits(setting, tmp_path, where):
    *_, latent, stages = setting
    start, whole = copy.deepcopy(latent.state_dict()), student()
    history = distil(whole, stages)
    weights = latent.w.detach().clone()
    latent.load_state_dict(start)

    def stop(name, done, total):
        if (name, done) == where:
            raise StopError

    mine = student()
    with pytest.raises(StopError):
        distil(mine, stages, folder=tmp_path, progress=stop)
    seen = []
    again = distil(mine, stages, folder=tmp_path, progress=lambda name, done, total: seen.append((name, done)))
    assert same(mine, whole)
    assert torch.equal(latent.w, weights)
    assert again == history
    if where[0] == "three":
        assert seen[:2] == [("one", 5), ("two", 6)]  # said to be done, not run again
    third = student(seed=9)
    assert distil(third, stages, folder=tmp_path) == history
    assert same(third, whole)


def test_a_failed_stage_leaves_the_teacher_in_its_mode_and_random_state_alone(setting):
    first, *_, stages = setting
    state = torch.get_rng_state()

    def stop(*_):
        raise StopError

    with pytest.raises(StopError):
        distil(student(), stages, progress=stop)
    assert first.training
    assert torch.equal(state, torch.get_rng_state())


def test_another_runs_folder_is_refused(setting, tmp_path):
    *_, stages = setting
    distil(student(), stages, folder=tmp_path)
    with pytest.raises(InputError, match="state of other stages or another seed"):
        distil(student(), stages, folder=tmp_path, seed=1)
    with pytest.raises(InputError, match="state of other stages or another seed"):
        distil(student(), [replace(stages[0], steps=4), *stages[1:]], folder=tmp_path)
    with pytest.raises(InputError, match="state of another student"):
        distil(mlp([4, 5, 3], seed=0), stages, folder=tmp_path)


def test_zero_steps_are_the_stage_left_out(setting):
    *_, latent, stages = setting
    start, found = copy.deepcopy(latent.state_dict()), []
    for chosen in ([stages[0], replace(stages[1], steps=0), stages[2]], [stages[0], stages[2]]):
        latent.load_state_dict(start)
        found.append(student())
        distil(found[-1], chosen)
    assert same(*found)


def test_float64_and_inputs_alone():
    mine = student().double()
    inputs = examples().inputs.double()

    class Bare(Examples):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

    kept = inputs.clone()
    teacher = mlp([4, 3], seed=3).double()
    distil(mine, [Stage("only", Bare(inputs, torch.zeros(40)), {"mse": mse}, teacher, steps=3)])
    assert next(mine.parameters()).dtype == torch.float64
    assert torch.equal(inputs, kept)


def test_bad_input_is_named(setting):
    first, _, _, stages = setting
    with pytest.raises(InputError, match="stages need names that differ, got 'one'"):
        distil(student(), [stages[0], stages[0]])
    with pytest.raises(InputError, match="teacher of stage 'one' shares parameters with the student"):
        distil(first, stages)
    bad = {"nan": lambda s, t, y: s.sum() * torch.nan}
    with pytest.raises(InputError, match="loss 'nan' of stage 'x' is nan at step 0"):
        distil(student(), [Stage("x", examples(), bad, steps=1)])
    with pytest.raises(InputError, match="is a scalar, got"):
        distil(student(), [Stage("x", examples(), {"l": lambda s, t, y: s}, steps=1)])
    with pytest.raises(InputError, match="no examples"):
        distil(student(), [Stage("x", examples(0), {"hard": hard}, steps=1)])
    with pytest.raises(InputError, match="stage 'x' has no loss"):
        Stage("x", examples(), {})
    with pytest.raises(InputError, match="weighs 'soft', which is none of its losses hard"):
        Stage("x", examples(), {"hard": hard}, weights={"soft": 1})
    with pytest.raises(InputError, match="finite and at least 0, got -1"):
        Stage("x", examples(), {"hard": hard}, weights={"hard": -1})
    with pytest.raises(InputError, match="needs steps >= 0"):
        Stage("x", examples(), {"hard": hard}, lr=0)
