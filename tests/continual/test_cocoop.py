"""CoCoOp: prompts that depend on the image, on a tiny CLIP and on the toy towers of the study."""

import string

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.continual import prompt_src_clip
from allrounder.continual.prompt_src import VARIANTS, PromptSRC, load_prompts, prompt_src_loss, save_prompts
from allrounder.continual.prompt_src_clip import PromptedCLIP
from allrounder.continual.two_tower import base_to_novel, cosines, prompt_head, unit
from allrounder.errors import InputError
from allrounder.nets.prompts import deep_prompts, meta_net
from allrounder.state import load_state, save_state
from allrounder.studies.prompt_src import PEERS, ToyTowers, world
from allrounder.task import Batches, Examples

NAMES = ["cat", "hot_dog", "a bird of the sea"]


@pytest.fixture(scope="module")
def parts():
    """A random CLIP of two layers and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    letters = [*string.ascii_lowercase, "."]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 48, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=shape | text, vision_config=shape | {"hidden_size": 20, "image_size": 16, "patch_size": 8},
        projection_dim=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.logit_scale.data.fill_(3.0)
    return model.eval(), tokenizer


def tower_of(parts, *, conditional=True, context=10, phrase="", **options):
    return PromptedCLIP(
        *parts, context=context, vision_tokens=0, depth=1, phrase=phrase, conditional=conditional, **options
    )


def images(count=5, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def stirred(tower, seed=1, size=0.5):
    """The same, its meta-net no longer silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.prompts["meta"].parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return tower


def scores(tower, inputs, names=NAMES):
    with torch.no_grad():
        return tower.logits(unit(tower.encode_image(inputs)), names)


def test_it_has_the_paper_s_count_of_numbers_at_the_size_of_vit_b_16():
    meta = sum(p.numel() for p in meta_net(512, 512).parameters())
    assert meta == 512 * 32 + 32 + 32 * 512 + 512
    assert meta + sum(p.numel() for p in deep_prompts(4, 512)) == 35_360


def test_the_meta_net_is_two_layers_and_begins_silent():
    net = meta_net(32, 5, seed=3)
    assert [tuple(p.shape) for p in net.parameters()] == [(2, 32), (2,), (5, 2), (5,)]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert net(x).abs().max() == 0
    with torch.no_grad():
        net[2].weight.fill_(1.0)
        net[2].bias.fill_(0.5)
    torch.testing.assert_close(
        net(x), (x @ net[0].weight.T + net[0].bias).relu().sum(1, keepdim=True).expand(4, 5) + 0.5
    )
    assert torch.equal(meta_net(32, 5, seed=3)[0].weight, net[0].weight)
    assert meta_net(8, 2)[0].out_features == 1
    with pytest.raises(InputError, match="at least 1, got 0, 4 and 1"):
        meta_net(0, 4)


def test_a_silent_meta_net_is_coop(parts):
    whole, plain = tower_of(parts), tower_of(parts, conditional=False)
    assert torch.equal(whole.prompts["text"][0], plain.prompts["text"][0])
    torch.testing.assert_close(scores(whole, images()), scores(plain, images()))
    features = unit(whole.encode_image(images()))
    assert whole.text_for(NAMES, features).shape == (5, 3, 128)
    assert plain.text_for(NAMES, features).shape == (3, 128)


