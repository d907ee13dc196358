"""Data-free rules: the card's numbers, slow references written from the papers, limits and identities."""

import itertools

import pytest
import torch

from allrounder.errors import InputError
from allrounder.merging.baselines import (
    analogy,
    average,
    breadcrumbs,
    dare,
    greedy_soup,
    negate,
    task_arithmetic,
    ties,
)  # fmt: skip
from allrounder.merging.engine import Aligned
from allrounder.merging.radix_select import kth_largest

CARD = ((3, -1, 0.5, 2, -4, 0.1), (1, 2, -0.4, -2.5, -3, 0.2), (-2, 0.3, 0.6, 1, 5, -0.3))


def made(seed=0, count=3, shapes=((40, 7), (33,), ()), dtype=torch.float32, grid=None):
    """A base and experts; with `grid` task vectors are multiples of it, so that they tie and cancel exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        values = {f"w{i}": torch.randn(shape, generator=generator) * scale for i, shape in enumerate(shapes)}
        return values if grid is None else {name: (value / grid).round() * grid for name, value in values.items()}

    base = {name: value.to(dtype) for name, value in draw(1.0).items()}
    experts = {}
    for k in range(count):
        experts[f"e{k}"] = {name: base[name] + value.to(dtype) for name, value in draw(0.3).items()}
    return base, experts


def rows(*values):
    """A base of zeros and experts with these entries."""
    return {"w": torch.zeros(len(values[0]))}, {f"e{k}": {"w": torch.tensor(row)} for k, row in enumerate(values)}


def stacked(base, experts, name):
    return torch.stack([expert[name].double() - base[name].double() for expert in experts.values()])


def equal(merged, right):
    return all(torch.equal(merged[name], right[name]) for name in right)


def close(merged, right, atol=1e-6):
    return all(torch.allclose(merged[name].double(), right[name].double(), rtol=0, atol=atol) for name in right)


class TestAverage:
    def test_is_the_mean(self):
        base, experts = made()
        right = {n: base[n].double() + stacked(base, experts, n).mean(0) for n in base}
        assert close(average(experts), right)

    def test_weights_are_normalised(self):
        _, experts = made()
        assert equal(average(experts, weights=[2, 4, 2]), dict(average(experts, weights=[0.25, 0.5, 0.25])))

    def test_one_weight_takes_that_expert(self):
        _, experts = made()
        assert equal(average(experts, weights=[0, 1, 0]), experts["e1"])

    @pytest.mark.parametrize("count", [1, 2, 3, 7])
    def test_identical_experts_are_returned_bit_for_bit(self, count):
        _, experts = made()
        assert equal(average({str(k): dict(experts["e0"]) for k in range(count)}), experts["e0"])

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1, 1], "one weight for each of 3 experts, got 2"),
            ([1, -1, 1], "not negative and not all zero"),
            ([0, 0, 0], "not all zero"),
            ([1, float("nan"), 1], "a weight is a finite number, got nan"),
        ],
    )
    def test_bad_weights(self, weights, message):
        with pytest.raises(InputError, match=message):
            average(made()[1], weights=weights)

    def test_no_experts(self):
        with pytest.raises(InputError, match="at least one expert"):
            average({})


class TestGreedySoup:
    """Scores that follow from the value of a single entry: 1 - |value - 5|."""

    @staticmethod
    def score(weights):
        return 1 - abs(weights["w"].item() - 5)

    def soup(self, *values):
        return greedy_soup({str(v): {"w": torch.tensor(float(v))} for v in values}, self.score)

    def test_takes_what_does_not_lower_the_score(self):
        soup, names = self.soup(4, 9, 6.5)  # 4; (4 + 6.5) / 2 = 5.25 is better; with 9: 6.5 is worse
        assert names == ["4", "6.5"]
        assert soup["w"].item() == 5.25

    def test_a_tie_is_taken(self):
        assert self.soup(4, 6, 0)[1] == ["4", "6"]
        assert greedy_soup({"a": {"w": torch.tensor(4.0)}, "b": {"w": torch.tensor(4.0)}}, self.score)[1] == ["a", "b"]

    def test_is_at_least_as_good_as_the_best(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            values = (10 * torch.rand(5, generator=generator)).tolist()
            soup, names = self.soup(*values)
            assert self.score(soup) >= max(1 - abs(v - 5) for v in values) - 1e-6
            assert len(names) >= 1

    def test_no_experts_and_no_score(self):
        with pytest.raises(InputError, match="a soup needs at least one expert"):
            greedy_soup({}, self.score)
        with pytest.raises(InputError, match="the score of a is NaN"):
            greedy_soup({"a": {"w": torch.zeros(1)}}, lambda _: float("nan"))


class TestTaskArithmetic:
    def test_one_over_k_is_averaging(self):
        for count in (1, 2, 3, 8):
            base, experts = made(count=count)
            assert close(task_arithmetic(base, experts, scale=1 / count), dict(average(experts)), atol=1e-7 * count)

    def test_one_expert_with_scale_one_is_that_expert(self):
        base, experts = made(count=1)
        assert equal(task_arithmetic(base, experts, scale=1.0), experts["e0"])

    def test_scale_zero_is_the_base(self):
        base, experts = made()
        assert equal(task_arithmetic(base, experts, scale=0.0), base)

    def test_is_the_equation(self):
        base, experts = made()
        right = {n: base[n].double() + 0.3 * stacked(base, experts, n).sum(0) for n in base}
        assert close(task_arithmetic(base, experts), right)

    def test_negation_undoes_addition(self):
        base, experts = made(count=1)
        added = dict(task_arithmetic(base, experts, scale=0.4))
        assert close(negate(added, {n: 2 * added[n] - base[n] for n in base}, scale=1.0), base)
        right = {n: base[n] - 0.4 * (experts["e0"][n] - base[n]) for n in base}
        assert close(negate(base, experts["e0"], scale=0.4), right)

    def test_analogy(self):
        base, experts = made()
        a, b, c = experts.values()
        right = {n: base[n].double() + 0.5 * (c[n].double() - base[n] + b[n] - a[n]) for n in base}
        assert close(analogy(base, a, b, c, scale=0.5), right)
        assert close(analogy(base, a, a, c), c)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf")])
    def test_bad_scale(self, scale):
        base, experts = made(count=1)
        one = experts["e0"]
        for make in (
            lambda: task_arithmetic(base, experts, scale=scale), lambda: negate(base, one, scale=scale),
            lambda: analogy(base, one, one, one, scale=scale), lambda: ties(base, experts, scale=scale),
            lambda: dare(base, experts, scale=scale), lambda: breadcrumbs(base, experts, scale=scale),
        ):  # fmt: skip
            with pytest.raises(InputError, match="scale is a finite number"):
                make()


class TestKthLargest:
    @pytest.mark.parametrize("grid", [None, 0.125, 2.0])
    @pytest.mark.parametrize("count", [1, 4])
    def test_equals_sorting(self, grid, count):
        base, experts = made(count=count, grid=grid)
        entries = sum(value.numel() for value in base.values())
        ranks = [1, 2, 17, entries // 2, entries - 1, entries]
        found = kth_largest(Aligned(base, experts), list(base), ranks)
        for row, expert in zip(found, experts.values(), strict=True):
            size = torch.cat([(expert[n] - base[n]).abs().flatten() for n in base]).sort(descending=True).values
            assert row.tolist() == [size[rank - 1].item() for rank in ranks]

    def test_over_many_magnitudes(self):
        values = [sign * 10.0**power for power in range(-44, 38) for sign in (1.0, -1.0)]
        base, experts = rows(values)
        found = kth_largest(Aligned(base, experts), ["w"], [1, 83, 164])
        size = torch.tensor(values).abs().sort(descending=True).values
        assert found[0].tolist() == [size[0].item(), size[82].item(), size[163].item()]

    def test_not_finite(self):
        base, experts = rows([1.0, 2.0], [float("nan"), 1.0])
        with pytest.raises(InputError, match="expert 'e1' has NaN or infinite values in 'w'"):
            kth_largest(Aligned(base, experts), ["w"], [2])

    def test_of_several_blocks(self):
        entries = (1 << 18) + 12345
        base, experts = made(count=2, shapes=((entries,),))
        found = kth_largest(Aligned(base, experts), ["w0"], [50_000])
        for row, expert in zip(found, experts.values(), strict=True):
            size = (expert["w0"] - base["w0"]).abs()
            assert row.item() == size.kthvalue(entries - 50_000 + 1).values.item()


def slow_ties(base, experts, density, scale, combine, threshold):
    """TIES from the paper: sort, trim, elect, merge; float64, one tensor of all entries."""

    def cut(tau):
        keep = max(1, round(density * tau.shape[1]))
        least = tau.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
        return tau * (tau.abs() >= least)

    taus = {n: stacked(base, experts, n).reshape(len(experts), -1) for n in base}
    if threshold == "global":
        trimmed = dict(zip(taus, cut(torch.cat(list(taus.values()), 1)).split([t.shape[1] for t in taus.values()], 1)))
    else:
        trimmed = {n: cut(tau) for n, tau in taus.items()}
    votes = {n: tau.sum(0).sign() for n, tau in trimmed.items()}
    fallback = -1.0 if sum(vote.sum() for vote in votes.values()) < 0 else 1.0
    out = {}
    for n, tau in trimmed.items():
        sign = torch.where(votes[n] == 0, fallback, votes[n])
        agree = tau * ((tau.sign() == sign) & (tau != 0))
        merged = agree.sum(0)
        if combine == "mean":
            merged = merged / (agree != 0).sum(0).clamp(min=1)
        out[n] = base[n].double() + scale * merged.view(base[n].shape)
    return out


class TestTies:
    def test_the_cards_example(self):
        base, experts = rows(*CARD)
        for combine, right in (("mean", (3, 2, 0, 1.5, -3.5, 0)), ("sum", (3, 2, 0, 3, -7, 0))):
            for threshold in ("global", "tensor"):
                merged = ties(base, experts, density=0.5, combine=combine, threshold=threshold)
                assert merged["w"].tolist() == list(right)

    @pytest.mark.parametrize("threshold", ["global", "tensor"])
    @pytest.mark.parametrize("combine", ["mean", "sum"])
    @pytest.mark.parametrize("density", [0.01, 0.2, 0.63, 1.0])
    @pytest.mark.parametrize("grid", [None, 0.25])
    def test_equals_the_slow_reference(self, density, combine, threshold, grid):
        for seed, count in ((0, 2), (1, 5)):
            base, experts = made(seed, count, grid=grid)
            merged = ties(base, experts, density=density, scale=0.7, combine=combine, threshold=threshold)
            assert close(merged, slow_ties(base, experts, density, 0.7, combine, threshold))

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_an_even_vote_takes_the_sign_of_all_votes(self, sign):
        base, experts = rows([2 * sign, 3.0, sign], [sign, -3.0, sign])
        merged = ties(base, experts, density=1.0, combine="sum")
        assert merged["w"].tolist() == [3 * sign, 3 * sign, 2 * sign]
        base, experts = rows([1.0, -1.0, 5.0], [1.0, -1.0, -5.0])  # even in all: positive
        assert ties(base, experts, density=1.0)["w"].tolist() == [1.0, -1.0, 5.0]

    def test_the_fallback_counts_all_tensors(self):
        base = {"a": torch.zeros(1), "b": torch.zeros(3)}
        experts = {
            "x": {"a": torch.tensor([4.0]), "b": -torch.ones(3)},
            "y": {"a": torch.tensor([-4.0]), "b": -torch.ones(3)},
        }
        assert ties(base, experts, density=1.0)["a"].tolist() == [-4.0]
        assert ties(base, experts, density=1.0, threshold="tensor")["a"].tolist() == [-4.0]

    def test_identical_experts(self):
        base, experts = made()
        same = {str(k): experts["e0"] for k in range(4)}
        assert close(ties(base, same, density=1.0), experts["e0"], atol=1e-7)
        right = {n: base[n] + 4 * (experts["e0"][n] - base[n]) for n in base}
        assert close(ties(base, same, density=1.0, combine="sum"), right)

    def test_density_one_with_one_sign_is_averaging_and_task_arithmetic(self):
        base, experts = made()
        for expert in experts.values():
            for name, value in expert.items():
                expert[name] = base[name] + (value - base[name]).abs()
        assert close(ties(base, experts, density=1.0), dict(average(experts)))
        assert close(ties(base, experts, density=1.0, combine="sum", scale=0.3), dict(task_arithmetic(base, experts)))

    def test_keeps_exactly_the_share(self):
        base, experts = made(count=1, shapes=((100, 10),))
        changed = (ties(base, experts, density=0.123)["w0"] != base["w0"]).sum()
        assert changed == 123

    def test_mostly_zero_task_vectors_keep_all_they_have(self):
        values = [0.0] * 95 + [1.0, -2.0, 3.0, -4.0, 5.0]
        base, experts = rows(values)
        assert ties(base, experts, density=0.2)["w"].tolist() == values

    def test_ties_with_the_last_one_are_kept(self):
        base, experts = rows([1.0, -1.0, 1.0, 0.5])
        assert ties(base, experts, density=0.25)["w"].tolist() == [1.0, -1.0, 1.0, 0.0]

    def test_global_and_tensor_thresholds_differ(self):
        base = {"a": torch.zeros(4), "b": torch.zeros(4)}
        expert = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([0.4, 0.3, 0.2, 0.1])}
        merged = ties(base, {"x": expert}, density=0.5)
        assert merged["a"].tolist() == [9, 8, 7, 6]
        assert not merged["b"].any()
        merged = ties(base, {"x": expert}, density=0.5, threshold="tensor")
        assert merged["a"].tolist() == [9, 8, 0, 0]
        assert merged["b"].tolist() == pytest.approx([0.4, 0.3, 0, 0])

    def test_float64(self):
        base, experts = made(dtype=torch.float64)
        merged = ties(base, experts, density=0.3)
        assert close(merged, slow_ties(base, experts, 0.3, 1.0, "mean", "global"), atol=1e-14)

    def test_bad_input(self):
        base, experts = made()
        with pytest.raises(InputError, match=r"density is a share in \(0, 1\], got 20; did you mean 0.2\?"):
            ties(base, experts, density=20)
        for density in (0, -0.1, 1.5, float("nan")):
            with pytest.raises(InputError, match="density is a share"):
                ties(base, experts, density=density)
        with pytest.raises(InputError, match="combine is 'sum' or 'mean', got 'max'"):
            ties(base, experts, combine="max")
        with pytest.raises(InputError, match="threshold is 'global' or 'tensor', got 'layer'"):
            ties(base, experts, threshold="layer")


class TestDare:
    def test_dropping_nothing_is_task_arithmetic(self):
        base, experts = made()
        assert close(dare(base, experts, drop=0.0), dict(task_arithmetic(base, experts)))
        assert close(dare(base, experts, drop=0.0, scale=1.0, combine="mean"), dict(average(experts)))

    def test_dropping_nothing_with_election_is_ties(self):
        base, experts = made(grid=0.25)
        right = dict(ties(base, experts, density=1.0, scale=0.3))
        assert equal(dare(base, experts, drop=0.0, elect=True, combine="mean"), right)

    @pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
    def test_entries_are_dropped_or_rescaled(self, drop):
        base, experts = rows((torch.arange(2000.0) + 1).tolist())
        merged = dare(base, experts, drop=drop, scale=1.0)["w"]
        kept = merged != 0
        assert torch.allclose(merged[kept], (experts["e0"]["w"] / (1 - drop))[kept])
        assert abs(kept.double().mean() - (1 - drop)) < 4 * (drop * (1 - drop) / 2000) ** 0.5

    def test_mean_and_variance_over_draws(self):
        tau, drop, draws = torch.tensor([1.0, -2.0, 0.5]), 0.9, 10_000
        base, experts = {"w": torch.zeros(3 * draws)}, {"x": {"w": tau.repeat(draws)}}
        found = dare(base, experts, drop=drop, scale=1.0, seed=3)["w"].view(draws, 3).double()
        sigma = tau.abs() * (drop / (1 - drop) / draws) ** 0.5
        assert ((found.mean(0) - tau).abs() < 4 * sigma).all()
        assert torch.allclose(found.var(0), (drop / (1 - drop) * tau**2).double(), rtol=0.1)

    def test_seeds_experts_and_tensors_draw_for_themselves(self):
        ones = torch.ones(4000)
        base = {"a": torch.zeros(4000), "b": torch.zeros(4000)}
        experts = {"x": {"a": ones, "b": ones}, "y": {"a": ones, "b": ones}}

        def drawn(label, name, seed):
            return dare(base, {label: experts[label]}, drop=0.5, seed=seed)[name] != 0

        masks = [drawn(*key) for key in itertools.product("xy", "ab", (0, 1))]
        for one, other in itertools.combinations(masks, 2):
            assert 0.4 < (one == other).double().mean() < 0.6  # independent: a half

    def test_an_entrys_fate_does_not_depend_on_other_experts(self):
        base, experts = made(count=3)
        alone = dare(base, {"e2": experts["e2"]}, drop=0.5, scale=1.0)
        others = dare(base, {n: experts[n] for n in ("e0", "e1")}, drop=0.5, scale=1.0)
        both = dare(base, experts, drop=0.5, scale=1.0)
        assert close(both, {n: alone[n] + others[n] - base[n] for n in base}, atol=1e-5)

    def test_draws_of_a_seed_never_change(self):
        base, experts = rows([1.0] * 12)
        assert (dare(base, experts, drop=0.5, seed=7)["w"] != 0).int().tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]

    def test_large_tensors_take_several_streams(self):
        size = (1 << 16) + 1000
        base, experts = {"w": torch.zeros(size)}, {"x": {"w": torch.ones(size)}}
        kept = dare(base, experts, drop=0.5)["w"] != 0
        assert 0.4 < (kept[:1000] == kept[1 << 16 :]).double().mean() < 0.6

    def test_bad_input(self):
        base, experts = made()
        for drop in (1.0, -0.1, 90):
            with pytest.raises(InputError, match=r"drop is a share in \[0, 1\)"):
                dare(base, experts, drop=drop)


class TestBreadcrumbs:
    def test_equals_the_slow_reference(self):
        base, experts = made(count=4, shapes=((50, 11), (300,)))
        for density, top in ((0.9, 0.01), (0.5, 0.2), (0.3, 0.0)):
            right = {}
            for n in base:
                tau = stacked(base, experts, n).reshape(len(experts), -1)
                size, n_entries = tau.abs(), tau.shape[1]
                order = size.argsort(1, descending=True).argsort(1)  # 0 = largest
                keep = (order >= round(top * n_entries)) & (order < round((top + density) * n_entries))
                right[n] = base[n].double() + 0.3 * (tau * keep).sum(0).view(base[n].shape)
            assert close(breadcrumbs(base, experts, density=density, top=top), right)

    def test_keeps_exactly_the_share(self):
        base, experts = made(count=1, shapes=((1000,),))
        merged = breadcrumbs(base, experts, density=0.85, top=0.01)["w0"]
        order = (experts["e0"]["w0"] - base["w0"]).abs().argsort(descending=True)
        changed = (merged != base["w0"])[order]
        assert not changed[:10].any()
        assert changed[10:860].all()
        assert not changed[860:].any()

    def test_everything_is_task_arithmetic(self):
        base, experts = made()
        right = dict(task_arithmetic(base, experts))
        assert close(breadcrumbs(base, experts, density=1.0, top=0.0), right)

    def test_entries_of_one_size_are_kept(self):
        values = [1.0, -1.0, 1.0, -1.0]
        base, experts = rows(values)
        assert breadcrumbs(base, experts, density=0.5, top=0.25, scale=1.0)["w"].tolist() == values

    def test_a_single_entry_is_kept(self):
        base, experts = rows([2.0])
        assert breadcrumbs(base, experts, density=0.4, top=0.6, scale=1.0)["w"].tolist() == [2.0]

    def test_bad_input(self):
        base, experts = made()
        with pytest.raises(InputError, match=r"density \+ top is at most 1, got 0.9 \+ 0.2"):
            breadcrumbs(base, experts, density=0.9, top=0.2)
        with pytest.raises(InputError, match=r"top is a share in \[0, 1\), got 1"):
            breadcrumbs(base, experts, density=0.1, top=1)
