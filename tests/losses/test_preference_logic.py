"""The logic of preference losses: the card's numbers, all 256 structures, the order of losses, text that is refused."""

import math
import random
import warnings
import xml.etree.ElementTree as ET
from itertools import chain, combinations, pairwise, product

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allrounder.errors import InputError
from allrounder.losses.preference import LOSSES, cpo, dpo, simpo
from allrounder.losses.preference_lattice import entails, lattice, lattice_svg
from allrounder.losses.preference_logic import (
    STRUCTURES,
    Structure,
    add_reference,
    compile_loss,
    decompile,
    weighted_model_count,
)
from allrounder.losses.preference_text import models, quotient, worlds

RATIOS = {
    "ce": "p_w / (1 - p_w)",
    "unlikelihood": "p_w * (1 - p_l) / (1 - p_w * (1 - p_l))",
    "cpo": "p_w / p_l",
    "orpo": "p_w * (1 - p_l) / (p_l * (1 - p_w))",
    "uncpo": "(1 - p_l * (1 - p_w)) / (p_l * (1 - p_w))",
    "ccpo": "p_w / (p_l * (1 - p_w))",
    "cunl": "p_w * (1 - p_l) / p_l",
    "dpo": "p_w * r_l / (p_l * r_w)",
}
ROWS = sorted(worlds(2))
SETS = [frozenset(some) for some in chain.from_iterable(combinations(ROWS, size) for size in range(5))]


def term(world, names=("p_w", "p_l", "r_w", "r_l")):
    return " * ".join(name if true else f"(1 - {name})" for name, true in zip(names, world))


def expression(some):
    return " + ".join(term(world) for world in sorted(some)) or "0"


def weight(some, values):
    """WMC by adding up rows."""
    return sum(math.prod(p if true else 1 - p for p, true in zip(values, world)) for world in some)


def logs(*values):
    return [torch.tensor([value], dtype=torch.float64).log() for value in values]


def test_all_256_pairs_survive_the_way_to_logic_and_back():
    seen = set()
    for top, bottom in product(SETS, SETS):
        structure = decompile(expression(top), expression(bottom))
        assert (structure.top, structure.bottom) == (top, bottom)
        assert models(structure.both, 2) == top & bottom
        assert models(structure.given, 2) == top | bottom
        seen.add((structure.top, structure.bottom))
    assert len(seen) == 4 ** (2**2) == 256


def test_225_of_256_compile_and_the_others_say_what_is_missing():
    usable = 0
    values = logs(0.6, 0.3)
    for top, bottom in product(SETS, SETS):
        structure = Structure.of(top, bottom)
        if top and bottom:
            expected = math.log(weight(top, (0.6, 0.3)) / weight(bottom, (0.6, 0.3)))
            assert compile_loss(structure).rho(*values).item() == pytest.approx(expected, abs=1e-12)
            usable += 1
        else:
            side = "losing" if top else "winning"
            with pytest.raises(InputError, match=f"no {side} world"):
                compile_loss(structure)
    assert usable == 225


def test_reference_losses_of_random_structures_agree_with_enumeration():
    draw = random.Random(0)
    rows = sorted(worlds(4))
    p = (0.6, 0.3, 0.45, 0.2)
    for _ in range(40):
        top, bottom = (frozenset(draw.sample(rows, draw.randint(1, 16))) for _ in range(2))
        structure = Structure.of(top, bottom)
        if structure.size == 4:
            assert (structure.top, structure.bottom) == (top, bottom)
        found = compile_loss(structure).rho(*logs(*p)[: 4 if structure.size == 4 else 2])
        assert found.item() == pytest.approx(math.log(weight(top, p) / weight(bottom, p)), abs=1e-12)


