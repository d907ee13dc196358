import copy
import itertools
import math
import warnings

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from allrounder.errors import InputError
from allrounder.merging.logit_fusion import LogitFusion, fuse, fusion_scales

LARGE, BASE, EXPERT, SECOND = (
    torch.tensor(x, dtype=torch.float64) for x in ([2, 1, 0, -1], [1, 1, 0, 0], [0, 3, 0, 0], [1, 1, 3, 0])
)
INF = math.inf


def kl(a, b):
    """Term by term, from the definition."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return torch.where(log_a > -INF, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def objective(large, base, experts, scales):
    moved = large + sum(scales[..., i, None] * (expert - base) for i, expert in enumerate(experts))
    parts = [(kl(moved, large) - kl(e, base)) ** 2 + (kl(large, moved) - kl(base, e)) ** 2 for e in experts]
    return torch.stack(parts).sum(0)


def drawn(rows, vocabulary=12, experts=1, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)

    base = noise(1.5)
    return noise(2.0), base, [base + noise(size) for _ in range(experts)]


def test_numbers_of_the_card():
    scale = fusion_scales(LARGE, BASE, EXPERT)
    assert kl(EXPERT, BASE).item() == pytest.approx(0.563982, abs=1e-6)
    assert scale.item() == pytest.approx(0.868, abs=1e-3)
    assert objective(LARGE, BASE, [EXPERT], scale).item() == pytest.approx(0.014094, abs=1e-6)
    p = fuse(LARGE, BASE, EXPERT).softmax(-1)
    assert p.tolist() == pytest.approx([0.1559, 0.7753, 0.0503, 0.0185], abs=2e-4)
    assert fusion_scales(LARGE, BASE, EXPERT, refine=False).item() == pytest.approx(0.9)


def test_two_experts_of_the_card():
    experts = {"first": EXPERT, "second": SECOND}
    one = fusion_scales(LARGE, BASE, experts)
    assert one[1] == 0
    assert one[0].item() == pytest.approx(0.95, abs=0.01)
    grid = fusion_scales(LARGE, BASE, experts, points=41, refine=False)
    assert grid.tolist() == pytest.approx([0.95, 0.0])
    cost = objective(LARGE, BASE, [EXPERT, SECOND], grid)
    assert cost.item() == pytest.approx(0.10251, abs=1e-5)
    assert objective(LARGE, BASE, [EXPERT, SECOND], one) < cost
    joint = fusion_scales(LARGE, BASE, experts, select="joint")
    assert joint.tolist() == pytest.approx([0.70, 0.875], abs=0.0125)
    assert objective(LARGE, BASE, [EXPERT, SECOND], joint) <= 0.10038
    swapped = fusion_scales(LARGE, BASE, [SECOND, EXPERT])
    assert swapped.tolist() == one.flip(0).tolist()


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_expert_against_a_search_over_everything(size, dtype):
    large, base, (expert,) = drawn(40, size=size)
    grid = torch.linspace(0, 2, 21, dtype=torch.float64)
    costs = torch.stack([objective(large, base, [expert], a.expand(40, 1)) for a in grid])
    given = large.to(dtype), base.to(dtype), expert.to(dtype)
    coarse = fusion_scales(*given, refine=False)
    cost = objective(large, base, [expert], coarse.double())
    torch.testing.assert_close(cost, costs.min(0).values, atol=1e-6, rtol=1e-4)
    if dtype == torch.float64:
        torch.testing.assert_close(coarse.squeeze(-1), grid[costs.argmin(0)])
    fine = fusion_scales(*given)
    assert fine.dtype == dtype
    everything = torch.linspace(0, 2, 801, dtype=torch.float64)
    best = torch.stack([objective(large, base, [expert], a.expand(40, 1)) for a in everything]).min(0).values
    cost = objective(large, base, [expert], fine.double())
    torch.testing.assert_close(cost, best, atol=2e-5, rtol=2e-3)


def test_several_experts_against_a_search_over_everything():
    large, base, experts = drawn(30, experts=3, seed=1)
    grid = torch.linspace(0, 2, 21, dtype=torch.float64)
    single = torch.stack([
        objective(large, base, experts, torch.zeros(30, 3, dtype=torch.float64).index_fill(1, torch.tensor(t), a))
        for t in range(3) for a in grid.tolist()
    ])  # fmt: skip
    coarse = fusion_scales(large, base, experts, refine=False)
    assert ((coarse > 0).sum(-1) <= 1).all()
    torch.testing.assert_close(objective(large, base, experts, coarse), single.min(0).values)
    one, joint = (fusion_scales(large, base, experts, select=select) for select in ("one", "joint"))
    cost = {"one": objective(large, base, experts, one), "joint": objective(large, base, experts, joint)}
    assert (cost["one"] <= single.min(0).values + 1e-12).all()
    own = torch.stack([torch.stack([kl(e, base), kl(base, e)]) for e in experts])
    assert (cost["joint"] <= cost["one"] + 1e-5 * own.mean(0).square().sum(0)).all()
    points = torch.tensor(list(itertools.product(torch.linspace(0, 2, 11).tolist(), repeat=3)), dtype=torch.float64)
    whole = torch.stack([objective(large, base, experts, point.expand(30, 3)) for point in points]).min(0).values
    assert (cost["joint"] <= whole + 1e-6).double().mean() >= 0.9  # a local method: seldom not the lowest valley
    assert cost["joint"].mean() <= whole.mean()
    assert cost["one"].mean() > whole.mean() + 0.005  # so the joint solve has something to gain
    # The reading of the docstring: the floor is the spread of the experts' own divergences.
    assert (cost["joint"] >= (own - own.mean(0)).square().sum((0, 1)) - 1e-9).all()


@pytest.mark.parametrize("select", ["one", "joint"])
def test_invariances(select):
    large, base, experts = drawn(9, experts=2, seed=2)
    scales = fusion_scales(large, base, experts, select=select)
    moved = fusion_scales(large + 7, base - 3, [experts[0] + 11, experts[1]], select=select)
    torch.testing.assert_close(moved, scales, atol=1e-6, rtol=0)
    rows = [fusion_scales(large[i], base[i], [e[i] for e in experts], select=select) for i in range(9)]
    torch.testing.assert_close(torch.stack(rows), scales, atol=1e-6, rtol=0)
    shaped = [x.reshape(3, 3, -1) for x in (large, base, *experts)]
    again = fusion_scales(shaped[0], shaped[1], torch.stack(shaped[2:]).unbind(), select=select)
    assert again.shape == (3, 3, 2)
    torch.testing.assert_close(again.reshape(9, 2), scales, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        fuse(large, base, experts[::-1], select=select), fuse(large, base, experts, select=select), atol=1e-5, rtol=0
    )


def test_limits():
    large, base, (expert,) = drawn(20, seed=3)
    assert not fusion_scales(large, base, base).any()
    assert torch.equal(fuse(large, base, base), large)
    assert torch.equal(fuse(large, base, expert, scale=0), large)
    torch.testing.assert_close(fusion_scales(base, base, expert), torch.ones(20, 1, dtype=torch.float64))
    torch.testing.assert_close(fuse(base, base, expert).softmax(-1), expert.softmax(-1))
    proxy = fuse(large, base, expert, scale=1.0)
    torch.testing.assert_close(proxy.softmax(-1), (large + expert - base).softmax(-1))
    torch.testing.assert_close(proxy.logsumexp(-1), large.logsumexp(-1))
    bounded = fusion_scales(large, base, expert, bound=0.25)
    assert bounded.max() == 0.25
    both = fusion_scales(large, base, [expert, expert], bound=[0.1, 2.0], select="joint")
    assert both[:, 0].max() <= 0.1 + 1e-9
    assert both[:, 1].max() > 0.1
    given = torch.linspace(0, 2, 20, dtype=torch.float64).unsqueeze(-1)
    mixed = fuse(large, base, expert, scale=given)
    torch.testing.assert_close(mixed.softmax(-1), (large + given * (expert - base)).softmax(-1))


def test_divergences_grow_with_the_scale():
    large, base, (expert,) = drawn(20, seed=4)
    moved = torch.stack([fuse(large, base, expert, scale=a / 10) for a in range(31)])
    assert (kl(moved, large).diff(dim=0) >= -1e-12).all()
    assert (kl(large, moved).diff(dim=0) >= -1e-12).all()


def test_banned_tokens_are_out_in_all_three():
    large, base, (expert,) = drawn(6, vocabulary=10, seed=5)
    kept = [0, 2, 3, 5, 8, 9]
    banned = [x.clone() for x in (large, base, expert)]
    for x, token in zip(banned, (1, 4, 6), strict=True):
        x[:, [token, 7]] = -INF
    fused = fuse(*banned)
    assert (fused[:, [1, 4, 6, 7]] == -INF).all()
    small = fuse(*(x[:, kept] for x in (large, base, expert)))
    torch.testing.assert_close(fused[:, kept], small)
    forced = torch.full_like(large, -INF)
    forced[:, 3] = 0.0
    assert torch.equal(fuse(forced, base, expert), forced)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_searched_in_float32(dtype):
    large, base, (expert,) = drawn(8, vocabulary=5000, size=0.05)
    large, base, expert = large.to(dtype), base.to(dtype), expert.to(dtype)
    before = large.clone()
    scales = fusion_scales(large, base, expert)
    assert scales.dtype == torch.float32
    torch.testing.assert_close(
        scales, fusion_scales(large.double(), base.double(), expert.double()).float(), atol=2e-2, rtol=0
    )
    assert fuse(large, base, expert).dtype == dtype
    assert torch.equal(large, before)


def test_wrong_input():
    large, base, (expert,) = drawn(2)
    with pytest.raises(InputError, match="small base has 10 logits and the large model 12: .* one vocabulary"):
        fuse(large, base[:, :10], expert)
    with pytest.raises(InputError, match="expert 1 are"):
        fuse(large, base, [expert, expert[:1]])
    with pytest.raises(InputError, match="expert 0 hold NaN"):
        fuse(large, base, expert.where(expert < expert.max(), torch.nan))
    with pytest.raises(InputError, match="large model hold NaN"):
        fuse(large.where(large < large.max(), INF), base, expert)
    with pytest.raises(InputError, match="no token left"):
        fuse(large, base.where(torch.arange(12) > 5, -INF), expert.where(torch.arange(12) < 6, -INF))
    with pytest.raises(InputError, match="floating tensor"):
        fuse(large, base, expert.long())
    with pytest.raises(InputError, match="one small expert or more"):
        fuse(large, base, [])
    for wrong in ({"select": "two"}, {"points": 1}, {"bound": 0.0}, {"bound": [1.0, 2.0]}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            fusion_scales(large, base, expert, **wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=next(iter(wrong))):
            LogitFusion(torch.nn.Identity(), torch.nn.Identity(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale is finite"):
        fuse(large, base, expert, scale=math.nan)
    with pytest.raises(InputError, match="one for each of the 1 experts"):
        fuse(large, base, expert, scale=[1.0, 2.0])
    with pytest.raises(InputError, match="leave out bound"):
        fuse(large, base, expert, scale=1.0, bound=1.0)
    with pytest.raises(InputError, match="callable"):
        LogitFusion(3, torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not both"):
        LogitFusion(len, len, pad_token_id=0, attention_mask=torch.ones(1, 1))


VOCABULARY, PAD = 40, 0


def gpt2(seed, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=width, n_layer=1, n_head=2, initializer_range=0.4,
            bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def llama(seed, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.4, bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def tuned(model, seed):
    """Stands for a fine-tuned copy."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


