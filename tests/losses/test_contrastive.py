"""Contrastive losses and meters: a slow reference, limits, gradients, streaming, false negatives, bad input."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.losses.contrastive import ContrastiveLoss, MemoryBank, contrastive_loss, simple_contrastive_loss
from allrounder.losses.contrastive_meters import (
    align_uniform_loss,
    penalty_entropy,
    relative_penalty,
    tolerance,
    uniformity,
)


def sphere(n, d=6, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


@pytest.fixture
def views():
    a = sphere(8)
    return a, F.normalize(a + 0.3 * sphere(8, seed=1), dim=1)


def slow(a, p, negatives=None, temperature=None, alpha=1.0, same=None):
    """The losses of the card, anchor by anchor, in plain Python; `same[i][j]` leaves negative j out for anchor i."""
    found = []
    for i in range(len(a)):
        pool = p if negatives is None else negatives
        left_out = {i} if negatives is None else set()
        if same is not None:
            left_out |= {j for j in range(len(pool)) if same[i][j]}
        scores = sorted((float(a[i] @ pool[j]) for j in range(len(pool)) if j not in left_out), reverse=True)
        scores = scores[: math.ceil(alpha * len(scores) - 1e-9)]
        positive = float(a[i] @ p[i])
        if temperature is None:
            found.append(-positive + sum(scores) / len(scores))
        else:
            top = math.exp(positive / temperature)
            found.append(-math.log(top / (top + sum(math.exp(s / temperature) for s in scores))))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [0.07, 1.0, None])
@pytest.mark.parametrize("bank", [False, True])
def test_is_the_definition_anchor_by_anchor(views, alpha, temperature, bank):
    negatives = sphere(37, seed=2) if bank else None
    if temperature is None:
        found = simple_contrastive_loss(*views, negatives, hardest=alpha, block=5, reduction="none")
    else:
        found = contrastive_loss(*views, negatives, temperature=temperature, hardest=alpha, block=5, reduction="none")
    assert torch.allclose(found, slow(*views, negatives, temperature, alpha), rtol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("temperature", [0.2, None])
def test_gradients_are_right_in_every_input_and_block(views, alpha, temperature):
    a, p, n = (x.clone().requires_grad_() for x in (*views, sphere(12, seed=3)))

    def loss(a, p, n=None):
        u = (F.normalize(x, dim=1) if x is not None else None for x in (a, p, n))
        if temperature is None:
            return simple_contrastive_loss(*u, hardest=alpha, block=5)
        return contrastive_loss(*u, temperature=temperature, hardest=alpha, block=5)

    assert torch.autograd.gradcheck(loss, (a, p, n))
    assert torch.autograd.gradcheck(loss, (a, p))


@pytest.mark.parametrize("hardest", [1.0, 0.2])
def test_blocks_do_not_change_anything(views, hardest):
    bank, ids = sphere(100, seed=4), torch.arange(8) * 3
    results = []
    for block in (1, 7, 100, 8192):
        a, n = views[0].clone().requires_grad_(), bank.clone().requires_grad_()
        loss = contrastive_loss(a, views[1], n, temperature=0.1, hardest=hardest, ids=ids, block=block)
        results.append((loss, *torch.autograd.grad(loss, (a, n))))
    for other in results[1:]:
        assert all(torch.allclose(x, y, rtol=1e-10, atol=1e-14) for x, y in zip(results[0], other))


def test_pull_equals_push_and_the_relative_penalty_splits_it():
    s = sphere(1, 33, seed=5)[0]  # similarities as inner products with the unit basis
    temperature = 0.2
    basis = torch.eye(33, dtype=torch.float64)
    a = s[None].clone().requires_grad_()
    contrastive_loss(a, basis[:1], basis[1:], temperature=temperature).backward()
    pull, push = a.grad[0, 0], a.grad[0, 1:]
    assert pull < 0
    assert (push > 0).all()
    assert -pull.item() == pytest.approx(push.sum().item(), abs=1e-14)
    assert torch.allclose(push / -pull, relative_penalty(s[1:], temperature))


def test_entropy_of_the_penalty_rises_with_temperature_to_log_n():
    s = 2 * torch.rand(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    entropies = [penalty_entropy(s, t).item() for t in (0.07, 0.2, 1, 10, 1e4)]
    assert all(x < y for x, y in itertools.pairwise(entropies))
    assert entropies[-1] == pytest.approx(math.log(32), abs=1e-6)
    assert entropies[3] == pytest.approx(3.465, abs=2e-3)  # the card's figure, on its own draw
    assert penalty_entropy(torch.tensor([0.5, -torch.inf, 0.5]), 0.1).item() == pytest.approx(math.log(2))
    assert relative_penalty(s.half(), 0.001).sum().item() == pytest.approx(1)


def test_limit_of_small_temperatures_is_the_triplet_loss_without_margin(views):
    similarity = views[0] @ views[1].T
    positive = similarity.diagonal()
    nearest = similarity.masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf).amax(1)
    found = 1e-4 * contrastive_loss(*views, temperature=1e-4, reduction="none")
    assert torch.allclose(found, (nearest - positive).relu(), atol=1e-6)


def test_limit_of_large_temperatures_is_the_simple_loss(views):
    """To first order: -((N-1)/(N T)) s_ii + (1/(N T)) sum s_ik + log N."""
    for temperature, error in ((1e2, 1e-4), (1e4, 1e-8)):
        found = contrastive_loss(*views, temperature=temperature, reduction="none")
        simple = simple_contrastive_loss(*views, reduction="none")
        assert (found - math.log(8) - 7 / 8 * simple / temperature).abs().max() < error


def test_hard_with_everything_kept_is_the_plain_loss_and_fewer_negatives_lose_less(views):
    plain = contrastive_loss(*views, reduction="none")
    assert torch.equal(contrastive_loss(*views, hardest=1.0, reduction="none"), plain)
    assert torch.allclose(contrastive_loss(*views, hardest=0.999, reduction="none"), plain)
    assert (contrastive_loss(*views, hardest=0.3, reduction="none") < plain).all()
    simple = simple_contrastive_loss(*views, reduction="none")
    assert (simple_contrastive_loss(*views, hardest=0.3, reduction="none") > simple).all()


def test_hard_keeps_the_share_of_what_is_left_after_exclusion():
    anchors, bank = sphere(2), sphere(30, seed=6)
    ids = torch.tensor([0, 99])
    bank_ids = torch.tensor([0] * 20 + [1] * 10)  # anchor 0 keeps 10 negatives, anchor 1 all 30
    found = contrastive_loss(
        anchors, anchors, bank, hardest=0.1, ids=ids, negative_ids=bank_ids, temperature=0.3, reduction="none"
    )
    same = ids[:, None] == bank_ids
    assert torch.allclose(found, slow(anchors, anchors, bank, 0.3, 0.1, same))


def test_all_four_are_blind_to_a_common_rotation(views):
    turn = torch.linalg.qr(sphere(6, seed=7)).Q
    turned = [x @ turn for x in views]
    for hardest in (1.0, 0.3):
        assert torch.allclose(contrastive_loss(*views, hardest=hardest), contrastive_loss(*turned, hardest=hardest))
        assert torch.allclose(
            simple_contrastive_loss(*views, hardest=hardest), simple_contrastive_loss(*turned, hardest=hardest)
        )


def test_false_negatives_are_left_out_by_id(views):
    a, p = views
    ids = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7])  # pairs 0 and 3 show the same thing
    found = contrastive_loss(a, p, ids=ids, temperature=0.2, reduction="none")
    same = (ids[:, None] == ids).tolist()
    assert torch.allclose(found, slow(a, p, None, 0.2, same=same))
    bank = torch.cat([p, sphere(9, seed=8)])  # the anchors' own rows are the bank's first eight
    found = contrastive_loss(a, p, bank, ids=torch.arange(8), temperature=0.2, reduction="none")
    assert torch.allclose(found, slow(a, p, bank, 0.2, same=(torch.arange(8)[:, None] == torch.arange(17)).tolist()))
    assert (found < contrastive_loss(a, p, bank, temperature=0.2, reduction="none")).all()


def test_simclr_is_a_choice_of_negatives(views):
    a, p = views
    z, i = torch.cat([a, p]), torch.arange(8).repeat(2)
    found = contrastive_loss(z, torch.cat([p, a]), z, ids=i, negative_ids=i, temperature=0.5)
    logits = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    assert torch.allclose(found, F.cross_entropy(logits, torch.arange(16).roll(8)))


def test_is_cross_entropy_of_similarities_in_the_batch(views):
    logits = views[0] @ views[1].T / 0.1
    assert torch.allclose(contrastive_loss(*views, temperature=0.1), F.cross_entropy(logits, torch.arange(8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_works_at_small_temperatures(dtype):
    a, p, n = (sphere(8, seed=s, dtype=torch.float32).to(dtype).requires_grad_() for s in range(3))
    loss = contrastive_loss(a, p, n, temperature=0.005)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    for x in (a, p, n):
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all()
    wide = contrastive_loss(a.double(), p.double(), n.double(), temperature=0.005)
    assert wide.dtype == torch.float64
    assert loss.item() == pytest.approx(wide.item(), rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(a, p, n, temperature=0.005).item() == pytest.approx(loss.item(), rel=1e-6)


def test_module_normalises_and_matches_the_functions(views):
    a, p = views
    assert torch.allclose(ContrastiveLoss(0.2, 0.5)(3 * a, 2 * p), contrastive_loss(a, p, temperature=0.2, hardest=0.5))
    simple = ContrastiveLoss(None)
    assert torch.allclose(simple(3 * a, 2 * p, 5 * a), simple_contrastive_loss(a, p, a))
    ids = torch.arange(8)
    found = ContrastiveLoss(0.2)(a, p, 2 * p, ids, ids)
    assert torch.allclose(found, contrastive_loss(a, p, temperature=0.2))
    assert simple.state_dict() == {}
    assert "temperature=0.2" in repr(ContrastiveLoss(0.2))


def test_inputs_are_not_changed(views):
    before = [x.clone() for x in views]
    bank = sphere(9)
    kept = bank.clone()
    contrastive_loss(*views, bank, hardest=0.5)
    uniformity(views[0]), tolerance(views[0], torch.arange(8) % 2)
    assert all(torch.equal(x, y) for x, y in zip((*views, bank), (*before, kept)))


def test_bank_moves_halfway_stays_on_the_sphere_and_loads():
    bank = MemoryBank(10, 4, seed=3)
    assert torch.equal(bank.features, MemoryBank(10, 4, seed=3).features)
    assert not torch.equal(bank.features, MemoryBank(10, 4, seed=4).features)
    before, new, ids = bank.features.clone(), sphere(2, 4, dtype=torch.float32).requires_grad_(), torch.tensor([7, 2])
    bank.update(ids, new)
    assert torch.allclose(bank.features[ids], F.normalize(before[ids] + new.detach(), dim=1))
    rest = [i for i in range(10) if i not in (2, 7)]
    assert torch.equal(bank.features[rest], before[rest])
    assert not bank.features.requires_grad
    other = MemoryBank(10, 4)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.features, bank.features)
    rows, picked = bank.sample(6, torch.Generator().manual_seed(0))
    again, _ = bank.sample(6, torch.Generator().manual_seed(0))
    assert len(picked.unique()) == 6
    assert torch.equal(rows, bank.features[picked])
    assert torch.equal(rows, again)


def test_uniformity_is_the_mean_over_distinct_pairs():
    for n in (5, 1500):  # the second spans two blocks
        x = sphere(n)
        slow_value = -math.log((-2 * torch.pdist(x) ** 2).exp().mean().item())
        assert uniformity(x).item() == pytest.approx(slow_value, rel=1e-10)
    assert uniformity(sphere(1).expand(4, 6)).item() == pytest.approx(0, abs=1e-12)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(poles).item() == pytest.approx(8)
    assert uniformity(poles, t=1.0).item() == pytest.approx(4)


def test_tolerance_over_all_pairs_and_within_classes():
    x, labels = sphere(12), torch.arange(12) % 3
    total, pairs = 0.0, 0
    for i in range(12):
        for j in range(12):
            if i != j and labels[i] == labels[j]:
                total, pairs = total + float(x[i] @ x[j]), pairs + 1
    found = tolerance(x, labels)
    assert found.all_pairs == pytest.approx(total / (12 * 11))
    assert found.conditional == pytest.approx(total / pairs)
    assert tolerance(sphere(1).expand(12, 6), labels).conditional == pytest.approx(1)
    assert tolerance(sphere(1).expand(12, 6), labels).all_pairs == pytest.approx(pairs / 132)


def test_align_uniform_loss_is_its_two_terms_and_differentiates(views):
    a, p = views
    terms = ((a - p) ** 2).sum(1).mean(), (uniformity(a) + uniformity(p)) / 2
    assert torch.allclose(align_uniform_loss(a, p), terms[0] - terms[1])
    assert torch.allclose(align_uniform_loss(a, p, weight=0.5), terms[0] - 0.5 * terms[1])
    raw = a.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: align_uniform_loss(F.normalize(x, dim=1), p), raw)


A = sphere(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrastive_loss(2 * A, A), "normalize"),
        (lambda: contrastive_loss(A, 2 * A), "positives are rows of unit"),
        (lambda: contrastive_loss(A, A, 2 * A), "negatives are rows of unit"),
        (lambda: contrastive_loss(A * torch.nan, A), "unit length"),
        (lambda: contrastive_loss(A, A, temperature=0), "temperature is"),
        (lambda: contrastive_loss(A, A, temperature=float("nan")), "temperature is"),
        (lambda: ContrastiveLoss(-1.0), "temperature is"),
        (lambda: contrastive_loss(A, A, hardest=0), "hardest is"),
        (lambda: ContrastiveLoss(hardest=1.5), "hardest is"),
        (lambda: contrastive_loss(A, A, hardest=0.3), "below 1"),
        (lambda: contrastive_loss(A[:1], A[:1]), "batch of 1"),
        (lambda: contrastive_loss(A[:0], A[:0]), "m >= 1"),
        (lambda: contrastive_loss(A, A[:2]), "both"),
        (lambda: contrastive_loss(A, A, A[:, :2]), "negatives are"),
        (lambda: contrastive_loss(A, A, A[:0]), "negatives are"),
        (lambda: contrastive_loss(A, A, block=0), "block"),
        (lambda: contrastive_loss(A, A, ids=torch.zeros(4, dtype=torch.long)), "anchor 0 has no negatives"),
        (lambda: contrastive_loss(A, A, ids=torch.zeros(3, dtype=torch.long)), "ids are 4 integers"),
        (lambda: contrastive_loss(A, A, ids=torch.zeros(4)), "ids are 4 integers"),
        (lambda: contrastive_loss(A, A, negative_ids=torch.arange(4)), "negative_ids need negatives"),
        (lambda: contrastive_loss(A, A, A, negative_ids=torch.arange(4)), "need the anchors' ids"),
        (lambda: contrastive_loss(A, A, A, ids=torch.arange(4), negative_ids=torch.arange(3)), "4 integers"),
        (lambda: contrastive_loss(A, A, reduction="max"), "reduction is"),
        (lambda: simple_contrastive_loss(A, A, weight=-1), "weight is"),
        (lambda: align_uniform_loss(A, A, weight=-1), "weight is"),
        (lambda: align_uniform_loss(A, A[:2]), "both"),
        (lambda: relative_penalty(torch.zeros(3), 0), "temperature is"),
        (lambda: relative_penalty(torch.full((3,), torch.nan), 1), "NaN"),
        (lambda: uniformity(A[:1]), "n >= 2"),
        (lambda: uniformity(3 * A), "unit length"),
        (lambda: uniformity(A, t=0), "t is above"),
        (lambda: tolerance(A, torch.arange(3)), "features are"),
        (lambda: tolerance(A, torch.arange(4)), "two examples"),
        (lambda: MemoryBank(1, 4), "a bank has"),
        (lambda: MemoryBank(4, 4, momentum=1.0), "momentum is"),
        (lambda: MemoryBank(4, 3).update(torch.tensor([1, 1]), A[:2]), "each once"),
        (lambda: MemoryBank(4, 3).update(torch.tensor([1, 4]), A[:2]), "each once"),
        (lambda: MemoryBank(4, 3).update(torch.tensor([1]), A[:2]), "features"),
        (lambda: MemoryBank(4, 3).update(torch.tensor([1]), 2 * A[:1]), "unit length"),
        (lambda: MemoryBank(4, 3).sample(5, torch.Generator()), "count is"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
