"""Self-Positioning: the exact properties of its card."""

import math

import pytest
import torch

import allrounder as ar
from allrounder.merging import Aligned, info_nce, self_positioning, slerp, task_arithmetic
from allrounder.merging.self_positioning import fold, gram


def direct_fold(vectors, weights):
    """The fold on the vectors themselves, as the paper writes it."""
    held = vectors[0]
    for n in range(1, len(vectors)):
        cosine = held @ vectors[n] / held.norm() / vectors[n].norm()
        angle = math.acos(cosine.clamp(-1, 1))
        share = weights[n] / (sum(weights[:n]) / n + weights[n])
        held = (math.sin((1 - share) * angle) * held + math.sin(share * angle) * vectors[n]) / math.sin(angle)
    return held


def pair(weights):
    experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    return slerp({"w": torch.zeros(2)}, experts, weights)["w"]


def test_numbers_of_the_card():
    torch.testing.assert_close(pair([1, 1]), torch.tensor([0.7071, 1.4142]), atol=1e-4, rtol=0)
    torch.testing.assert_close(pair([3, 1]), torch.tensor([0.9239, 0.7654]), atol=1e-4, rtol=0)
    torch.testing.assert_close(pair([1, 1e-9]), torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(pair([1e-9, 1]), torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0)


def test_the_fold_by_inner_products_is_the_direct_fold():
    vectors = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = [1.0, 2.0, 0.5, 3.0]
    coefficients = fold(torch.tensor(weights, dtype=torch.float64), vectors @ vectors.T)
    torch.testing.assert_close(coefficients @ vectors, direct_fold(vectors, weights), rtol=0, atol=1e-12)
    backwards = fold(torch.tensor(weights[::-1], dtype=torch.float64), vectors.flip(0) @ vectors.flip(0).T)
    assert (backwards @ vectors.flip(0) - coefficients @ vectors).norm() > 0.1 * (coefficients @ vectors).norm()


def test_equal_norms_are_kept_and_only_ratios_count():
    vectors = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0].T
    products = vectors @ vectors.T
    weights = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)
    folded = fold(weights, products) @ vectors
    torch.testing.assert_close(folded.norm().item(), 1.0)
    torch.testing.assert_close(fold(5 * weights, products), fold(weights, products))
    gradient = torch.autograd.grad(folded[0], weights)[0]
    assert abs((gradient @ weights).item()) < 1e-12  # none along the weights themselves


def test_parallel_vectors_are_interpolated_and_opposite_ones_refused():
    one = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(
        fold(torch.ones(2, dtype=torch.float64), one), torch.full((2,), 0.5, dtype=torch.float64)
    )
    with pytest.raises(ar.InputError, match="'b' is opposite"):
        fold(torch.ones(2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), names=["a", "b"])
    with pytest.raises(ar.InputError, match="'b' is zero"):
        fold(torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), names=["a", "b"])


def test_gram_is_that_of_the_task_vectors(toy):
    models = Aligned(toy.base, toy.experts)
    taus = torch.stack([torch.cat([(e[n] - toy.base[n]).flatten() for n in toy.base]) for e in toy.experts.values()])
    torch.testing.assert_close(gram(models), taus @ taus.T)
    one = torch.stack([(e["0.bias"] - toy.base["0.bias"]) for e in toy.experts.values()])
    torch.testing.assert_close(gram(models, ["0.bias"]), one @ one.T)


def test_one_expert_is_scaled(toy):
    only = {"a": toy.experts["a"]}
    merge, expected = slerp(toy.base, only, scale=0.7), task_arithmetic(toy.base, only, scale=0.7)
    assert all(torch.equal(merge[name], expected[name]) for name in toy.base)


def test_without_steps_it_is_uniform_slerp(toy):
    found = self_positioning(toy.model, toy.base, toy.experts, toy.data, steps=0)
    expected = slerp(toy.base, toy.experts)
    for name in toy.base:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    assert found.rule.order == ("a", "b")
    assert found.rule.weights == pytest.approx((1.0, 1.0))


def test_it_learns_weights_and_scale(toy):
    found = self_positioning(toy.model, toy.base, toy.experts, toy.data, steps=60, lr=5e-2, mu=0.0)
    assert sum(found.history[-3:]) < sum(found.history[:3])
    refolded = slerp(toy.base, toy.experts, found.rule.weights, found.rule.scale)
    for name in toy.base:
        torch.testing.assert_close(found[name], refolded[name], rtol=1e-6, atol=1e-6)
    same = self_positioning(toy.model, toy.base, toy.experts, toy.data, steps=60, lr=5e-2, mu=0.0)
    assert same.rule.coefficients == found.rule.coefficients


def test_a_high_price_of_the_scale_ends_at_the_base(toy):
    found = self_positioning(toy.model, toy.base, toy.experts, toy.data, steps=60, lr=5e-2, mu=1000.0)
    assert 0 <= found.rule.scale < 0.06


def test_an_objective_takes_any_batch(toy):
    pairs = {"a": [(x, x + 0.01) for x, _ in toy.data["a"][:1]]}

    def objective(model, batch, task):
        return info_nce(model(batch[0], task), model(batch[1], task), temperature=0.1)

    found = self_positioning(toy.model, toy.base, toy.experts, pairs, objective=objective, steps=20)
    assert found.history[-1] < found.history[0]


def test_info_nce_is_cross_entropy_of_cosines():
    queries, documents = torch.randn(3, 4), torch.randn(5, 4)
    total = 0.0
    for i, query in enumerate(queries):
        cosines = [torch.cosine_similarity(query, document, dim=0) / 0.1 for document in documents]
        total -= (cosines[i] - torch.stack(cosines).logsumexp(0)).item() / 3
    assert info_nce(queries, documents, 0.1).item() == pytest.approx(total, rel=1e-5)
    with pytest.raises(ar.InputError, match="M >= N"):
        info_nce(documents, queries)
    with pytest.raises(ar.InputError, match="above 0, got 0"):
        info_nce(queries, documents, 0.0)


def test_bad_input_is_named(toy):
    with pytest.raises(ar.InputError, match="2 positive weights"):
        slerp(toy.base, toy.experts, [1.0, 0.0])
    with pytest.raises(ar.InputError, match="at least 0, got -1"):
        self_positioning(toy.model, toy.base, toy.experts, toy.data, mu=-1)
    with pytest.raises(ar.InputError, match="'same' is zero"):
        self_positioning(toy.model, toy.base, {"same": dict(toy.base)}, toy.data)
    many = {str(i): {n: v + torch.randn_like(v) for n, v in toy.base.items()} for i in range(11)}
    with pytest.warns(UserWarning, match="11 experts"):
        self_positioning(toy.model, toy.base, many, toy.data, steps=0)
