"""The estimate of example norms from input gradients, alone and within ENGM.

Oracles: `numpy.polyfit`, `scipy.stats.spearmanr`, `sklearn.metrics.r2_score`, and the exact norms.
"""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import r2_score
from torch import nn
from torch.nn import functional as F

from engm.errors import InputError
from engm.norms.inputs import InputEstimate
from engm.norms.watch import loop_norms
from engm.optim import ENGM

N = 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(seed=0, n=20, noise=0.3):
    u = random(n, seed=seed).abs() + 0.1
    return u, 2.5 * u + 0.7 + noise * random(n, seed=seed + 100)


# The line


def test_the_line_is_that_of_least_squares():
    u, v = pairs()
    estimate = InputEstimate()
    assert not estimate.useful
    estimate.fit(3, u, v)
    (fit,) = estimate.fits
    slope, intercept = np.polyfit(u.numpy(), v.numpy(), 1)
    assert fit.step == 3
    assert fit.alpha == pytest.approx(slope, rel=1e-9)
    assert fit.beta == pytest.approx(intercept, rel=1e-9)
    assert fit.r_squared == pytest.approx(r2_score(v, slope * u + intercept), rel=1e-9)
    assert fit.rank_correlation == pytest.approx(spearmanr(u, v).statistic, rel=1e-9)
    assert 0.5 < fit.rank_correlation < 1
    assert estimate.useful
    expected = torch.tensor(slope) * u + intercept
    torch.testing.assert_close(estimate.estimate(u), expected, rtol=1e-9, atol=0)


def test_falling_lines_and_float32():
    u = pairs()[0].float()
    estimate = InputEstimate()
    estimate.fit(1, u, 5 - 2 * u)
    assert estimate.fits[0].alpha == pytest.approx(-2, rel=1e-5)
    assert estimate.fits[0].rank_correlation == pytest.approx(-1)
    assert estimate.estimate(u).dtype == torch.float32


def test_coefficients_are_smoothed_but_their_quality_is_that_of_the_batch():
    estimate = InputEstimate()
    lines, qualities = [], []
    for step in range(3):
        u, v = pairs(seed=step)
        estimate.fit(step + 1, u, v)
        lines.append(np.polyfit(u.numpy(), v.numpy(), 1))
        qualities.append(r2_score(v, np.polyval(lines[-1], u.numpy())))
    smooth = lines[0]
    for fit, line, quality in zip(estimate.fits, lines, qualities, strict=True):
        smooth = (smooth + line) / 2
        assert (fit.alpha, fit.beta) == pytest.approx(tuple(smooth), rel=1e-9)
        assert fit.r_squared == pytest.approx(quality, rel=1e-9)
    assert [fit.step for fit in estimate.fits] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:at step")
def test_a_useless_line_is_not_smoothed_into_the_next():
    estimate = InputEstimate()
    estimate.fit(1, random(50).abs(), random(50, seed=1).abs())
    assert estimate.fits[0].r_squared < 0.1
    assert not estimate.useful
    u, v = pairs()
    estimate.fit(2, u, v)
    line = tuple(np.polyfit(u.numpy(), v.numpy(), 1))
    assert (estimate.fits[1].alpha, estimate.fits[1].beta) == pytest.approx(line, rel=1e-9)
    assert estimate.useful


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_examples_that_are_not_finite_are_left_out_of_the_fit_and_stay_so(bad, side):
    u, v = pairs()
    clean = InputEstimate()
    clean.fit(1, u[1:], v[1:])
    (u, v)[side][0] = bad
    estimate = InputEstimate()
    estimate.fit(1, u, v)
    assert estimate.fits == clean.fits
    if side == 0:
        found = estimate.estimate(u)
        assert found.isfinite().tolist() == [False] + [True] * 19
        assert torch.equal(found[1:], clean.estimate(u[1:]))


def test_fewer_than_three_examples_make_no_line():
    estimate = InputEstimate()
    estimate.fit(1, random(2), random(2, seed=1))
    assert estimate.fits == []
    assert not estimate.useful


@pytest.mark.filterwarnings("ignore:at step")
@pytest.mark.parametrize("what", ["inputs", "norms", "both"])
def test_constant_norms_are_useless_and_not_an_error(what):
    u, v = pairs()
    if what != "norms":
        u = torch.ones_like(u)
    if what != "inputs":
        v = torch.ones_like(v)
    estimate = InputEstimate()
    estimate.fit(1, u, v)
    assert estimate.fits[0].r_squared == pytest.approx(0, abs=1e-9)
    assert estimate.fits[0].alpha == 0
    assert estimate.fits[0].beta == pytest.approx(float(v.mean()))
    assert not estimate.useful