def test_each_image_has_the_texts_of_a_coop_with_its_own_context(parts):
    tower, plain = stirred(tower_of(parts)), tower_of(parts, conditional=False)
    features = unit(tower.encode_image(images()))
    with torch.no_grad():
        found = tower.text_for(NAMES, features)
        meta = tower.prompts["meta"]
        for row, image in enumerate(features):
            token = meta[2](meta[0](image).relu())
            plain.prompts["text"][0].copy_(tower.prompts["text"][0] + token)
            torch.testing.assert_close(found[row], plain.encode_text(NAMES))
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_an_answer_does_not_depend_on_the_other_images_nor_on_the_size_of_a_pass(parts, monkeypatch):
    tower = stirred(tower_of(parts))
    together = scores(tower, images())
    alone = torch.cat([scores(tower, images()[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)
    rows = []
    handle = tower.model.text_model.register_forward_hook(lambda m, a, out: rows.append(len(out.pooler_output)))
    for most, expected in ((256, [15]), (7, [6, 6, 3]), (1, [3] * 5)):
        monkeypatch.setattr(prompt_src_clip, "TEXTS", most)
        rows.clear()
        torch.testing.assert_close(scores(tower, images()), together)
        assert rows == expected  # C texts for every image: what CoCoOp costs
    handle.remove()


def test_training_moves_context_and_meta_net_and_nothing_else(parts):
    tower = tower_of(parts)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    data = Examples(images(6), torch.arange(6) % 3)
    trainer = PromptSRC(tower, NAMES, epochs=3, lr=0.5, **VARIANTS["IVLP"])
    trainer.fit(Batches(data, 2, seed=0))
    after = tower.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert moved == {"prompts.text.0", *(f"prompts.meta.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))}
    assert trainer.history[-1]["ce"] < trainer.history[0]["ce"]


def test_the_step_is_gradient_descent_on_cross_entropy():
    codes, train, *_ = world(0, 1.0)
    first = codes[:10].tolist()
    tower, other = (stirred(ToyTowers(0, kind="CoCoOp")) for _ in range(2))
    teacher = tower.encode_text(first, prompted=False)
    trainer = PromptSRC(
        tower, first, teacher=teacher, epochs=1, lr=0.1, warmup_lr=0.1, momentum=0.0, weight_decay=0.0,
        **VARIANTS["IVLP"],
    )  # fmt: skip
    trainer.fit(Batches(train, 40))
    prompts = dict(other.prompts.named_parameters())
    f = F.normalize((train.inputs @ other.frozen.T).tanh(), dim=1)
    hidden = (f @ prompts["meta.0.weight"].T + prompts["meta.0.bias"]).relu()
    shift = hidden @ prompts["meta.2.weight"].T + prompts["meta.2.bias"]
    logits = []
    for i in range(len(f)):
        g = F.normalize(
            ((codes[:10] + prompts["p"] + codes[:10] @ prompts["W"] + shift[i]) @ other.frozen.T).tanh(), dim=1
        )
        logits.append(20 * g @ f[i])
    loss = F.cross_entropy(torch.stack(logits), train.targets)
    gradients = torch.autograd.grad(loss, list(prompts.values()))
    for (name, value), gradient in zip(prompts.items(), gradients, strict=True):
        torch.testing.assert_close(tower.prompts.get_parameter(name), value - 0.1 * gradient, msg=name)


def test_the_regularisers_take_texts_of_each_image():
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return unit(torch.randn(*shape, generator=generator, dtype=torch.float64))

    f, f0, g0, own, y = some(4, 7), some(4, 7), some(3, 7), some(4, 3, 7), torch.tensor([0, 1, 2, 0])
    found = prompt_src_loss(f, own, y, f0, g0, scale=8.0)
    z = torch.stack([8 * own[b] @ f[b] for b in range(4)])
    assert found["ce"].item() == pytest.approx(F.cross_entropy(z, y).item())
    assert found["text"].item() == pytest.approx(
        sum((own[b, c] - g0[c]).abs().mean().item() for b in range(4) for c in range(3)) / 12
    )
    teacher = (8 * f0 @ g0.T).softmax(1)
    assert found["logits"].item() == pytest.approx((teacher * (teacher.log() - z.log_softmax(1))).sum().item() / 12)
    shared = own[0].expand(4, 3, 7)
    alike = prompt_src_loss(f, own[0], y, f0, g0, scale=8.0)
    for name, value in prompt_src_loss(f, shared, y, f0, g0, scale=8.0).items():
        torch.testing.assert_close(value, alike[name])
    torch.testing.assert_close(cosines(f, shared), cosines(f, own[0]))
    with pytest.raises(InputError, match="the text features are"):
        prompt_src_loss(f, own[:, :2], y, f0, g0, scale=8.0)


def test_base_and_novel_classes_are_judged_image_by_image(parts):
    tower = stirred(tower_of(parts), size=2.0)
    novel = ["fox", "sea"]
    base, other = Examples(images(9), torch.arange(9) % 3), Examples(images(8, 1), torch.arange(8) % 2)
    found = base_to_novel(tower, (base, NAMES), (other, novel), batch_size=4)
    for side, (data, names) in {"base": (base, ["cat", "hot dog", NAMES[2]]), "novel": (other, novel)}.items():
        right = [
            scores(tower, data.inputs[i : i + 1], names).argmax().item() == data.targets[i].item()
            for i in range(len(data))
        ]
        assert found[side] == pytest.approx(sum(right) / len(right))
    frozen = base_to_novel(tower, (base, NAMES), (other, novel), templates=["a {}."])
    assert frozen == base_to_novel(tower_of(parts), (base, NAMES), (other, novel), templates=["a {}."])


def test_prompts_and_a_training_in_progress_are_saved(parts, tmp_path):
    data = Batches(Examples(images(6), torch.arange(6) % 3), 3)
    options = {"epochs": 3, "lr": 0.5, "aggregate": "mean", "text_weight": 1.0}
    straight = stirred(tower_of(parts))
    PromptSRC(straight, NAMES, **options).fit(data)
    one, two = stirred(tower_of(parts)), tower_of(parts)
    trainer = PromptSRC(one, NAMES, **options)

    def stop(done, epochs):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(data, progress=stop)
    save_state(trainer.state_dict(), tmp_path / "state")
    later = PromptSRC(two, NAMES, **options)
    later.load_state_dict(load_state(tmp_path / "state"))
    later.fit(data)
    for name, value in straight.prompts.state_dict().items():
        assert torch.equal(two.prompts.state_dict()[name], value), name
    save_prompts(two, tmp_path / "prompts.safetensors")
    three = tower_of(parts)
    load_prompts(three, tmp_path / "prompts.safetensors")
    assert torch.equal(scores(three, images()), scores(two, images()))
    with pytest.raises(InputError, match=r"meta"):
        load_prompts(tower_of(parts, conditional=False), tmp_path / "prompts.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_float_type(parts, dtype):
    model, tokenizer = parts
    cast = type(model)(model.config).to(dtype).eval()
    cast.load_state_dict(model.state_dict())
    tower = stirred(tower_of((cast, tokenizer)))
    found = scores(tower, images().to(dtype))
    torch.testing.assert_close(found.float(), scores(stirred(tower_of(parts)), images()), rtol=0.05, atol=0.5)
    PromptSRC(tower, NAMES, epochs=2, aggregate="mean").fit([(images(3).to(dtype), torch.arange(3))])
    assert tower.prompts["meta"][0].weight.dtype == torch.float32


def test_what_does_not_fit_is_refused(parts):
    for options in ({"depth": 2}, {"vision_tokens": 4}):
        with pytest.raises(InputError, match="give vision_tokens=0 and depth=1"):
            PromptedCLIP(*parts, **{"phrase": "", "vision_tokens": 0, "depth": 1, "conditional": True} | options)
    with pytest.raises(InputError, match="no fixed head"):
        prompt_head(tower_of(parts), NAMES)


@pytest.mark.parametrize("kind", ["IVLP", *PEERS])
def test_the_toys_of_the_study_begin_as_zero_shot(kind):
    codes, train, base, novel = world(1, 1.0)
    first, second = codes[:10].tolist(), codes[10:].tolist()
    tower = ToyTowers(1, kind=kind)
    assert base_to_novel(tower, (base, first), (novel, second)) == base_to_novel(
        ToyTowers(1), (base, first), (novel, second)
    )
    f = tower.encode_image(train.inputs)
    torch.testing.assert_close(f, tower.encode_image(train.inputs, prompted=False))
    names = {name.partition(".")[0] for name, _ in tower.prompts.named_parameters()}
    assert names == {"IVLP": {"p", "W", "q", "U"}, "CoOp": {"p", "W"}, "CoCoOp": {"p", "W", "meta"},
                     "MaPLe": {"p", "W", "K"}}[kind]  # fmt: skip
    if kind == "MaPLe":
        with torch.no_grad():
            tower.prompts["p"].fill_(0.5)
        moved = (train.inputs + torch.full((32,), 0.5) @ tower.prompts["K"]) @ tower.frozen.T
        torch.testing.assert_close(tower.encode_image(train.inputs), moved.tanh())
    assert isinstance(tower.prompts, nn.Module)