@pytest.mark.parametrize("name", RATIOS)
def test_decompiling_the_ratio_of_a_known_loss_gives_its_table_row(name):
    found = decompile(RATIOS[name])
    known = STRUCTURES[name]
    assert (found.top, found.bottom) == (known.top, known.bottom)
    assert models(found.given, known.size) == models(known.given, known.size)
    assert decompile(name) is known
    above, below = RATIOS[name].split(" / ")
    assert decompile(above, below) == found


def test_dpo_is_its_ratio_by_sixteen_rows_symbolically():
    from sympy import simplify, symbols

    p_w, p_l, r_w, r_l = probabilities = symbols("p_w p_l r_w r_l")
    dpo_logic = STRUCTURES["dpo"]
    assert len(worlds(4)) == 16

    def count(some):
        return sum(math.prod(p if true else 1 - p for p, true in zip(probabilities, world)) for world in some)

    assert simplify(count(dpo_logic.top) - p_w * r_l) == 0
    assert simplify(count(dpo_logic.bottom) - p_l * r_w) == 0


def test_values_of_the_card_at_sixty_and_thirty_percent():
    expected = {
        "unlikelihood": (-0.322773, 0.867501), "cunl": (0.336472, 0.538997), "ce": (0.405465, 0.510826),
        "cpo": (0.693147, 0.405465), "orpo": (1.252763, 0.251314), "ccpo": (1.609438, 0.182322),
        "uncpo": (1.992430, 0.127833),
    }  # fmt: skip
    for name, (rho, value) in expected.items():
        loss = compile_loss(name)
        assert loss.rho(*logs(0.6, 0.3)).item() == pytest.approx(rho, abs=5e-7)
        assert loss(*logs(0.6, 0.3)).item() == pytest.approx(value, abs=5e-7)


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
@settings(max_examples=150, deadline=None)
def test_the_chain_of_losses_holds_for_all_probabilities(p, q):
    value = {name: compile_loss(name)(*logs(p, q)).item() for name in RATIOS if name != "dpo"}
    order = ("unlikelihood", "cunl", "cpo", "ccpo", "uncpo")
    assert all(value[a] >= value[b] - 1e-9 for a, b in pairwise(order))
    assert value["cunl"] >= value["orpo"] - 1e-9
    assert value["orpo"] >= value["ccpo"] - 1e-9


