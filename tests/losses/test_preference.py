"""Closed forms of preference losses: values by hand and by trl's own functions, limits, bad input."""

import inspect
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.losses.preference import (
    LOSSES,
    PreferenceLoss,
    ccpo,
    ce,
    cpo,
    cunl,
    dpo,
    dpo_hinge,
    dpo_robust,
    dpop,
    ipo,
    log1mexp,
    orpo,
    rrhf,
    sequence_log_probs,
    simpo,
    slic,
    uncpo,
    unlikelihood,
)

REFERENCE = [name for name, function in LOSSES.items() if "log_r_w" in inspect.signature(function).parameters]


def pairs(count=6, dtype=torch.float64, seed=0):
    """log p_w, log p_l, log r_w, log r_l of answers between e^-6 and e^-0.1, and token counts."""
    generator = torch.Generator().manual_seed(seed)
    values = [-0.1 - 6 * torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = tuple(torch.randint(1, 9, (count,), generator=generator) for _ in range(2))
    return [value.to(dtype) for value in values], lengths


def arguments(name, values):
    return values if name in REFERENCE else values[:2]


def by_hand(name, w, l, rw=0.0, rl=0.0):  # noqa: E741
    """One pair in plain Python, at the defaults; probabilities, not logarithms, where that is simple."""
    p, q = math.exp(w), math.exp(l)
    odds = {
        "ccpo": p / (q * (1 - p)),
        "cunl": p * (1 - q) / q,
        "uncpo": (1 - q * (1 - p)) / (q * (1 - p)),
        "unlikelihood": p * (1 - q) / (1 - p * (1 - q)),
    }
    if name in odds:
        return -math.log(odds[name] / (1 + odds[name]))
    d = (w - l) - (rw - rl)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    return {
        "ce": lambda: -w,
        "dpo": lambda: -math.log(sigmoid(0.1 * d)),
        "dpo_hinge": lambda: max(0, 1 - 0.1 * d),
        "dpo_robust": lambda: (-0.9 * math.log(sigmoid(0.1 * d)) + 0.1 * math.log(sigmoid(-0.1 * d))) / 0.8,
        "ipo": lambda: (d - 5) ** 2,
        "dpop": lambda: -math.log(sigmoid(0.1 * (d - 50 * max(0, rw - w)))),
        "slic": lambda: max(0, 1 - (w - l)) - w,
        "rrhf": lambda: max(0, l - w) - w,
        "cpo": lambda: -math.log(sigmoid(0.1 * (w - l))) - w,
        "orpo": lambda: -w - 0.1 * math.log(sigmoid(math.log(p / (1 - p)) - math.log(q / (1 - q)))),
        "simpo": lambda: -math.log(sigmoid(2 * (w - l) - 1)),
    }[name]()


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_worked_out_by_hand(name):
    values, _ = pairs()
    found = LOSSES[name](*arguments(name, values), reduction="none")
    expected = [by_hand(name, *(value[i].item() for value in arguments(name, values))) for i in range(6)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert LOSSES[name](*arguments(name, values)).item() == pytest.approx(sum(expected) / 6, rel=1e-10)
    assert LOSSES[name](*arguments(name, values), reduction="sum").item() == pytest.approx(sum(expected), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_make_means_per_token(name):
    values, (tokens_w, tokens_l) = pairs()
    values = [8 * value for value in values]
    means = [value / (tokens_w, tokens_l)[i % 2] for i, value in enumerate(values)]
    found = LOSSES[name](*arguments(name, values), lengths=(tokens_w, tokens_l), reduction="none")
    if name == "cpo":  # its difference is of whole answers
        expected = cpo(*values[:2], nll=0.0, reduction="none") - means[0]
    else:
        expected = LOSSES[name](*arguments(name, means), reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_inputs_are_not_touched(name, dtype):
    values, _ = pairs(dtype=dtype)
    before = [value.clone() for value in values]
    found = LOSSES[name](*arguments(name, values), reduction="none")
    assert found.dtype == dtype
    wide = LOSSES[name](*(value.double() for value in arguments(name, values)), reduction="none")
    torch.testing.assert_close(found.double(), wide, rtol=3 * torch.finfo(dtype).eps, atol=1e-5)
    assert all(torch.equal(value, old) for value, old in zip(values, before))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_and_do_not_reach_the_reference(name):
    values, _ = pairs(4)
    values = [value.requires_grad_() for value in values]
    given = arguments(name, values)
    assert torch.autograd.gradcheck(lambda *own: LOSSES[name](*own, *given[2:]), values[:2])
    LOSSES[name](*given).backward()
    assert values[2].grad is None
    assert values[3].grad is None


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_a_likelier_winner_and_an_unlikelier_loser_never_cost_more(p, q):
    w, l = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log()  # noqa: E741
    r = torch.tensor(-1.0, dtype=torch.float64)
    for name in set(LOSSES) - {"ipo"}:
        rest = (r, r) if name in REFERENCE else ()
        here = LOSSES[name](w, l, *rest)
        assert LOSSES[name](w + 0.009, l, *rest) <= here
        assert LOSSES[name](w, l - 0.1, *rest) <= here


def test_log1mexp_is_exact_at_both_ends_with_finite_gradients():
    a = torch.tensor([-1e-12, -1e-6, -0.5, -math.log(2), -1.0, -40.0, -800.0], dtype=torch.float64, requires_grad=True)
    found = log1mexp(a)
    expected = [math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)) for x in a.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    (slope,) = torch.autograd.grad(found.sum(), a)
    expected = [-math.exp(x) / -math.expm1(x) for x in a.tolist()]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    single = torch.tensor([-1e-9, -1e-6, -1e-3, -90.0], requires_grad=True)
    assert torch.autograd.grad(log1mexp(single).sum(), single)[0].isfinite().all()


def test_dpo_and_its_family_meet_where_they_should():
    values, lengths = pairs()
    w, l, rw, rl = values  # noqa: E741
    none = {"reduction": "none"}
    even = torch.full_like(w, -2.0)  # a reference without a preference
    torch.testing.assert_close(dpo(w, l, even, even, beta=0.3, **none), cpo(w, l, beta=0.3, nll=0.0, **none))
    torch.testing.assert_close(dpo_robust(w, l, rw, rl, label_smoothing=0.0, **none), dpo(w, l, rw, rl, **none))
    torch.testing.assert_close(dpop(w, l, rw, rl, penalty=0.0, **none), dpo(w, l, rw, rl, **none))
    torch.testing.assert_close(dpop(rw, l, rw, rl, **none), dpo(rw, l, rw, rl, **none))  # no worse than the reference
    torch.testing.assert_close(slic(w, l, margin=1.0, nll=0.0, **none), dpo_hinge(w, l, even, even, beta=1.0, **none))
    shift = torch.full_like(w, -0.8 / 2.0)  # log r_l - log r_w = -gamma / beta
    torch.testing.assert_close(simpo(w, l, gamma=0.8, lengths=lengths, **none),
                               dpo(w / lengths[0], l / lengths[1], even, even + shift, beta=2.0, **none))  # fmt: skip
    assert ipo(w, w - 5, rw, rw, beta=0.1).abs() < 1e-20  # at its margin
    assert rrhf(w, w - 1, nll=0.0) == 0
    torch.testing.assert_close(unlikelihood(w, l, **none) - ce(w, l, **none), -torch.log1p(-l.exp()))
    torch.testing.assert_close(dpo(w, l, w, l, **none), torch.full_like(w, math.log(2)))


def test_at_sixty_and_thirty_percent_the_values_of_the_card():
    w, l = torch.tensor(0.6, dtype=torch.float64).log(), torch.tensor(0.3, dtype=torch.float64).log()  # noqa: E741
    found = {
        "unlikelihood": unlikelihood(w, l), "cunl": cunl(w, l), "ce": ce(w, l), "cpo": cpo(w, l, beta=1.0, nll=0.0),
        "orpo": orpo(w, l, beta=1.0, nll=0.0), "ccpo": ccpo(w, l), "uncpo": uncpo(w, l),
    }  # fmt: skip
    expected = {"unlikelihood": 0.867501, "cunl": 0.538997, "ce": 0.510826, "cpo": 0.405465, "orpo": 0.251314,
                "ccpo": 0.182322, "uncpo": 0.127833}  # fmt: skip
    assert {name: round(value.item(), 6) for name, value in found.items()} == expected


def test_values_of_trls_cpo_and_orpo_functions():
    trl_cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer.cpo_loss
    trl_orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer.odds_ratio_loss
    (w, l, _, _), _ = pairs(dtype=torch.float32)  # noqa: E741
    none = {"reduction": "none"}
    own = SimpleNamespace(alpha=0.0, beta=0.4, label_smoothing=0.0, simpo_gamma=0.7, accelerator=SimpleNamespace(
        device=torch.device("cpu")), loss_type="sigmoid")  # fmt: skip
    torch.testing.assert_close(cpo(w, l, beta=0.4, nll=0.0, **none), trl_cpo(own, w, l)[0])
    own.loss_type = "simpo"
    torch.testing.assert_close(simpo(w, l, beta=0.4, gamma=0.7, **none), trl_cpo(own, w, l)[0])
    torch.testing.assert_close(orpo(w, l, beta=0.4, nll=0.0, **none), -trl_orpo(own, w, l)[0])


def test_log_probs_of_answers_leave_the_prompt_out():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (3, 7), generator=generator)
    labels = tokens.clone()
    labels[0, :3], labels[1, :5], labels[2, :1], labels[2, 5:] = -100, -100, -100, -100
    total, count = sequence_log_probs(logits, labels)
    for row, places in enumerate([range(3, 7), range(5, 7), range(1, 5)]):
        by_token = [math.log(logits[row, t - 1].softmax(0)[tokens[row, t]].item()) for t in places]
        assert total[row].item() == pytest.approx(sum(by_token), rel=1e-12)
        assert count[row].item() == len(by_token)
    torch.testing.assert_close(sequence_log_probs(logits, labels).mean, total / count)
    masked = sequence_log_probs(logits, tokens, labels != -100)
    assert torch.equal(masked.total, total)
    noise = logits.clone()
    noise[0, :2] = 5.0  # logits that speak of the prompt do not matter
    assert torch.equal(sequence_log_probs(noise, labels).total, total)


def test_log_probs_are_those_of_trl_and_of_at_least_float32():
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 9, 13, generator=generator)
    labels = torch.randint(13, (4, 9), generator=generator)
    labels[:, :4] = -100
    found = sequence_log_probs(logits, labels)
    torch.testing.assert_close(found.total, trainer.get_batch_logps(logits, labels))
    torch.testing.assert_close(found.mean, trainer.get_batch_logps(logits, labels, average_log_prob=True))
    assert sequence_log_probs(logits.bfloat16(), labels).total.dtype == torch.float32


def test_gradient_of_log_probs_reaches_the_answers_logits_only():
    logits = torch.zeros(1, 5, 4, dtype=torch.float64, requires_grad=True)
    sequence_log_probs(logits, torch.tensor([[-100, -100, 1, 2, -100]])).total.sum().backward()
    assert logits.grad[0, [0, 3, 4]].eq(0).all()
    expected = F.one_hot(torch.tensor([1, 2]), 4) - 0.25
    torch.testing.assert_close(logits.grad[0, 1:3], expected.double())


def test_underflow_and_certainty_are_announced():
    far, near = torch.full((4,), -500.0), torch.tensor([-1.0, -2.0, -0.5, -3.0])
    with pytest.warns(UserWarning, match="use length-normalised log probabilities"):
        lost = orpo(far + near, far, nll=0.0, beta=1.0, reduction="none")
    torch.testing.assert_close(lost, cpo(far + near, far, nll=0.0, beta=1.0, reduction="none"))  # ORPO became CPO
    with pytest.warns(UserWarning, match="1 of 4 probabilities are 1 or more"):
        found = ccpo(torch.tensor([0.0, -1.0, -1.0, -1.0]).requires_grad_(), near, reduction="none")
    assert found.isfinite().all()
    with pytest.warns(UserWarning, match="3 of 4 probabilities"):
        assert unlikelihood(near, torch.tensor([0.1, 0.0, -1e-7, -1.0])).isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in LOSSES:
            LOSSES[name](*arguments(name, [near, near - 0.5, near, near]))
        dpo(far, far - 3, far, far)  # without 1 - p whole answers are fine
        orpo(far, far - 3, lengths=(torch.full((4,), 100), torch.full((4,), 90)))


def test_module_calls_all_losses_alike():
    values, lengths = pairs()
    for name in LOSSES:
        loss = PreferenceLoss(name, reduction="none")
        assert loss.needs_reference == (name in REFERENCE)
        expected = LOSSES[name](*arguments(name, values), lengths=lengths, reduction="none")
        assert torch.equal(loss(*values, lengths=lengths), expected)
        assert not loss.state_dict()
        loss.load_state_dict({})
    assert repr(PreferenceLoss("simpo", beta=2.5)) == "PreferenceLoss('simpo', beta=2.5)"
    with pytest.raises(InputError, match="ipo needs log_r_w and log_r_l"):
        PreferenceLoss("ipo")(*values[:2])
    with pytest.raises(InputError, match="one of ce, unlikelihood, dpo.*got 'DPO2'"):
        PreferenceLoss("DPO2")
    with pytest.raises(InputError, match="simpo takes beta, gamma, reduction, got 'margin'"):
        PreferenceLoss("simpo", margin=1.0)
    with pytest.raises(InputError, match="simpo takes beta, gamma, reduction, got 'lengths'"):
        PreferenceLoss("simpo", lengths=None)


def test_bad_input_is_named():
    (w, l, rw, rl), _ = pairs(4)  # noqa: E741
    with pytest.raises(InputError, match=r"got \(4,\) for log_p_w and \(3,\) for log_p_l"):
        cpo(w, l[:3])
    with pytest.raises(InputError, match="at least one pair"):
        cpo(w[:0], l[:0])
    with pytest.raises(InputError, match="log_r_l has values that are not finite"):
        dpo(w, l, rw, rl.index_fill(0, torch.tensor([1]), float("nan")))
    with pytest.raises(InputError, match="log_p_w has values that are not finite"):
        cpo(w.index_fill(0, torch.tensor([1]), -float("inf")), l)
    with pytest.raises(InputError, match="log_p_l is a float tensor, got torch.int64"):
        cpo(w, l.long())
    with pytest.raises(InputError, match="log_p_w is a float tensor, got list"):
        cpo([1.0], l)
    with pytest.raises(InputError, match="beta is above 0, got 0"):
        dpo(w, l, rw, rl, beta=0)
    with pytest.raises(InputError, match=r"in \[0, 0.5\), got 0.5"):
        dpo_robust(w, l, rw, rl, label_smoothing=0.5)
    with pytest.raises(InputError, match="penalty is 0 or more"):
        dpop(w, l, rw, rl, penalty=-1)
    with pytest.raises(InputError, match="reduction is 'mean', 'sum' or 'none', got 'max'"):
        cpo(w, l, reduction="max")
    with pytest.raises(InputError, match="lengths of the loser are token counts of at least 1"):
        cpo(w, l, lengths=(torch.ones(4), torch.zeros(4)))
    with pytest.raises(InputError, match="lengths of the winner"):
        simpo(w, l, lengths=(torch.ones(3), torch.ones(4)))


def test_bad_sequences_are_named():
    logits = torch.zeros(2, 4, 5)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 1]])
    with pytest.raises(InputError, match=r"got \(2, 4, 5\) and \(2, 3\)"):
        sequence_log_probs(logits, labels[:, :3])
    with pytest.raises(InputError, match="answer 1 has no tokens"):
        sequence_log_probs(logits, labels.masked_fill(labels == 1, -100))
    with pytest.raises(InputError, match="answer 0 has no tokens"):
        sequence_log_probs(logits, torch.tensor([[1, -100, -100, -100], [-100, 1, 1, 1]]))
    with pytest.raises(InputError, match="labels are 0 to 4 or -100, got 1 to 7"):
        sequence_log_probs(logits, labels.masked_fill(labels == 3, 7))
    with pytest.raises(InputError, match="answer 1 is not finite"):
        sequence_log_probs(logits.index_fill(0, torch.tensor([1]), float("nan")), labels)
    with pytest.raises(InputError, match="mask has the shape of labels"):
        sequence_log_probs(logits, labels, labels[:, :2])