class Counted:
    """Counts the tokens that a model is run over."""

    def __init__(self, model):
        self.tokens = []
        model.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, module, arguments, keywords):
        self.tokens.append(tuple((arguments[0] if arguments else keywords["input_ids"]).shape))


@torch.no_grad()
def plain(model, ids, mask):
    """Logits of the next token without any cache, each row by itself with its padding cut off."""
    return torch.cat([model(row[keep][None]).logits[:, -1] for row, keep in zip(ids, mask.bool(), strict=True)])


@torch.no_grad()
def by_hand(large, base, experts, ids, mask, steps, **options):
    scales = []
    for _ in range(steps):
        logits = [plain(model, ids, mask) for model in (large, base, *experts)]
        found = fusion_scales(logits[0], logits[1], logits[2:], **options)
        scales.append(found)
        token = fuse(logits[0], logits[1], logits[2:], scale=found).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids, torch.stack(scales)


def prompts(padded):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, PAD), mask


@pytest.mark.parametrize(
    ("make", "padded", "select"), [(gpt2, False, "one"), (gpt2, True, "joint"), (llama, True, "one")]
)
def test_greedy_generation_is_the_loop_without_caches(make, padded, select):
    large, base = make(0, 48), make(1)
    experts = [tuned(base, 2), tuned(base, 3)]
    ids, mask = prompts(padded)
    want, scales = by_hand(large, base, experts, ids, mask, 6, select=select)
    fusion = LogitFusion(base, experts, pad_token_id=PAD if padded else None, select=select)
    counts = [Counted(model) for model in (base, *experts)]
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    got = large.generate(ids, logits_processor=[fusion], **given)
    assert torch.equal(got, want)
    torch.testing.assert_close(torch.stack(fusion.history), scales, atol=2e-3, rtol=0)
    assert scales.max() > 0
    assert not torch.equal(got, large.generate(ids, **given))
    for count in counts:
        assert count.tokens == [(3, 6)] + [(3, 1)] * 5
    again = large.generate(ids, logits_processor=[fusion], **given)  # the same object, the prompt anew
    assert torch.equal(again, want)
    assert len(fusion.history) == 6
    masked = LogitFusion(base, experts, attention_mask=mask, select=select)
    assert torch.equal(large.generate(ids, logits_processor=[masked], **given), want)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_beams_reorder_the_caches(make):
    large, base = make(0, 48), make(1)
    expert = tuned(base, 2)
    ids, mask = prompts(padded=True)

    def uncached(model):
        def call(rows):
            return plain(model, rows, (rows != PAD).cumsum(1) > 0)

        return call

    given = {
        "attention_mask": mask, "max_new_tokens": 6, "num_beams": 4, "num_return_sequences": 4, "do_sample": False,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    want = large.generate(ids, logits_processor=[LogitFusion(uncached(base), uncached(expert))], **given)
    kept = LogitFusion(base, {"only": expert}, pad_token_id=PAD)
    orders, follow = [], kept._follow

    def watched(*arguments):
        orders.append(follow(*arguments)[1])
        return follow(*arguments)

    kept._follow = watched  # type: ignore[method-assign]
    count = Counted(base)
    got = large.generate(ids, logits_processor=[kept], **given)
    assert any(order is not None and not torch.equal(order, torch.arange(12)) for order in orders)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=1e-4)
    assert count.tokens == [(12, 6)] + [(12, 1)] * 5
    # Scores stay log-probabilities: beams add them up.
    torch.testing.assert_close(got.scores[3].exp().sum(-1), torch.ones(12), atol=1e-4, rtol=0)
    masked = LogitFusion(base, expert, attention_mask=mask)  # three prompts, twelve beams
    assert torch.equal(large.generate(ids, logits_processor=[masked], **given).sequences, want.sequences)