@pytest.mark.parametrize("name", sorted(set(STRUCTURES) & set(LOSSES)))
def test_compiled_losses_are_the_closed_forms(name):
    generator = torch.Generator().manual_seed(3)
    values = [-0.05 - 5 * torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = (torch.arange(1, 9), torch.arange(8, 0, -1))
    values = values[: 4 if name == "dpo" else 2]
    options = {"cpo": {"nll": 0.0, "beta": 1.0}, "orpo": {"nll": 0.0, "beta": 1.0}, "dpo": {"beta": 1.0}}.get(name, {})
    loss = compile_loss(name, reduction="none")
    assert loss.needs_reference == (name == "dpo")
    torch.testing.assert_close(loss(*values), LOSSES[name](*values, reduction="none", **options))
    if name != "cpo":  # the closed form takes whole answers there
        long = [6 * value for value in values]
        torch.testing.assert_close(
            loss(*long, lengths=lengths), LOSSES[name](*long, lengths=lengths, reduction="none", **options)
        )


def test_without_conditions_the_loss_is_minus_log_of_the_model_count():
    p, q = 0.6, 0.3
    for formula in ("W", "W & ~L", "L >> W", "W | L", "W ^ L", "~L"):
        expected = -weighted_model_count(formula, {"W": p, "L": q}).log().item()
        assert compile_loss(formula)(*logs(p, q)).item() == pytest.approx(expected, abs=1e-6)
    assert weighted_model_count("W", {"W": 0.6}).item() == pytest.approx(0.6)
    assert weighted_model_count("True", {"W": 0.6}).item() == pytest.approx(1)
    batch = weighted_model_count("L >> W", {"W": torch.tensor([0.6, 1.0]), "L": torch.tensor([0.3, 0.4])})
    torch.testing.assert_close(batch, torch.tensor([0.88, 1.0]))


def test_simpo_is_dpo_with_a_constant_for_the_reference():
    w, l = torch.tensor([-8.0, -30.0]), torch.tensor([-9.0, -20.0])  # noqa: E741
    lengths = (torch.tensor([10, 20]), torch.tensor([12, 18]))
    beta, gamma = 2.5, 1.2
    loss = compile_loss("dpo", beta=beta)
    constant = torch.full((2,), -gamma / beta)
    found = loss(w / lengths[0], l / lengths[1], torch.zeros(2), constant)
    torch.testing.assert_close(found, simpo(w, l, beta=beta, gamma=gamma, lengths=lengths))


def test_adding_a_reference_subtracts_the_references_ratio():
    p = (0.6, 0.3, 0.45, 0.2)
    for name in set(RATIOS) - {"dpo"}:
        own, other = (compile_loss(name).rho(*logs(*some)) for some in (p[:2], p[2:]))
        torch.testing.assert_close(compile_loss(add_reference(name)).rho(*logs(*p)), own - other)
    found = add_reference("cpo")
    assert (found.top, found.bottom) == (STRUCTURES["dpo"].top, STRUCTURES["dpo"].bottom)
    with pytest.raises(InputError, match="has a reference already"):
        add_reference("dpo")


def test_links():
    values = logs(0.6, 0.3)
    rho = math.log(2)
    assert compile_loss("cpo", beta=0.5)(*values).item() == pytest.approx(math.log1p(math.exp(-0.5 * rho)))
    assert compile_loss("cpo", beta=0.5, link="square")(*values).item() == pytest.approx((rho - 1) ** 2)
    assert compile_loss("cpo", beta=0.9, link="margin")(*values).item() == pytest.approx(0.9 - rho)
    assert compile_loss("cpo", beta=0.1, link="margin")(*values).item() == 0
    assert compile_loss("cpo", link="hinge")(*values).item() == 0
    assert compile_loss("cpo", link="hinge")(*reversed(values)).item() == pytest.approx(rho)


def test_gradient_of_cpo_touches_two_logits_only():
    logits = torch.linspace(-1, 2, 7, dtype=torch.float64).requires_grad_()
    log_p = logits.log_softmax(0)
    compile_loss("cpo")(log_p[4:5], log_p[1:2]).backward()
    rest = 1 - torch.sigmoid(logits[4] - logits[1]).item()
    assert logits.grad[4].item() == pytest.approx(-rest, abs=1e-15)
    assert logits.grad[1].item() == pytest.approx(rest, abs=1e-15)
    assert logits.grad[[0, 2, 3, 5, 6]].eq(0).all()


def test_propositions_that_do_not_matter_cost_no_precision_and_no_warning():
    far = torch.tensor([-500.0, -700.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compile_loss("cpo").rho(far, far - 3), torch.tensor([3.0, 3.0]))
        zero = torch.zeros(2)  # log p = 0 is fine where no 1 - p is read
        assert torch.equal(compile_loss("dpo").rho(zero, far, zero, far), torch.zeros(2))
    with pytest.warns(UserWarning, match="length-normalised"):
        compile_loss("orpo")(far, far)
    with pytest.warns(UserWarning, match="1 of 2 probabilities are 1 or more"):
        assert compile_loss("ccpo")(torch.tensor([0.0, -1.0]), far).isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_state_is_empty_and_inputs_untouched(dtype):
    values = [value.to(dtype) for value in logs(0.6, 0.3, 0.5, 0.4)]
    before = [value.clone() for value in values]
    loss = compile_loss(add_reference("ccpo"))
    assert loss(*values).dtype == dtype
    assert loss.double().float()(*values) == loss(*values)  # its index tables stay whole numbers
    assert all(torch.equal(a, b) for a, b in zip(values, before))
    assert not loss.state_dict()
    loss.load_state_dict({})
    assert "ccpo" not in repr(loss)
    assert "link='log'" in repr(loss)


def test_a_loss_typed_as_text_trains():
    """Five answers, the first the best: its probability rises, and the gradient agrees with finite differences."""
    loss = compile_loss(Structure("L >> W", given="~(W & L)"))
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x.log_softmax(0)[:2], x.log_softmax(0)[2:4]), logits)
    optimiser = torch.optim.SGD([logits], lr=1.0)
    values = []
    for _ in range(30):
        log_p = logits.log_softmax(0)
        value = loss(log_p[[0, 0, 1]], log_p[[1, 2, 4]])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2
    assert logits.argmax() == 0


