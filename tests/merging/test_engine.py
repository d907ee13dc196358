"""The streaming engine: what is aligned, refused, kept bit for bit, and that how it is cut does not show."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from allrounder.checkpoint import Checkpoint
from allrounder.errors import InputError
from allrounder.merging import engine
from allrounder.merging.baselines import average, breadcrumbs, dare, task_arithmetic, ties
from allrounder.merging.engine import Aligned, Block, Linear, Merge, Rule
from allrounder.merging.fisher import fisher
from allrounder.saving import save

SHAPES = {"a": (7, 11), "b": (300,), "c": (), "d": (2, 3, 4, 5)}


def weights(seed, dtype=torch.float32, like=None, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if like is not None:
        drawn = {name: like[name].float() + scale * value for name, value in drawn.items()}
    return {name: value.to(dtype) for name, value in drawn.items()}


@pytest.fixture
def base():
    return weights(0)


@pytest.fixture
def experts(base):
    return {f"e{k}": weights(k + 1, like=base) for k in range(3)}


class TestAligned:
    def test_no_experts(self, base):
        with pytest.raises(InputError, match="at least one expert"):
            Aligned(base, {})

    def test_experts_without_names(self, base):
        with pytest.raises(InputError, match="mapping from names to weights, got list"):
            Aligned(base, [base])

    def test_missing_and_extra_are_named(self, base, experts):
        odd = {name: value for name, value in experts["e1"].items() if name != "b"} | {"head": torch.zeros(2)}
        with pytest.raises(InputError, match="expert 'e1' is not of .*: it lacks 'b' and has 'head' besides"):
            Aligned(base, experts | {"e1": odd})

    def test_another_vocabulary_is_named(self):
        base, expert = {"embed.weight": torch.zeros(32, 4)}, {"embed.weight": torch.zeros(33, 4)}
        with pytest.raises(InputError, match=r"of shape \(33, 4\), the base has \(32, 4\) \(another vocabulary"):
            Aligned(base, {"x": expert})

    def test_same_number_of_entries_is_not_same_shape(self):
        with pytest.raises(InputError, match=r"of shape \(3, 2\), the base has \(2, 3\)"):
            Aligned({"w": torch.zeros(2, 3)}, {"x": {"w": torch.zeros(3, 2)}})

    def test_complex_and_quantised_weights_are_refused(self):
        for tensor, what in (
            (torch.zeros(2, dtype=torch.complex64), "complex"),
            (torch.zeros(2, dtype=torch.int8), "quantised"),
        ):
            with pytest.raises(InputError, match=f"'q.weight' is {what}"):
                average({"x": {"q.weight": tensor}})
        scaled = {"q.weight": torch.zeros(2).to(torch.float8_e4m3fn), "q.weight_scale": torch.ones(1)}
        with pytest.raises(InputError, match="'q.weight' is quantised"):
            average({"x": scaled})

    def test_integer_tensors_may_be_missing_from_an_expert(self, base, experts):
        steps = base | {"steps": torch.tensor(7), "seen": torch.tensor([True, False])}
        merged = task_arithmetic(steps, experts)
        assert torch.equal(merged["steps"], torch.tensor(7))
        assert torch.equal(merged["seen"], steps["seen"])

    def test_sharded_files_give_the_task_vectors_of_memory_bit_for_bit(self, base, experts, tmp_path):
        for name, value in {"base": base, **experts}.items():
            save(value, tmp_path / name, shard_bytes=400)
        assert len(list((tmp_path / "base").glob("*.safetensors"))) == 4
        disk = Aligned(Checkpoint(tmp_path / "base"), {name: Checkpoint(tmp_path / name) for name in experts})
        for name in base:
            found = torch.cat([deltas for _, deltas in disk.deltas(name)], dim=1)
            assert torch.equal(found, torch.stack([(e[name] - base[name]).flatten() for e in experts.values()]))

    def test_task_vectors_of_half_precision_are_formed_in_float32(self):
        base, expert = {"w": torch.tensor([1.0]).bfloat16()}, {"w": torch.tensor([1.0001])}
        ((_, deltas),) = Aligned(base, {"x": expert}).deltas("w")
        assert deltas.dtype == torch.float32
        assert deltas.item() == pytest.approx(1e-4, rel=1e-3)


class TestTied:
    def test_second_names_give_the_same_tensor_and_count_once(self):
        matrix, moved = torch.zeros(2, 2), torch.ones(2, 2)
        base, expert = {"embed": matrix, "head": matrix}, {"embed": moved, "head": moved}
        merged = task_arithmetic(base, {"x": expert}, scale=0.5)
        assert list(merged) == ["embed", "head"]
        assert merged.tied == {"head": "embed"}
        assert torch.equal(merged["head"], torch.full((2, 2), 0.5))
        assert len(Aligned(base, {"x": expert}).names) == 1

    def test_an_expert_may_name_the_tensor_in_another_order_or_once(self):
        matrix, moved = torch.zeros(2), torch.ones(2)
        base = {"embed": matrix, "head": matrix}
        for expert in ({"head": moved, "embed": moved}, {"embed": moved}, {"embed": moved, "head": moved.clone()}):
            assert torch.equal(task_arithmetic(base, {"x": expert}, scale=1.0)["head"], moved)

    def test_a_base_from_disk_has_the_tensor_once(self):
        moved = torch.ones(2)
        merged = task_arithmetic({"embed": torch.zeros(2)}, {"x": {"head": moved, "embed": moved}}, scale=1.0)
        assert dict(merged).keys() == {"embed"}
        assert torch.equal(merged["embed"], moved)

    def test_names_that_an_expert_unties_are_refused(self):
        matrix = torch.zeros(2)
        with pytest.raises(InputError, match="'head' and 'embed' are one tensor in the base and two in expert 'x'"):
            Aligned({"embed": matrix, "head": matrix}, {"x": {"embed": torch.ones(2), "head": torch.zeros(2)}})


class TestLinear:
    def test_is_base_plus_weighted_task_vectors(self, base, experts):
        values = [0.3, -0.7, 1.1]
        merged = Merge(Aligned(base, experts), Linear(values))
        for name in base:
            right = base[name].double()
            for value, expert in zip(values, experts.values(), strict=True):
                right = right + value * (expert[name].double() - base[name].double())
            assert torch.allclose(merged[name].double(), right, atol=1e-6)

    def test_float64_is_merged_in_float64(self):
        base = weights(0, torch.float64)
        experts = {f"e{k}": {n: v + torch.randn(v.shape, dtype=v.dtype) for n, v in base.items()} for k in range(3)}
        merged = task_arithmetic(base, experts, scale=1 / 3)
        mean = sum(expert["b"] for expert in experts.values()) / 3
        assert (merged["b"] - mean).abs().max() < 1e-15

    def test_mapping_keeps_the_base_where_it_has_no_coefficients(self, base, experts):
        merged = Merge(Aligned(base, experts), Linear({"a": [1.0, 0.0, 0.0]}))
        assert torch.equal(merged["b"], base["b"])
        assert torch.equal(merged["a"], experts["e0"]["a"])

    def test_wrong_number_of_coefficients(self, base, experts):
        with pytest.raises(InputError, match="'a' has 2 coefficients for 3 experts"):
            Merge(Aligned(base, experts), Linear([1.0, 2.0]))["a"]


class _Whole(Rule):
    whole = True

    def __call__(self, block: Block):
        return block.experts[0].flip(0)


class TestMerge:
    def test_mapping(self, base, experts):
        merged = task_arithmetic(base, experts)
        assert list(merged) == list(base)
        assert len(merged) == 4
        assert "a" in merged
        assert "z" not in merged
        with pytest.raises(KeyError):
            merged["z"]

    def test_membership_computes_nothing(self, base, experts, monkeypatch):
        merged = task_arithmetic(base, experts)
        monkeypatch.setattr(Merge, "blocks", lambda *_: pytest.fail("a tensor was computed"))
        assert "a" in merged

    @pytest.mark.parametrize("piece", [1, 7, 64, 299])
    def test_pieces_do_not_show(self, base, experts, piece, monkeypatch):
        def merges():
            return {
                "linear": task_arithmetic(base, experts), "average": average(experts), "ties": ties(base, experts),
                "tensor": ties(base, experts, threshold="tensor", combine="sum"), "dare": dare(base, experts, drop=0.3),
                "dare-ties": dare(base, experts, drop=0.6, elect=True, combine="mean"),
                "breadcrumbs": breadcrumbs(base, experts),
            }  # fmt: skip

        base["b"][:150] = experts["e0"]["b"][:150]
        for expert in experts.values():
            expert["b"][:150] = base["b"][:150]  # equal in all models, in a part of the tensor
        before = {rule: dict(merge) for rule, merge in merges().items()}
        monkeypatch.setattr(engine, "PIECE", piece)
        for rule, merge in merges().items():
            for name in base:
                assert torch.equal(merge[name], before[rule][name]), (rule, name)

    def test_rules_that_need_whole_tensors_get_them(self, base, experts, monkeypatch):
        monkeypatch.setattr(engine, "PIECE", 5)
        assert torch.equal(Merge(Aligned(base, experts), _Whole())["b"], experts["e0"]["b"].flip(0))

    def test_a_rule_that_says_nothing(self, base, experts):
        with pytest.raises(TypeError, match="Rule does not say"):
            Merge(Aligned(base, experts), Rule())["a"]

    def test_saved_equals_in_memory_for_any_number_of_jobs(self, base, experts, tmp_path):
        merged = ties(base, experts, density=0.3)
        for jobs in (1, 3):
            save(merged, tmp_path / str(jobs), jobs=jobs)
        one, three = ((tmp_path / jobs / "model.safetensors").read_bytes() for jobs in "13")
        assert one == three
        loaded = Checkpoint(tmp_path / "3")
        assert all(torch.equal(loaded[name], merged[name]) for name in base)

    def test_merges_can_be_merged(self, base, experts):
        nested = average(
            {"x": task_arithmetic(base, experts, scale=0.2), "y": task_arithmetic(base, experts, scale=0.4)}
        )
        flat = task_arithmetic(base, experts, scale=0.3)
        assert all(torch.allclose(nested[name], flat[name], atol=1e-6) for name in base)

    def test_what_no_expert_changed_is_kept_bit_for_bit(self, base, experts):
        for expert in experts.values():
            expert["b"] = base["b"].clone()
        assert torch.equal(task_arithmetic(base, experts, scale=0.7)["b"], base["b"])

    def test_gradients_do_not_flow(self, base, experts):
        live = {name: value.requires_grad_() for name, value in experts["e0"].items()}
        assert not task_arithmetic(base, {"x": live})["a"].requires_grad

    def test_tensors_laid_out_in_another_order(self, base, experts):
        turned = {name: e | {"a": e["a"].T.contiguous().T} for name, e in experts.items()}
        assert torch.equal(task_arithmetic(base, turned)["a"], task_arithmetic(base, experts)["a"])

    def test_experts_of_another_type(self, base, experts):
        mixed = {name: {n: v.bfloat16() for n, v in expert.items()} for name, expert in experts.items()}
        wide = {name: {n: v.float() for n, v in expert.items()} for name, expert in mixed.items()}
        for rule in (lambda e: task_arithmetic(base, e), lambda e: ties(base, e), lambda e: dare(base, e)):
            merged, right = rule(mixed), rule(wide)
            assert merged["a"].dtype == torch.float32
            assert torch.equal(merged["a"], right["a"])

    def test_eight_bit_floats(self):
        base = {"w": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)}
        experts = {"x": {"w": torch.tensor([3.0, 2.0]).to(torch.float8_e4m3fn)}, "y": {"w": torch.tensor([1.0, 4.0])}}
        assert task_arithmetic(base, experts, scale=0.5)["w"].float().tolist() == [2.0, 3.0]

    def test_running_statistics_warn(self):
        with pytest.warns(UserWarning, match=r"'norm.running_var' is a running statistic: estimate it again"):
            average({"x": {"norm.running_var": torch.ones(2)}})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            average({"x": {"norm.weight": torch.ones(2)}})


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(
        "rule", ["average", "linear", "ties", "tensor", "dare", "dare-ties", "breadcrumbs", "fisher"]
    )
    def test_the_expert_and_tensor_are_named(self, base, experts, value, rule):
        experts["e1"]["b"][17] = value
        information = {name: {"b": torch.ones(300)} for name in experts}
        make = {
            "average": lambda: average(experts), "linear": lambda: task_arithmetic(base, experts),
            "ties": lambda: ties(base, experts, density=0.9), "tensor": lambda: ties(base, experts, threshold="tensor"),
            "dare": lambda: dare(base, experts, drop=0.9),
            "breadcrumbs": lambda: breadcrumbs(base, experts, top=0.1, density=0.1),
            "dare-ties": lambda: dare(base, experts, drop=0.9, elect=True, combine="mean"),
            "fisher": lambda: fisher(base, experts, information),
        }[rule]  # fmt: skip
        with pytest.raises(InputError, match="expert 'e1' has NaN or infinite values in 'b'"):
            dict(make())

    def test_the_base_is_named(self, base, experts):
        base["b"][3] = float("nan")
        with pytest.raises(InputError, match="the base has NaN or infinite values in 'b'"):
            task_arithmetic(base, experts)["b"]

    def test_without_a_base_the_first_expert_is_named(self, experts):
        experts["e0"]["b"][3] = float("nan")
        with pytest.raises(InputError, match="expert 'e0' has NaN"):
            average(experts)["b"]

    def test_in_what_all_models_share(self, base, experts):
        for model in (base, *experts.values()):
            model["b"] = torch.full((300,), float("inf"))
        with pytest.raises(InputError, match="the base has NaN or infinite values in 'b'"):
            task_arithmetic(base, experts)["b"]

    def test_values_that_do_not_fit(self, tmp_path):
        base, expert = {"w": torch.zeros(2)}, {"w": torch.full((2,), 60000.0)}
        with pytest.raises(InputError, match=r"values of 'w' do not fit torch.float16; choose a wider dtype"):
            save(task_arithmetic(base, {"x": expert}, scale=2.0), tmp_path / "out", dtype=torch.float16)
        large = {"w": torch.full((1000,), 3e38, dtype=torch.float32)}  # finite, though their sum is not
        assert torch.equal(average({"x": large, "y": {"w": large["w"] / 2}})["w"], torch.full((1000,), 2.25e38))


def test_reading_does_not_depend_on_the_file(base, experts, tmp_path):
    for name, value in {"base": base, **experts}.items():
        save_file(value, tmp_path / f"{name}.safetensors")
    disk = {name: Checkpoint(tmp_path / f"{name}.safetensors") for name in experts}
    for rule in (task_arithmetic, ties, breadcrumbs, dare):
        merged, right = rule(Checkpoint(tmp_path / "base.safetensors"), disk), rule(base, experts)
        assert all(torch.equal(merged[name], right[name]) for name in base)
