import math

import pytest
import torch
from torch import nn

from engm.attacks import PGD
from engm.config import RunConfig
from engm.errors import InputError
from engm.methods import MART, PGDAT, TRADES, Natural, build

ATTACK = PGD(eps=0.1, step_size=0.05, num_steps=2)
KL_ATTACK = PGD(eps=0.1, step_size=0.05, num_steps=2, loss="kl", start_noise=0.001)


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    return model, torch.rand(7, 1, 4, 4, dtype=torch.float64), torch.randint(5, (7,))


# One example at a time, from probabilities, as the papers write the losses.
def p(model, image):
    z = model(image[None])[0]
    return z.exp() / z.exp().sum()


def cross_entropy(model, image, label, smoothing=0.0):
    target = torch.full((5,), smoothing / 5, dtype=torch.float64)
    target[label] += 1 - smoothing
    return -(target * p(model, image).log()).sum()


def divergence(model, image, image_adv):
    clean, adv = p(model, image), p(model, image_adv)
    return sum(clean[k] * (clean[k] / adv[k]).log() for k in range(5))


def natural(model, image, image_adv, label):
    return cross_entropy(model, image, label)


def madry(model, image, image_adv, label):
    return cross_entropy(model, image_adv, label)


def smoothed(model, image, image_adv, label):
    return cross_entropy(model, image_adv, label, smoothing=0.2)


def trades(model, image, image_adv, label):
    return cross_entropy(model, image, label) + 3 * divergence(model, image, image_adv)


def smoothed_trades(model, image, image_adv, label):
    clean = cross_entropy(model, image, label, smoothing=0.1)
    return clean + 6 * divergence(model, image, image_adv)


def mart(model, image, image_adv, label):
    adv = p(model, image_adv)
    rival = max(float(adv[k].detach()) for k in range(5) if k != label)
    k = next(k for k in range(5) if k != label and float(adv[k].detach()) == rival)
    boosted = -adv[label].log() - (1 - adv[k]).log()
    weight = 1 - p(model, image)[label]
    return boosted + 4 * weight * divergence(model, image, image_adv)


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        (Natural(), natural),
        (PGDAT(ATTACK), madry),
        (PGDAT(ATTACK, label_smoothing=0.2), smoothed),
        (TRADES(KL_ATTACK, beta=3), trades),
        (TRADES(KL_ATTACK, label_smoothing=0.1), smoothed_trades),
        (MART(ATTACK, beta=4), mart),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_losses_and_their_gradients_are_the_formulas(method, formula):
    model, x, y = problem()
    x_adv = method.attack(model, x, y)
    assert (x_adv is x) is isinstance(method, Natural)
    losses = method.losses(model, x, x_adv, y)
    rows = zip(x, x_adv, y, strict=True)
    expected = torch.stack([formula(model, *row) for row in rows])
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    parameters = list(model.parameters())
    weights = torch.rand(7, dtype=torch.float64)  # each example's gradient, not their sum alone
    for found, wanted in zip(
        torch.autograd.grad(losses @ weights, parameters),
        torch.autograd.grad(expected @ weights, parameters),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", [PGDAT(ATTACK), TRADES(KL_ATTACK), MART(ATTACK)])
@pytest.mark.parametrize("size", [30.0, 1e3])
def test_confident_networks_have_finite_losses_and_gradients(method, size):
    model, x, y = problem()
    model = model.float()
    with torch.no_grad():
        model[3].weight *= size
    x, x_adv = x.float(), (x + 0.1).clamp(max=1).float()
    losses = method.losses(model, x, x_adv, y)
    assert losses.isfinite().all()
    for gradient in torch.autograd.grad(losses.sum(), list(model.parameters())):
        assert gradient.isfinite().all()


def test_a_run_gets_the_method_it_asks_for():
    attack = PGD(eps=0.2, step_size=0.125, num_steps=4, norm="l2")
    settings = dict(eps=0.2, num_steps=4, norm="l2")
    assert build(RunConfig(**settings)) == PGDAT(attack)
    assert build(RunConfig(**settings, label_smoothing=0.1)) == PGDAT(attack, 0.1)
    assert build(RunConfig(method="natural")) == Natural()
    assert build(RunConfig(method="natural", label_smoothing=0.1)) == Natural(label_smoothing=0.1)
    assert build(RunConfig(**settings, method="mart")) == MART(attack, 5)
    kl_attack = PGD(eps=0.2, step_size=0.125, num_steps=4, norm="l2", loss="kl", start_noise=0.001)
    assert build(RunConfig(**settings, method="trades")) == TRADES(kl_attack, 6)
    assert build(RunConfig(**settings, method="trades", beta=2)) == TRADES(kl_attack, 2)
    noisy = PGD(eps=0.2, step_size=0.125, num_steps=4, norm="l2", start_noise=0.001, mode="train")
    published = dict(start_noise=0.001, attack_mode="train")
    assert build(RunConfig(**settings, **published, method="mart")) == MART(noisy, 5)
    uniform = PGD(eps=0.2, step_size=0.125, num_steps=4, norm="l2", loss="kl")
    assert build(RunConfig(**settings, method="trades", start_noise=0)) == TRADES(uniform, 6)
    one_step = PGD(eps=0.2, step_size=0.25, num_steps=1)
    assert build(RunConfig(eps=0.2, method="fast_at")) == PGDAT(one_step)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TRADES(KL_ATTACK, beta=-1), "beta must be a number, 0 or more, as in 6.0; got -1"),
        (lambda: MART(ATTACK, beta=math.nan), "beta must be a number"),
        (lambda: PGDAT(ATTACK, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\)"),
        (lambda: Natural(label_smoothing=-0.1), "got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(make, reason):
    with pytest.raises(InputError, match=reason):
        make()


def test_the_attack_of_trades_starts_from_a_little_noise_and_not_in_the_ball():
    model, x, y = problem()
    still = PGD(eps=0.1, step_size=1e-12, num_steps=1, loss="kl", start_noise=0.001)
    inner = (x > 0.01) & (x < 0.99)
    noise = (still(model, x, y, generator=torch.Generator().manual_seed(0)) - x)[inner]
    assert noise.std().item() == pytest.approx(0.001, rel=0.2)
    assert noise.abs().max() < 0.006


@pytest.mark.parametrize("method", [Natural(), PGDAT(ATTACK), TRADES(KL_ATTACK), MART(ATTACK)])
def test_losses_of_bfloat16_logits_are_not_rounded_again(method):
    class Linear(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(16, 5, generator=generator, dtype=torch.float64)
            return (3 * x.flatten(1) @ weight).bfloat16().to(self.dtype)

    _, x, y = problem()
    x_adv = (x + 0.02).clamp(max=1)
    rough = method.losses(Linear(torch.bfloat16), x, x_adv, y)
    fine = method.losses(Linear(torch.float64), x, x_adv, y)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), fine, rtol=1e-4, atol=1e-5)