def test_order_is_the_lattice_of_the_card():
    found = lattice()
    assert set(found) == {
        ("unlikelihood", "cunl"), ("unlikelihood", "ce"), ("cunl", "cpo"), ("cunl", "orpo"), ("cpo", "ccpo"),
        ("orpo", "ccpo"), ("ce", "ccpo"), ("ccpo", "uncpo"),
    }  # fmt: skip
    assert entails("unlikelihood", "uncpo")
    assert entails("cpo", "cpo")
    assert not entails("cpo", "orpo")
    assert not entails("orpo", "cpo")
    assert not entails("uncpo", "cunl")


def test_lattice_is_the_transitive_reduction_and_its_order_holds_by_value():
    losses = {f"s{i}{j}": Structure.of(SETS[i], SETS[j]) for i in range(1, 16, 3) for j in range(1, 16, 3)}
    edges = lattice(losses)
    nodes = {name for edge in edges for name in edge}
    reach = {a: {b for x, b in edges if x == a} for a in nodes}
    for _ in nodes:
        reach = {a: reach[a].union(*(reach[b] for b in reach[a])) for a in nodes}
    for a, b in product(losses, losses):
        assert (a != b and entails(losses[a], losses[b])) == (b in reach.get(a, set()))
    for a, b in edges:
        others = [edge for edge in edges if edge != (a, b)]
        seen, todo = set(), [a]
        while todo:
            here = todo.pop()
            new = {y for x, y in others if x == here} - seen
            seen |= new
            todo += new
        assert b not in seen  # taken away, the edge is not implied
        for p, q in ((0.6, 0.3), (0.2, 0.9), (0.97, 0.5)):
            assert compile_loss(losses[a])(*logs(p, q)) >= compile_loss(losses[b])(*logs(p, q)) - 1e-12


def test_reference_losses_are_compared_and_equal_ones_become_one_node():
    found = lattice({
        "dpo": "dpo", "cpo + reference": add_reference("cpo"), "cunl": "cunl",
        "conditional": Structure("(L & Rw) >> (W & Rl)", given="(W & Rl) | (L & Rw)"),
        "free": Structure("(L & Rw) >> (W & Rl)"),
    })  # fmt: skip
    assert found == [("conditional", "free"), ("cunl", "free"), ("dpo = cpo + reference", "conditional")]


def test_picture_has_every_name_and_the_same_bytes_again():
    losses = {**STRUCTURES, "mine & <yours>": Structure("W", "~(W & L)"), "$x_1$": "L >> W"}
    before = dict(mpl.rcParams)
    picture = lattice_svg(losses)
    assert picture == lattice_svg(losses)
    assert dict(mpl.rcParams) == before
    root = ET.fromstring(picture)
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"uncpo = $x_1$", "mine & <yours>", "dpo", "orpo", "W & ~L  :  L & ~W"} <= set(texts)
    assert len(ET.fromstring(lattice_svg({"cpo": "cpo"}))) > 0


