"""MART against its formula, and weights that are attacked: the maximum of a linear loss, exact restoration."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.losses.adversarial import Perturbation, attack, trades_loss
from allrounder.losses.adversarial_baselines import adversarial_weights, mart_loss

WIDE = Perturbation(radius=0.1, step=0.03, steps=6, box=None)


def network(*, norm=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, 3)]
    model = nn.Sequential(*parts).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 4, generator=generator, dtype=torch.float64), torch.randint(3, (6,), generator=generator)


class TestMart:
    def test_is_its_formula_at_the_attacked_inputs(self, batch):
        model, (x, y) = network(), batch
        moved = attack(model, x, lambda out: F.cross_entropy(out, y, reduction="none"), WIDE)
        p, q = model(x).softmax(1), model(moved).softmax(1)
        total = 0.0
        for i in range(6):
            rival = max(q[i, k].item() for k in range(3) if k != y[i])
            boosted = -torch.log(q[i, y[i]]) - math.log(1 - rival)
            divergence = (p[i] * (p[i] / q[i]).log()).sum()
            total += boosted + 5 * (1 - p[i, y[i]]) * divergence
        assert mart_loss(model, x, y, WIDE).item() == pytest.approx(total.item() / 6, rel=1e-9)

    def test_without_room_it_is_boosted_cross_entropy(self, batch):
        model, (x, y) = network(), batch
        still = Perturbation(radius=0.0, step=0.1, steps=1, box=None)
        q = model(x).softmax(1)
        rival = q.scatter(1, y[:, None], 0).amax(1)
        expected = (-q.gather(1, y[:, None]).squeeze(1).log() - (1 - rival).log()).mean()
        assert mart_loss(model, x, y, still, strength=3.0).item() == pytest.approx(expected.item(), rel=1e-9)

    def test_certain_and_wrong_stays_finite(self):
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[500.0, 0.0], [-500.0, 0.0]]))
        loss = mart_loss(model, torch.ones(3, 2), torch.ones(3, dtype=torch.long), WIDE)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(model.weight.grad).all()

    def test_bad_input(self, batch):
        with pytest.raises(InputError, match="strength is at least 0, got -1"):
            mart_loss(network(), *batch, WIDE, strength=-1)


class TestWeights:
    def test_a_linear_loss_grows_by_as_much_as_it_can(self):
        model = nn.Linear(3, 2, bias=False).double()
        direction = torch.tensor([[1.0, 2.0, -1.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
        before, length = (model.weight * direction).sum().item(), model.weight.norm().item()
        with adversarial_weights(model, lambda: (model.weight * direction).sum(), radius=0.1) as loss:
            pass
        assert loss.item() == pytest.approx(before + 0.1 * length * direction.norm().item(), rel=1e-9)

    def test_the_gradient_is_that_of_the_moved_weights_and_the_weights_come_back(self, batch):
        model, (x, y) = network(norm=True), batch
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        matrices = [p for p in model.parameters() if p.ndim >= 2]

        def loss(net):
            return F.cross_entropy(net(x), y)

        slopes = torch.autograd.grad(loss(model), matrices)
        model.load_state_dict(kept)
        other = network(norm=True)
        with torch.no_grad():
            for p, g in zip([p for p in other.parameters() if p.ndim >= 2], slopes):
                p += g * 0.05 * p.norm() / g.norm()
        loss(other).backward()
        with adversarial_weights(model, lambda: loss(model), radius=0.05) as value:
            value.backward()
        for one, two in zip(model.parameters(), other.parameters()):
            assert torch.allclose(one.grad, two.grad, atol=1e-12)
        after = model.state_dict()
        weights = [name for name, _ in model.named_parameters()]
        assert all(torch.equal(after[name], kept[name]) for name in weights)
        assert after["1.num_batches_tracked"] == kept["1.num_batches_tracked"] + 1

    def test_it_goes_on_top_of_trades(self, batch):
        model, (x, y) = network(), batch
        plain = trades_loss(model, x, y, WIDE).item()
        with adversarial_weights(model, lambda: trades_loss(model, x, y, WIDE), radius=0.02) as loss:
            assert loss.item() > plain
        with adversarial_weights(model, lambda: trades_loss(model, x, y, WIDE), radius=0.0) as loss:
            assert loss.item() == plain

    def test_an_error_inside_brings_the_weights_back(self, batch):
        model, (x, y) = network(), batch
        kept = [p.detach().clone() for p in model.parameters()]

        def use():
            with adversarial_weights(model, lambda: F.cross_entropy(model(x), y), radius=0.1):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            use()
        assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept))

    def test_bad_input(self):
        model = nn.Linear(2, 2)

        def enter(loss, radius):
            with adversarial_weights(model, loss, radius=radius):
                pass

        with pytest.raises(InputError, match="radius is at least 0, got nan"):
            enter(lambda: model.weight.sum(), float("nan"))
        with pytest.raises(InputError, match="moves the weights is not finite"):
            enter(lambda: (model.weight * float("inf")).sum(), 0.1)