def test_estimates_stay_above_a_hundredth_of_their_mean():
    estimate = InputEstimate()
    u = torch.linspace(1, 2, 10, dtype=torch.float64)
    estimate.fit(1, u, 10 * u - 9.9)
    asked = torch.tensor([0.1, 0.99, 1.5, 3.0], dtype=torch.float64)
    line = 10 * asked - 9.9
    found = estimate.estimate(asked)
    assert line[0] < 0
    lowest = 0.01 * float(line.clamp(min=0).mean())
    assert found.tolist() == pytest.approx([lowest, lowest, *line[2:].tolist()], rel=1e-9)
    assert (found > 0).all()


def test_one_warning_however_often_it_is_useless():
    estimate = InputEstimate()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            estimate.fit(step + 7, random(50, seed=step).abs(), random(50, seed=10 + step).abs())
    assert len(caught) == 1
    quality = f"{estimate.fits[0].r_squared:.0%}"
    assert f"at step 7 the line of the estimate explains {quality} of the" in str(caught[0].message)


def test_its_state_is_its_last_fit():
    estimate, other = InputEstimate(), InputEstimate()
    for step in range(3):
        estimate.fit(step, *pairs(seed=step))
    other.load(estimate.state())
    u = pairs(seed=9)[0]
    assert torch.equal(other.estimate(u), estimate.estimate(u))
    other.fit(3, *pairs(seed=9))
    estimate.fit(3, *pairs(seed=9))
    assert other.fits[-1] == estimate.fits[-1]
    other.load(InputEstimate().state())
    assert other.fits == []


# Within ENGM


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).double()


def batch(seed=0):
    return random(N, 1, 6, 6, seed=seed), torch.arange(N) % 3


def losses_of(model, x, y):
    # from quiet to loud, so that there is something to explain
    return torch.linspace(1, 8, N) * F.cross_entropy(model(x), y, reduction="none")


def steps(model, optimizer, which):
    ends = []
    for seed in which:
        x, y = batch(seed)
        optimizer.zero_grad()
        optimizer.step(lambda: losses_of(model, x, y), inputs=x)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return ends


def input_lengths(model, x, y):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(losses_of(model, x, y).sum(), x)
    return g.flatten(1).norm(dim=1)