def test_formulas_are_read_as_python_reads_them():
    assert models("W & ~L", 2) == {(True, False)}
    assert models("L >> W", 2) == worlds(2) - {(False, True)}
    assert models("W ^ L", 2) == {(True, False), (False, True)}
    assert models("W & L >> W", 2) == models("W & (L >> W)", 2)
    assert models(" True ", 2) == worlds(2)
    assert Structure("Rw >> W").size == 4
    assert quotient("p_w / p_l / (1 - p_w)") == quotient("p_w / (p_l * (1 - p_w))")
    assert quotient("p_w * 1 / (1 - 1 + p_l)") == quotient("p_w", "p_l")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("W & X", "unknown symbol X in 'W & X'; propositions are W, L"),
        ("w", "unknown symbol w"),
        ("W &", "cannot read the formula 'W &'"),
        ("", "cannot read the formula ''"),
        ("W + L", "a formula has ~, &, |, ^, >>, True and False, got 'W \\+ L'"),
        ("W and L", "got 'W and L'"),
        ("1", "got '1'"),
        ("__import__('os').system('true')", "unknown symbol __import__"),
        ("W(L)", "got 'W\\(L\\)'"),
        ("W.real", "got 'W.real'"),
    ],
)
def test_text_that_is_no_formula_is_refused(formula, message):
    with pytest.raises(InputError, match=message):
        Structure(formula)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("p_w * p_w / p_l", "p_w is multiplied by itself"),
        ("p_w * (1 - p_w) / p_l", "p_w is multiplied by itself"),
        ("p_w * p_w * r_l / (p_l * r_w * r_w)", "is multiplied by itself.*penalty of DPOP"),
        ("p_w ** 2 / p_l", "got 'p_w \\*\\* 2'"),
        ("(p_w + p_l) / p_l", "counts the world W = 1, L = 1 2 times"),
        ("2 * p_w / p_l", "2 times: summands must exclude one another"),
        ("(p_w - p_l) / p_l", "counts the world W = 0, L = 1 -1 times"),
        ("p_w / p_l + 1 / p_l", "adds quotients"),
        ("p_w", "'p_w' is no ratio t / b; give the bottom b, or the name"),
        ("q / p_l", "unknown symbol q in"),
        ("0.5 * p_w / p_l", "whole numbers"),
        ("p_w //", "cannot read the ratio"),
    ],
)
def test_ratios_that_no_formula_has_are_refused(ratio, message):
    with pytest.raises(InputError, match=message):
        decompile(ratio)


def test_bad_input_is_named():
    w, l = logs(0.6, 0.3)  # noqa: E741
    with pytest.raises(InputError, match="link is one of log, square, margin, hinge, got 'sigmoid'"):
        compile_loss("cpo", link="sigmoid")
    with pytest.raises(InputError, match="beta is above 0"):
        compile_loss("cpo", beta=0.0)
    with pytest.raises(InputError, match="speaks of a reference: log_r_w is missing"):
        compile_loss("dpo")(w, l)
    with pytest.raises(InputError, match="no losing world"):
        compile_loss("True")
    with pytest.raises(InputError, match="no winning world"):
        compile_loss(Structure("W & ~W"))
    with pytest.raises(InputError, match="reduction is 'mean'"):
        compile_loss("cpo", reduction="max")(w, l)
    with pytest.raises(InputError, match="log_p_w has values that are not finite"):
        compile_loss("cpo")(w * float("nan"), l)
    with pytest.raises(InputError, match="needs the probability of L"):
        weighted_model_count("L >> W", {"W": 0.5})
    with pytest.raises(InputError, match=r"in \[0, 1\].*'W'"):
        weighted_model_count("W", {"W": 1.5})
    with pytest.raises(InputError, match="'V'"):
        weighted_model_count("W", {"W": 0.5, "V": 0.5})
    with pytest.raises(InputError, match=r"2 or of 4 propositions, got \[2, 4\]"):
        Structure.of([(True, True)], [(True, True, False, True)])
    with pytest.raises(InputError, match="at least one loss"):
        lattice({})
    torch.testing.assert_close(compile_loss("CPO")(w, l), cpo(w, l, beta=1.0, nll=0.0))
    torch.testing.assert_close(compile_loss("DPO")(w, l, w, l), dpo(w, l, w, l))
