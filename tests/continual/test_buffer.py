import pytest
import torch

from allrounder.continual import Buffer
from allrounder.errors import InputError
from allrounder.state import load_state, save_state


def filled(count, size, *, policy="reservoir", seed=0, batch=7, classes=3):
    buffer = Buffer(size, policy=policy, seed=seed)
    for rows in torch.arange(count).split(batch):
        buffer.add(inputs=rows.float().unsqueeze(1), targets=rows % classes)
    return buffer


def stored(buffer):
    return sorted(buffer.all()["inputs"].flatten().int().tolist())


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_every_item_is_kept_with_the_same_probability(policy):
    runs, count, size = 600, 60, 12
    hits = torch.zeros(count)
    for seed in range(runs):
        hits[stored(filled(count, size, policy=policy, seed=seed))] += 1
    expected = runs * size / count
    chi = ((hits - expected) ** 2 / expected).sum().item()
    assert hits.sum() == runs * size
    assert 25 < chi < 85  # 99.9% of a chi-square with 59 degrees of freedom, reduced by the fixed total


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_the_first_items_are_all_kept_and_size_is_never_passed(policy):
    assert stored(filled(9, 12, policy=policy)) == list(range(9))
    buffer = filled(100, 12, policy=policy)
    assert len(buffer) == 12
    assert buffer.seen == 100
    assert len(set(stored(buffer))) == 12


def test_inputs_and_targets_stay_together():
    for policy in ("reservoir", "balanced"):
        found = filled(200, 20, policy=policy).sample(20)
        assert torch.equal(found["inputs"].flatten().long() % 3, found["targets"])


def test_balanced_shares_evenly_and_lends_room():
    buffer = Buffer(12, policy="balanced")
    buffer.add(inputs=torch.zeros(90, 1), targets=torch.zeros(90, dtype=torch.long))
    assert len(buffer) == 12
    buffer.add(inputs=torch.zeros(2, 1), targets=torch.ones(2, dtype=torch.long))
    assert torch.bincount(buffer.all()["targets"]).tolist() == [10, 2]
    buffer.add(inputs=torch.zeros(50, 1), targets=torch.full((50,), 2))
    assert torch.bincount(buffer.all()["targets"]).tolist() == [5, 2, 5]


def test_a_batch_at_once_or_in_parts_gives_a_buffer_of_the_same_law():
    """The slot of an item depends on its number alone, so the draws are the same numbers."""
    assert stored(filled(100, 12, batch=100)) == stored(filled(100, 12, batch=1))


def test_sampling_repeats_only_when_it_must():
    buffer = filled(30, 10)
    assert sorted(buffer.sample(10)["inputs"].flatten().int().tolist()) == stored(buffer)
    assert len(buffer.sample(25)["targets"]) == 25
    with pytest.raises(InputError, match="empty"):
        Buffer(3).sample(1)


def test_dicts_of_inputs_and_other_columns():
    buffer = Buffer(4)
    buffer.add(
        inputs={"ids": torch.arange(6).view(6, 1), "mask": torch.ones(6, 1)},
        targets=torch.arange(6),
        z=torch.rand(6, 2),
    )
    found = buffer.sample(3)
    assert set(found) == {"inputs", "targets", "z"}
    assert torch.equal(found["inputs"]["ids"].flatten(), found["targets"])
    assert buffer.bytes == 4 * (8 + 4 + 8 + 8)


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_a_saved_buffer_goes_on_alike(tmp_path, policy):
    buffer = filled(50, 10, policy=policy)
    save_state(buffer.state_dict(), tmp_path / "b.safetensors")
    other = Buffer(10, policy=policy, seed=99)
    other.load_state_dict(load_state(tmp_path / "b.safetensors"))
    for one in (buffer, other):
        one.add(inputs=torch.full((40, 1), 77.0), targets=torch.zeros(40, dtype=torch.long))
    assert stored(buffer) == stored(other)
    assert torch.equal(buffer.sample(5)["inputs"], other.sample(5)["inputs"])
    with pytest.raises(InputError, match="saved buffer is a"):
        Buffer(11, policy=policy).load_state_dict(buffer.state_dict())


def test_bad_input():
    with pytest.raises(InputError, match="at least one example"):
        Buffer(0)
    with pytest.raises(InputError, match="policy is"):
        Buffer(3, policy="fifo")
    buffer = filled(5, 3)
    with pytest.raises(InputError, match="the buffer has the columns"):
        buffer.add(inputs=torch.zeros(1, 1))
    with pytest.raises(InputError, match="one length"):
        buffer.add(inputs=torch.zeros(2, 1), targets=torch.zeros(3))