def test_refreshed_in_each_step_it_is_exact():
    models = [network(), network()]
    exact = steps(models[0], ENGM(models[0], 0.1), range(5))
    optimizer = ENGM(models[1], 0.1, norms="input", refresh_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimated = steps(models[1], optimizer, range(5))
    torch.testing.assert_close(estimated, exact, rtol=1e-12, atol=0)
    assert [fit.step for fit in optimizer.measure.estimate.fits] == [1, 2, 3, 4, 5]


def test_between_two_refreshes_the_norms_are_those_of_the_line():
    model = network()
    optimizer = ENGM(model, 0.01, 0.0, scale=0.7, floor=0.2, norms="input", refresh_every=3)
    for step in range(7):
        x, y = batch(step)
        before = copy.deepcopy(model)
        lengths = input_lengths(before, x, y)
        losses = losses_of(before, x, y)
        exact = loop_norms(losses, list(before.parameters()))
        optimizer.zero_grad()
        optimizer.step(lambda: losses_of(model, x, y), inputs=x)
        estimate = optimizer.measure.estimate
        assert [fit.step for fit in estimate.fits] == list(range(1, step + 2, 3))
        if step % 3 == 0:
            line = np.polyfit(lengths.numpy(), exact.numpy(), 1)
            smooth = line if step == 0 else (smooth + line) / 2  # noqa: F821
            norms = exact
        else:
            norms = lengths * smooth[0] + smooth[1]
            norms = norms.clamp(min=0.01 * float(norms.clamp(min=0).mean()))
            assert not torch.allclose(norms, exact, rtol=1e-3)
        assert estimate.useful
        torch.testing.assert_close(optimizer.last.norms, norms, rtol=1e-9, atol=0)
        # whatever the norms, sum_i w_i g_i is exact
        weights = 0.7 / norms.clamp(min=0.2 * 0.7)
        expected = torch.autograd.grad((weights * losses).mean(), list(before.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_norms_that_inputs_do_not_explain_are_measured_exactly_after_one_warning():
    # l_i = w . x_i: the gradient w.r.t. x_i is w for all i, that w.r.t. w is x_i
    def made():
        model = nn.Linear(5, 1).double()
        with torch.no_grad():
            model.weight.copy_(random(1, 5, seed=3))
            model.bias.zero_()
        return model

    models = [made(), made()]
    optimizers = [ENGM(models[0], 0.1), ENGM(models[1], 0.1, norms="input", refresh_every=50)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            x = random(N, 5, seed=step)
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                optimizer.step(lambda: model(x)[:, 0], inputs=x)
            expected = (x.square().sum(1) + 1).sqrt()
            found = optimizers[1].last.norms
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert len(caught) == 1
    assert "exact norms are used" in str(caught[0].message)
    assert len(optimizers[1].measure.estimate.fits) == 4
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:at step")
def test_an_estimate_that_becomes_useful_is_used():
    model = network()
    optimizer = ENGM(model, 1e-6, norms="input", refresh_every=50)
    x, y = batch()
    same = x[:1].repeat(N, 1, 1, 1)
    optimizer.step(lambda: F.cross_entropy(model(same), 0 * y, reduction="none"), inputs=same)
    assert not optimizer.measure.estimate.useful
    for _ in range(3):
        optimizer.step(lambda: losses_of(model, x, y), inputs=x)
    assert len(optimizer.measure.estimate.fits) == 2


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_state_dict_goes_on_bitwise_between_two_refreshes(at):
    model = network()
    whole = steps(model, ENGM(model, 0.05, norms="input", refresh_every=3), range(7))[-1]

    first = network()
    optimizer = ENGM(first, 0.05, norms="input", refresh_every=3)
    steps(first, optimizer, range(at))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = network()
    second.load_state_dict(state["model"])
    optimizer = ENGM(second, 0.05, norms="input", refresh_every=3)
    optimizer.load_state_dict(state["optimizer"])
    assert torch.equal(steps(second, optimizer, range(at, 7))[-1], whole)


def test_the_state_of_another_measure_starts_the_estimate_anew():
    model = network()
    exact = ENGM(model, 0.05)
    steps(model, exact, range(2))
    optimizer = ENGM(model, 0.05, norms="input", refresh_every=3)
    steps(model, optimizer, range(2))
    optimizer.load_state_dict(exact.state_dict())
    steps(model, optimizer, range(1))
    assert [fit.step for fit in optimizer.measure.estimate.fits] == [1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda x: None, "needs the images too: optimizer.step"),
        (lambda x: x.numpy(), "needs the images too"),
        (lambda x: x.clone().requires_grad_() * 2, "from outside of the model, such as x_adv.det"),
        (lambda x: (255 * x).to(torch.uint8), "a tensor of floats"),
        (lambda x: x.clone(), "the losses do not depend on inputs; give the very tensor"),
        (lambda x: x[:3].clone(), f"inputs has 3 rows for {N} losses"),
    ],
)
def test_inputs_that_cannot_be_differentiated_by(inputs, message):
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    given = inputs(x)
    optimizer = ENGM(model, 0.1, norms="input")
    with pytest.raises(InputError, match=message):
        optimizer.step(lambda: losses_of(model, x, y), inputs=given)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert all(not module._forward_hooks for module in model.modules())
    optimizer.step(lambda: losses_of(model, x, y), inputs=x)


def test_images_of_inference_mode():
    with torch.inference_mode():
        x = batch()[0]
    with pytest.raises(InputError, match="needs the images too"):
        ENGM(network(), 0.1, norms="input").step(lambda: None, inputs=x)


@pytest.mark.parametrize("wanted", [False, True])
def test_requires_grad_of_the_inputs_is_as_before(wanted):
    model, (x, y) = network(), batch()
    x.requires_grad_(wanted)
    optimizer = ENGM(model, 0.1, norms="input", refresh_every=2)
    seen = []

    def raises():
        seen.append(x.requires_grad)
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(raises, inputs=x)
    assert seen == [True]
    assert x.requires_grad == wanted
    with pytest.raises(InputError):
        optimizer.step(lambda: losses_of(model, x, y).sum(), inputs=x)
    assert x.requires_grad == wanted
    for _ in range(3):
        optimizer.step(lambda: losses_of(model, x, y), inputs=x)
        assert x.requires_grad == wanted
        assert x.grad is None


@pytest.mark.parametrize("refresh_every", [0, -1])
def test_refresh_every_is_at_least_one(refresh_every):
    with pytest.raises(
        InputError, match=f"refresh_every must be at least 1, or None; got {refresh_every}"
    ):
        ENGM(network(), 0.1, norms="input", refresh_every=refresh_every)


def test_an_image_that_is_not_finite_gets_weight_zero_when_norms_are_estimated():
    model = network()
    optimizer = ENGM(model, 0.1, norms="input", refresh_every=10)
    steps(model, optimizer, range(1))
    x, y = batch(1)
    x[2, 0, 3, 3] = float("nan")
    optimizer.step(lambda: losses_of(model, x, y), inputs=x)
    assert optimizer.last.excluded == 1
    assert optimizer.last.weights[2] == 0
    assert all(p.isfinite().all() for p in model.parameters())