def test_scale_zero_is_the_large_model_and_one_is_proxy_tuning():
    large, base = gpt2(0, 48), gpt2(1)
    expert = tuned(base, 2)
    ids, mask = prompts(padded=False)
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    off = LogitFusion(base, expert, scale=0.0)
    assert torch.equal(large.generate(ids, logits_processor=[off], **given), large.generate(ids, **given))
    proxy = LogitFusion(base, expert, scale=1.0)
    logits = [plain(model, ids, mask) for model in (large, base, expert)]
    want = (logits[0] + logits[2] - logits[1]).softmax(-1)
    torch.testing.assert_close(proxy(ids, logits[0]).softmax(-1), want)
    assert torch.equal(proxy.history[0], torch.ones(3, 1))


def test_own_loop_with_callables_and_changed_prefixes():
    base = gpt2(1)
    expert = tuned(base, 2)
    ids, _ = prompts(padded=False)
    scores = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    kept = LogitFusion(base, expert)
    free = LogitFusion(lambda rows: base(rows).logits, lambda rows: expert(rows).logits[:, -1])
    for rows in (ids[:, :3], ids[:, :5], ids[[1, 1, 0]], ids[:, :4], ids[:2, :5], ids.flip(0)):  # grown, new order, cut
        torch.testing.assert_close(kept(rows, scores[: len(rows)]), free(rows, scores[: len(rows)]))
    with pytest.raises(InputError, match="NaN"):
        kept(torch.cat([ids.flip(0), ids[:, :1]], 1), scores * torch.nan)
    longer = torch.cat([ids.flip(0), ids[:, :2]], 1)  # after an error nothing is taken from the caches
    torch.testing.assert_close(kept(longer, scores), free(longer, scores))
    kept.reset()
    assert not kept.history
    assert all(model.cache is None for model in kept.small)
    with pytest.raises(InputError, match="40 logits and the large model 30"):
        kept(ids, scores[:, :30])
    with pytest.raises(InputError, match=r"logits \(N, T, V\) or \(N, V\) for 3 rows"):
        LogitFusion(lambda rows: torch.zeros(VOCABULARY), expert)(ids, scores)
    with pytest.raises(InputError, match="does not fit"):
        LogitFusion(base, expert, attention_mask=torch.ones(2, 6))(ids, scores)


def test_warns_of_an_expert_of_another_base():
    base = torch.zeros(2, VOCABULARY)
    base[:, 0] = 60.0
    stranger = base.roll(1, 1)
    ids = torch.ones(2, 1, dtype=torch.long)
    with pytest.warns(UserWarning, match=r"KL\(expert 0 \| small base\) is 60.0 nats"):
        LogitFusion(lambda _: base, lambda _: stranger)(ids, torch.zeros(2, VOCABULARY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogitFusion(lambda _: base, lambda _: base + 1)(ids, torch.zeros(2, VOCABULARY))
