import pytest
import torch
from safetensors.torch import save_file

from allrounder.errors import InputError
from allrounder.state import load_state, save_state

NEST = {
    "a": torch.arange(6.0).view(2, 3), 3: [1, 2.5, None, True, "text"], "deep": {"b": (torch.tensor(1), {}), "c": []},
    "half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.empty(0, 4),
}  # fmt: skip


def test_a_nest_comes_back_as_it_was(tmp_path):
    save_state(NEST, tmp_path / "s")
    found = load_state(tmp_path / "s")
    assert torch.equal(found["a"], NEST["a"])
    assert found[3] == NEST[3]
    assert isinstance(found["deep"]["b"], tuple)
    assert found["deep"]["c"] == []
    assert found["half"].dtype == torch.bfloat16
    assert found["empty"].shape == (0, 4)


def test_tensors_over_one_storage_and_views(tmp_path):
    base = torch.arange(10.0)
    save_state({"one": base, "two": base, "view": base[2:5], "turned": base.view(2, 5).T}, tmp_path / "s")
    found = load_state(tmp_path / "s")
    assert torch.equal(found["two"], base)
    assert torch.equal(found["view"], base[2:5])
    assert torch.equal(found["turned"], base.view(2, 5).T)


def test_an_optimisers_state_survives(tmp_path):
    p = torch.nn.Parameter(torch.ones(3))
    one = torch.optim.AdamW([p], lr=0.1)
    p.sum().backward()
    one.step()
    save_state(one.state_dict(), tmp_path / "s")
    other = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone())], lr=0.5)
    other.load_state_dict(load_state(tmp_path / "s"))
    assert other.param_groups[0]["lr"] == 0.1
    assert torch.equal(next(iter(other.state.values()))["exp_avg"], next(iter(one.state.values()))["exp_avg"])


def test_what_cannot_be_kept_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"state /a/1 is a set"):
        save_state({"a": [1, {2}]}, tmp_path / "s")
    with pytest.raises(InputError, match="keys are strings or integers"):
        save_state({(1, 2): 3}, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="no state at"):
        load_state(tmp_path / "none")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(InputError, match="not a state that was saved here"):
        load_state(tmp_path / "other")
    save_state(NEST, tmp_path / "s")
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:-5])
    with pytest.raises(InputError, match="cut off"):
        load_state(tmp_path / "cut")
