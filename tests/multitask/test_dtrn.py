"""DTRN: the exact properties of its card, and a slow reference with loops over tasks, behaviours and rows."""

import functools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import allrounder as ar
from allrounder.multitask.dtrn import DTRN, TIM, TRM, entire_space, masked_bce
from allrounder.multitask.experts import CGC, PLE, MMoE, SharedBottom
from allrounder.multitask.features import FeatureSchema

TASKS = ("click", "buy", "like")
SCHEMA = FeatureSchema(
    dense={"price": 1, "image": 3}, categorical={"city": 4}, behaviours={"view": 5, "cart": 3}, items=11
)
OPTIONS = {"dim": 8, "code": 3, "hidden": 10}


def batch(rows=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    found = {
        "price": torch.randn(rows, generator=g, dtype=torch.float64),
        "image": torch.randn(rows, 3, generator=g, dtype=torch.float64),
        "city": torch.randint(4, (rows,), generator=g),
        "view": torch.randint(11, (rows, 5), generator=g),
        "cart": torch.randint(11, (rows, 3), generator=g),
        "item": torch.randint(11, (rows,), generator=g),
    }
    found["view"][0, 3:] = -1
    found["view"][2] = -1  # this user has no view at all
    found["cart"][1, 0] = -1
    return found


def shaken(model, seed=1, size=0.3):
    """Away from the neutral start, where tasks would be equal whatever the code does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def make(tasks=TASKS, **options):
    return shaken(DTRN(SCHEMA, tasks, **OPTIONS | options).double())


def interests(model, rows):
    return model.tim(
        {name: model.embed.item(rows[name]) for name in SCHEMA.behaviours},
        {name: rows[name] >= 0 for name in SCHEMA.behaviours},
        model.embed.item(rows["item"]),
    )


def slow_norm(h, gamma, beta):
    return gamma * (h - h.mean()) / torch.sqrt(((h - h.mean()) ** 2).mean() + 1e-5) + beta


def slow_interest(tim, vectors, target, t, s):
    """One user, one task, one behaviour; `vectors` are those of the items that are there, with their positions."""
    if tim.hyper is None:
        condition = tim.norms
    else:
        code = torch.cat([tim.task_codes[t], tim.behaviour_codes[s]])
        hidden = (tim.hyper[0].weight @ code + tim.hyper[0].bias).clamp_min(0)
        condition = (tim.hyper[2].weight @ hidden / len(hidden)).reshape(len(tim.blocks), 4, tim.dim) + tim.norms
    if not len(vectors):
        return tim.empty[s]
    h = list(vectors)
    for block, (gamma1, beta1, gamma2, beta2) in zip(tim.blocks, condition, strict=True):
        q, k, v = (torch.stack(h) @ w.T + b for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)))
        width = tim.dim // block.heads
        read = []
        for i in range(len(h)):
            parts = []
            for head in range(block.heads):
                part = slice(head * width, (head + 1) * width)
                score = torch.exp(k[:, part] @ q[i, part] / math.sqrt(width))
                parts.append((score / score.sum()) @ v[:, part])
            read.append(torch.cat(parts))
        h = [slow_norm(x + block.out.weight @ r + block.out.bias, gamma1, beta1) for x, r in zip(h, read)]
        h = [slow_norm(x + block.ffn(x), gamma2, beta2) for x in h]
    query = tim.query.weight @ target + tim.query.bias
    score = torch.exp(torch.stack([x @ query for x in h]) / math.sqrt(tim.dim))
    return sum(a * x for a, x in zip(score / score.sum(), h))


def slow(model, rows):
    """DTRN by loops over rows and tasks."""
    table, found = model.embed.items.weight, {task: [] for task in model.tasks}
    each = []
    for n in range(len(rows["item"])):
        target = table[rows["item"][n]]
        plain = [
            model.embed.dense[0].weight[:, 0] * rows["price"][n] + model.embed.dense[0].bias,
            model.embed.dense[1].weight @ rows["image"][n] + model.embed.dense[1].bias,
            model.embed.categorical[0].weight[rows["city"][n]],
        ]
        refined = {}
        for t, task in enumerate(model.tasks):
            views = []
            for s, name in enumerate(SCHEMA.behaviours):
                there = [i for i, item in enumerate(rows[name][n].tolist()) if item >= 0]
                vectors = [table[rows[name][n, i]] + model.tim.positions[s][i] for i in there]
                views.append(slow_interest(model.tim, vectors, target, t, s))
            fields = torch.stack([*plain, *views, target])
            if model.trm is not None:
                first, _, last = model.trm.excite[t]
                a = last.weight @ (first.weight @ fields.flatten() + first.bias).clamp_min(0) + last.bias
                fields = fields * (2 / (1 + torch.exp(-a)))[:, None]
            refined[task] = fields.flatten()
        each.append(refined)
    inputs = {task: torch.stack([refined[task] for refined in each]) for task in found}
    return model.head(inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"blocks": 2, "heads": 4}, {"tim": False}, {"trm": False}, {"tim": False, "trm": False}, {"head": PLE}],
)
def test_it_is_the_loop_over_rows_and_tasks(options):
    model, rows = make(**options), batch()
    expected = slow(model, rows)
    for task, logits in model(rows).items():
        torch.testing.assert_close(logits, expected[task])
        assert logits.std() > 1e-3


def test_at_the_start_it_is_the_model_without_tim_and_trm():
    whole = DTRN(SCHEMA, TASKS, **OPTIONS).double()
    plain = DTRN(SCHEMA, TASKS, **OPTIONS, tim=False, trm=False).double()
    assert plain.load_state_dict(whole.state_dict(), strict=False).missing_keys == []
    for task, logits in plain(batch()).items():
        torch.testing.assert_close(logits, whole(batch())[task])
    assert all(w == 1 for weights in whole.importance(batch()).values() for w in weights.values())


def test_neutral_conditions_are_a_plain_transformer_for_every_task():
    model, rows = make(), batch()
    tim, block = model.tim, model.tim.blocks[0]
    nn.init.zeros_(tim.hyper[2].weight)
    tim.norms.data.copy_(torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)[:, None].expand(1, 4, 8))
    found = interests(model, rows)
    for t in (1, 2):
        torch.testing.assert_close(found[t], found[0])
    plain = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True).double()
    plain.self_attn.in_proj_weight.data, plain.self_attn.in_proj_bias.data = block.qkv.weight.data, block.qkv.bias.data
    plain.self_attn.out_proj.load_state_dict(block.out.state_dict())
    plain.linear1.load_state_dict(block.ffn[0].state_dict())
    plain.linear2.load_state_dict(block.ffn[2].state_dict())
    x = model.embed.items(rows["cart"].clamp_min(0)) + tim.positions[1]
    mask = rows["cart"] < 0
    h = plain(x, src_key_padding_mask=mask)
    scores = (h * tim.query(model.embed.items(rows["item"]))[:, None]).sum(-1) / math.sqrt(8)
    v = (scores.masked_fill(mask, -math.inf).softmax(-1)[..., None] * h).sum(1)
    torch.testing.assert_close(found[0, :, 1], v)


def test_conditional_layer_norm_is_layer_norm_with_its_weight_and_bias():
    tim = shaken(TIM(1, {"view": 4}, 8)).double()
    norm = shaken(nn.LayerNorm(8), seed=5).double()
    x = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = tim.blocks[0]
    condition = torch.stack([norm.weight, norm.bias, norm.weight, norm.bias])[None]
    h = norm(x)
    torch.testing.assert_close(block.refine(x, condition), norm(h + block.ffn(h)))


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_hypernetwork_gives_4d_numbers_for_each_task_behaviour_and_block(blocks):
    model = make(blocks=blocks)
    assert model.tim.conditions().shape == (3, 2, blocks, 4, 8)
    assert interests(model, batch()).shape == (3, 6, 2, 8)
    assert interests(make(tim=False), batch()).shape == (1, 6, 2, 8)


def test_a_tasks_code_moves_its_own_output_alone():
    model, rows = make(), batch()
    (grad,) = torch.autograd.grad(model(rows)["buy"].sum(), model.tim.task_codes)
    assert not grad[[0, 2]].any()
    assert grad[1].abs().min() > 0
    before = model(rows)
    with torch.no_grad():
        model.tim.task_codes[1] += 1
    after = model(rows)
    assert torch.equal(before["click"], after["click"])
    assert not torch.allclose(before["buy"], after["buy"])


def test_a_behaviours_code_moves_its_own_interest_alone():
    model, rows = make(), batch()
    before = interests(model, rows)
    with torch.no_grad():
        model.tim.behaviour_codes[1] += 1
    after = interests(model, rows)
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not torch.allclose(before[:, :, 1], after[:, :, 1])


def test_tasks_differ_by_their_condition_and_swapping_codes_swaps_interests():
    model, rows = make(), batch()
    before = interests(model, rows)
    assert not torch.allclose(before[0, :, 0], before[1, :, 0])
    with torch.no_grad():
        model.tim.task_codes.copy_(model.tim.task_codes[[1, 0, 2]].clone())
    torch.testing.assert_close(interests(model, rows), before[[1, 0, 2]])


def test_neutral_weights_leave_the_fields_as_they_are():
    trm = TRM(2, 5, 4).double()
    x = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(trm(x), x.expand(2, -1, -1, -1))
    weights = shaken(trm).weights(x)
    assert weights.shape == (2, 3, 5)
    assert ((weights > 0) & (weights < 2)).all()
    torch.testing.assert_close(trm(x)[1, 2, 3], x[0, 2, 3] * weights[1, 2, 3])


def test_padding_never_changes_a_logit():
    model, rows = make(), batch()
    longer = dict(rows, cart=rows["cart"][:, :2].clone(), view=rows["view"][:, :4].clone())
    padded = dict(longer, view=torch.cat([longer["view"], torch.full((6, 1), -1)], 1))
    for task, logits in model(longer).items():
        torch.testing.assert_close(logits, model(padded)[task])
    vectors = {name: model.embed.item(rows[name]) for name in SCHEMA.behaviours}
    masks = {name: rows[name] >= 0 for name in SCHEMA.behaviours}
    noisy = {name: vectors[name].where(masks[name][..., None], 1e3) for name in vectors}
    target = model.embed.item(rows["item"])
    torch.testing.assert_close(model.tim(vectors, masks, target), model.tim(noisy, masks, target))


def test_an_empty_history_gives_the_learned_vector_and_no_nan():
    model, rows = make(), batch()
    rows["cart"][:] = -1
    found = interests(model, rows)
    assert torch.equal(found[:, :, 1], model.tim.empty[1].expand(3, 6, 8))
    assert torch.equal(found[:, 2, 0], model.tim.empty[0].expand(3, 8))
    sum(logits.sum() for logits in model(rows).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.tim.empty.grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["first attention once", "everything once when plain"])
def test_what_does_not_depend_on_the_task_runs_once_a_behaviour(kind):
    model, seen = make(tim=kind.startswith("first"), blocks=2), []
    for block in model.tim.blocks:
        block.qkv.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    model(batch())
    first = [6 * 5 * 8, 6 * 3 * 8]
    tasks = 3 if kind.startswith("first") else 1
    assert seen == [first[0], first[0] * tasks, first[1], first[1] * tasks]


def test_one_more_task_adds_a_code_a_trm_and_a_tower():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    two, three = make(tasks=("a", "b")), make(tasks=("a", "b", "c"))
    fields = len(SCHEMA.fields)
    assert fields == 6
    trm = fields * 8 * 1 + 1 + fields + fields  # M d M/r + M/r, M/r M + M with M/r = 1
    assert count(three.trm.excite[0]) == trm
    assert count(three) - count(two) == 3 + trm + count(three.head.towers[0])


def test_the_gradient_of_the_shared_block_is_the_sum_over_tasks():
    model, rows = make(), batch()
    weight = model.tim.blocks[0].qkv.weight
    logits = model(rows)
    whole = torch.autograd.grad(sum(v.square().sum() for v in logits.values()), weight, retain_graph=True)[0]
    parts = [torch.autograd.grad(v.square().sum(), weight, retain_graph=True)[0] for v in logits.values()]
    torch.testing.assert_close(whole, sum(parts))
    assert all(part.abs().sum() > 0 for part in parts)


def test_rows_do_not_see_each_other():
    model, rows = make(), batch()
    few = {name: value[3:4] for name, value in rows.items()}
    for task, logits in model(rows).items():
        torch.testing.assert_close(logits[3:4], model(few)[task])


@pytest.mark.parametrize("head", [SharedBottom, functools.partial(MMoE, experts=2), CGC, PLE])
def test_without_histories_trm_alone_works_with_every_head(head):
    schema = FeatureSchema(dense={"age": 1}, categorical={"work": 3})
    model = shaken(DTRN(schema, ["a", "b"], head=head))
    assert model.tim is None
    rows = {"age": torch.tensor([0.1, 2.0]), "work": torch.tensor([0, 2])}
    assert {task: logits.shape for task, logits in model(rows).items()} == {"a": (2,), "b": (2,)}
    assert list(model.importance(rows)["a"]) == ["age", "work"]
    assert model.importance(rows)["a"] != model.importance(rows)["b"]


def test_one_behaviour_and_one_task_are_enough():
    schema = FeatureSchema(behaviours={"view": 2}, items=4)
    model = DTRN(schema, ["a"])
    assert model({"view": torch.tensor([[1, 2]]), "item": torch.tensor([3])})["a"].shape == (1,)


def test_fit_trains_it_with_one_task_a_step():
    rows = batch(64)
    labels = (rows["city"] < 2).double()
    split = ar.Examples(rows, labels)
    suite = ar.Suite([ar.Task(t, split, split, split, outputs=1, loss=masked_bce) for t in ("click", "buy")])
    model = DTRN(SCHEMA, ["click", "buy"], **OPTIONS).double()
    assert torch.equal(model(rows, "buy"), model(rows)["buy"])
    before = masked_bce(model(rows, "buy"), labels).item()
    ar.fit(model, suite, steps=60, lr=1e-2, batch_size=32)
    assert masked_bce(model(rows, "buy"), labels) < 0.5 * before


def test_unknown_labels_are_left_out_and_not_taken_for_no():
    logits = torch.tensor([[1.0, 2], [3, -1], [0.5, 0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1.0, math.nan], [0, 1], [1, math.nan]])
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], targets[:, 0].double())
    expected = expected + F.binary_cross_entropy_with_logits(logits[1, 1], targets[1, 1].double())
    torch.testing.assert_close(masked_bce(logits, targets), expected)
    (grad,) = torch.autograd.grad(masked_bce(logits, targets), logits)
    assert grad[0, 1] == 0
    assert torch.isfinite(grad).all()
    none = masked_bce(logits, torch.full((3, 2), math.nan))
    assert none == 0
    assert not torch.autograd.grad(none, logits)[0].any()


def test_entire_space_is_the_logit_of_the_product():
    a, b = torch.linspace(-4, 4, 9, dtype=torch.float64), torch.linspace(3, -5, 9, dtype=torch.float64)
    torch.testing.assert_close(entire_space(a, b).sigmoid(), a.sigmoid() * b.sigmoid())
    big = entire_space(torch.tensor([200.0, -200.0]), torch.tensor([200.0, 3.0]))
    assert torch.isfinite(big).all()


def test_seed_state_dict_inputs_and_global_state():
    before, rows = torch.get_rng_state(), batch()
    kept = {name: value.clone() for name, value in rows.items()}
    first, same = DTRN(SCHEMA, TASKS, seed=3, **OPTIONS).double(), DTRN(SCHEMA, TASKS, seed=3, **OPTIONS).double()
    other = make(seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first(rows)["buy"], same(rows)["buy"])
    assert not torch.equal(first(rows)["buy"], other(rows)["buy"])
    first.load_state_dict(other.state_dict())
    assert all(torch.equal(first(rows)[t], other(rows)[t]) for t in TASKS)
    assert all(torch.equal(rows[name], kept[name]) for name in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_device_are_kept(dtype):
    model = DTRN(SCHEMA, TASKS, **OPTIONS).to(dtype)
    assert model(batch())["buy"].dtype == dtype
    assert masked_bce(model(batch())["buy"], torch.ones(6)).dtype == torch.float32
    if torch.cuda.is_available():
        rows = {name: value.cuda() for name, value in batch().items()}
        assert model.cuda()(rows)["buy"].device.type == "cuda"


def test_a_history_that_ends_with_the_shown_item_is_warned_of():
    schema = FeatureSchema(behaviours={"view": 3}, items=5000)
    view = torch.randint(200, 5000, (200, 3), generator=torch.Generator().manual_seed(0))
    view[:, 2] = -1
    rows = {"view": view, "item": torch.arange(200)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schema.check(rows)
    rows["item"][:6] = view[:6, 1]  # the last item that is there
    with pytest.warns(UserWarning, match="'view' ends with the shown item in 3% of the rows"):
        schema.check(rows)


def test_bad_rows_are_named():
    model, rows = make(), batch()

    def fails(match, **changed):
        with pytest.raises(ar.InputError, match=match):
            model({**rows, **changed})

    fails("field 'city' has the id 4 in row 2; its ids are 0 to 3", city=torch.tensor([0, 1, 4, 0, 0, 0]))
    fails("field 'city' has the id -1 in row 0", city=torch.tensor([-1, 1, 0, 0, 0, 0]))
    wrong = rows["view"].clone()
    wrong[4, 1] = 11
    fails("field 'view' has the id 11 in row 4; its ids are 0 to 10, or -1 for padding", view=wrong)
    fails("field 'item' has the id -2 in row 0", item=torch.full((6,), -2))
    fails(r"field 'item' takes integer ids of shape \(N,\), got \(6,\) of torch.float32", item=torch.zeros(6))
    fails(r"field 'view' takes integer ids of shape \(N, n\), got \(6,\)", view=rows["item"])
    fails("histories of 'cart' are 4 long; the schema allows 1 to 3", cart=torch.zeros(6, 4, dtype=torch.long))
    fails("dense field 'price' has NaN", price=torch.full((6,), math.nan))
    fails(r"dense field 'image' takes numbers of shape \(N, 3\), got \(6, 2\)", image=torch.zeros(6, 2))
    fails("same number of rows", city=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ar.InputError, match="the batch has no field 'price'; the schema's fields are price, image"):
        model({name: value for name, value in rows.items() if name != "price"})
    with pytest.raises(ar.InputError, match="at least 1, got"):
        model({name: value[:0] for name, value in rows.items()})
    with pytest.raises(ar.InputError, match="no task 'share'; it has click, buy, like"):
        model(rows, "share")


def test_bad_settings_are_named():
    with pytest.raises(ar.InputError, match="must differ, got item more than once"):
        FeatureSchema(categorical={"item": 3}, items=5)
    with pytest.raises(ar.InputError, match="behaviours need items"):
        FeatureSchema(behaviours={"view": 3})
    with pytest.raises(ar.InputError, match="field 'city' has the size 0"):
        FeatureSchema(categorical={"city": 0})
    with pytest.raises(ar.InputError, match="at least one field"):
        FeatureSchema()
    with pytest.raises(ar.InputError, match="dim=8 must be a multiple of heads=3"):
        make(heads=3)
    with pytest.raises(ar.InputError, match="reduction must be at least 1, got 0"):
        make(reduction=0)
    with pytest.raises(ar.InputError, match="must differ, got a more than once"):
        make(tasks=("a", "a"))
    with pytest.raises(ar.InputError, match="trm=False"):
        make(trm=False).importance(batch())
    with pytest.raises(ar.InputError, match=r"take one shape, .* got \(3,\) and \(3, 1\)"):
        masked_bce(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ar.InputError, match=r"within \[0, 1\]"):
        masked_bce(torch.zeros(2), torch.tensor([0.0, 2.0]))
