import math

import numpy as np
import pytest
import torch
from torch import nn

from engm import ENGM, MSGD
from engm.errors import InputError
from engm.lab.convergence import (
    Landscape,
    Noise,
    Rule,
    at_rates,
    best_rates,
    descend,
    exponents,
    mean_so_far,
)
from engm.plots import log_curves

CURVATURES = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
START = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("ripple", [0.0, 1.5])
def test_the_gradient_is_that_of_the_value(ripple):
    landscape = Landscape(CURVATURES, ripple)
    theta = torch.randn(5, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    theta.requires_grad_()
    by_autograd = torch.autograd.grad(landscape.value(theta).sum(), theta)[0]
    torch.testing.assert_close(landscape.gradient(theta), by_autograd)
    assert (landscape.value(theta) > 0).all()
    assert landscape.value(torch.zeros(3, dtype=torch.float64)) == 0


def test_smoothness_is_the_largest_curvature():
    assert Landscape(CURVATURES).smoothness == 1
    # k (1 + 2 r cos 2 theta) is largest at 0
    landscape = Landscape(CURVATURES, 1.5)
    hessian = torch.autograd.functional.hessian(landscape.value, torch.zeros_like(START))
    assert landscape.smoothness == pytest.approx(hessian.diagonal().max().item())
    # and below 0 a quarter turn on: not convex
    there = torch.full_like(START, math.pi / 2)
    assert torch.autograd.functional.hessian(landscape.value, there).diagonal().max() < 0


class Explicit(nn.Module):
    """Loss i is f(theta) + <n_i, theta>, so that its gradient is grad f(theta) + n_i."""

    def __init__(self, landscape):
        super().__init__()
        self.landscape = landscape
        self.theta = nn.Parameter(START.clone())

    def forward(self, noise):
        return self.landscape.value(self.theta) + noise @ self.theta


@pytest.mark.parametrize("kind", ["gaussian", "student"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("msgd"),
        Rule("msgd", momentum=0.5),
        Rule("msgd-clip", max_norm=0.7),
        Rule("engm", scale=0.5),
        Rule("engm", scale=0.5, floor=1.0),
        Rule("engm", scale="mean", floor=0.3),
    ],
)
def test_each_step_is_that_of_the_optimizers_on_a_model_with_these_gradients(rule, kind):
    landscape, noise, steps = Landscape(CURVATURES, 1.0), Noise(kind, batch_size=4), 150
    found = descend(
        landscape, noise, rule, START, lrs=[0.01, 0.03], sigmas=[0.2, 2.0], seeds=[5], steps=steps
    )
    model = Explicit(landscape)
    if rule.optimizer == "engm":
        optimizer = ENGM(
            model, 0.03, rule.momentum, scale=rule.scale, floor=rule.floor, norms="loop"
        )
    else:
        max_norm = rule.max_norm if rule.optimizer == "msgd-clip" else None
        optimizer = MSGD(model.parameters(), 0.03, max_norm=max_norm, momentum=rule.momentum)
    generator, norms = np.random.default_rng(5), []
    for begin in range(0, steps, 64):
        drawn = torch.from_numpy(noise.draw(generator, min(64, steps - begin), 3))[..., :3]
        for xi in drawn:
            norms.append(landscape.gradient(model.theta.detach()).norm())
            optimizer.zero_grad()
            optimizer.step(lambda: model(2.0 * xi))
    assert len(norms) == steps and min(norms) < norms[0] / 2
    torch.testing.assert_close(found.gradient_norms[1, 1, 0], torch.stack(norms))


def test_a_seed_means_the_same_noise_whatever_runs_beside_it():
    def norms(rule, sigmas, seeds, steps):
        paths = descend(
            Landscape(CURVATURES),
            Noise(),
            rule,
            START,
            lrs=[0.1],
            sigmas=sigmas,
            seeds=seeds,
            steps=steps,
        )
        return paths.gradient_norms

    together = norms(Rule("msgd"), [0.0, 1.0], [0, 1, 2], 100)
    alone = norms(Rule("msgd"), [1.0], [2], 70)
    torch.testing.assert_close(together[0, 1, 2, :70], alone[0, 0, 0])
    assert not torch.allclose(together[0, 1, 2], together[0, 1, 1])
    # a batch far below its clip is MSGD's, on the same noise
    clipped = norms(Rule("msgd-clip", max_norm=1e6), [1.0], [2], 70)
    torch.testing.assert_close(clipped, alone)


def test_without_noise_and_momentum_the_path_is_the_closed_form():
    paths = descend(
        Landscape(CURVATURES),
        Noise(),
        Rule("msgd", momentum=0.0),
        START,
        lrs=[0.1],
        sigmas=[0.0],
        seeds=[0],
        steps=20,
    )
    factors = (1 - 0.1 * CURVATURES) ** torch.arange(20)[:, None]
    expected = (CURVATURES * factors * START).norm(dim=1)
    torch.testing.assert_close(paths.gradient_norms[0, 0, 0], expected)
    torch.testing.assert_close(paths.progress[0, 0, 0], expected.square())


def test_a_run_that_leaves_all_bounds_is_inf_and_is_never_chosen():
    paths = descend(
        Landscape(CURVATURES),
        Noise(),
        Rule("msgd"),
        START,
        lrs=[1e3, 0.1],
        sigmas=[1.0],
        seeds=[0, 1],
        steps=200,
    )
    assert paths.gradient_norms[0, ..., -1].isinf().all()
    assert paths.gradient_norms[1].isfinite().all()
    reached = mean_so_far(paths.gradient_norms, [100, 200])
    assert best_rates(reached).tolist() == [[1, 1]]


def drawn_gradients(noise, sigma, gradient):
    drawn = torch.from_numpy(noise.draw(np.random.default_rng(0), 20_000, len(gradient)))
    return noise.gradients(gradient, torch.tensor(sigma, dtype=torch.float64), drawn)


@pytest.mark.parametrize("kind", ["gaussian", "lengths"])
def test_noise_has_the_mean_and_variance_that_it_promises(kind):
    g = drawn_gradients(Noise(kind, batch_size=5), 2.0, START)
    mean = g.mean((0, 1))
    # g = grad + 2 xi: variance 4 a coordinate; a (grad + xi) with E a^2 = 1 + 2^2:
    # E g^2 = 5 (grad^2 + 1)
    variance = START.square() * 4 + 5 if kind == "lengths" else torch.full_like(START, 4)
    torch.testing.assert_close(mean, START, rtol=0, atol=0.15)
    torch.testing.assert_close(g.var((0, 1)), variance, rtol=0.15, atol=0.0)


def test_student_noise_has_the_tail_that_it_promises():
    # two degrees of freedom, one dimension: P(|t| > u) = 1 - u / sqrt(2 + u^2)
    noise = Noise("student", batch_size=5, degrees_of_freedom=2.0)
    xi = noise.draw(np.random.default_rng(0), 20_000, 1)[..., 0]
    for u in (1.0, 3.0, 10.0, 30.0):
        expected = 1 - u / math.sqrt(2 + u * u)
        sd = math.sqrt(expected / xi.size)
        assert (np.abs(xi) > u).mean() == pytest.approx(expected, abs=4 * sd)


def test_student_noise_has_no_preferred_direction():
    # one length for all coordinates, or far points would lie along the axes
    noise = Noise("student", batch_size=5, degrees_of_freedom=1.5)
    xi = noise.draw(np.random.default_rng(0), 20_000, 2)[..., :2].reshape(-1, 2)
    # the axes lie in the middle of bins
    angle = (np.arctan2(xi[:, 1], xi[:, 0]) + math.pi / 8) % (2 * math.pi)
    far = angle[np.hypot(*xi.T) > 10]
    counts = np.histogram(far, bins=8, range=(0, 2 * math.pi))[0]
    expected = len(far) / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees, 0.1%


def test_lengths_do_not_turn_any_gradient():
    directions = []
    for sigma in (0.0, 5.0):
        g = drawn_gradients(Noise("lengths", batch_size=2), sigma, START)
        directions.append(g / g.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(*directions)


@pytest.mark.parametrize("kind", ["gaussian", "student", "lengths"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_run_of_engm_passes_the_bound_on_its_progress(kind, momentum):
    landscape, rule = Landscape(CURVATURES, 1.0), Rule("engm", momentum=momentum, scale=2.0)
    lrs, steps = [1e-3, 1e-2, 1e-1], [10, 100, 300]
    paths = descend(
        landscape,
        Noise(kind, degrees_of_freedom=1.0),
        rule,
        START,
        lrs=lrs,
        sigmas=[0.1, 1, 100],
        seeds=range(10),
        steps=300,
    )
    progress = mean_so_far(paths.progress, steps)
    eta = torch.tensor(lrs)[:, None] / (1 - momentum)
    first = landscape.value(START) / (eta * torch.tensor(steps))
    bound = first + landscape.smoothness * eta * 2.0**2 * (0.5 + momentum / (1 - momentum))
    assert (progress <= bound[:, None, None, :]).all()
    # and it is not an empty one: MSGD passes it
    paths = descend(
        landscape,
        Noise(kind),
        Rule("msgd", momentum=momentum),
        START,
        lrs=lrs,
        sigmas=[0.1, 1, 100],
        seeds=range(10),
        steps=300,
    )
    assert (mean_so_far(paths.progress, steps) > bound[:, None, None, :]).any()


def test_means_choices_and_exponents():
    values = torch.tensor([4.0, 2.0, 0.0, 6.0])
    assert mean_so_far(values, [1, 2, 4]).tolist() == [4, 3, 3]
    # [lrs, sigmas, seeds]: geometric means 2 and 3; 8 and 1
    reached = torch.tensor([[[1.0, 4.0], [8.0, 8.0]], [[3.0, 3.0], [0.5, 2.0]]])
    assert best_rates(reached).tolist() == [0, 1]
    assert at_rates(reached, torch.tensor([0, 1])).tolist() == [[1, 4], [0.5, 2]]
    # geometric means 10 and 20, arithmetic ones 50.5 and 20
    assert best_rates(torch.tensor([[[1.0, 100.0]], [[20.0, 20.0]]])).tolist() == [0]
    by_horizon = torch.stack([reached, reached.flip(0)], -1)
    rates = best_rates(by_horizon)
    assert rates.tolist() == [[0, 1], [1, 0]]
    assert at_rates(by_horizon, rates)[1].tolist() == [[0.5, 0.5], [2, 2]]
    x = [0.5, 1.0, 4.0]
    powers = torch.tensor([[3 * v**0.5 for v in x], [2 * v**-0.25 for v in x]])
    assert exponents(x, powers).tolist() == pytest.approx([0.5, -0.25])


def test_what_is_out_of_range_is_refused():
    with pytest.raises(InputError, match="curvatures"):
        Landscape(torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match="ripple"):
        Landscape(CURVATURES, -1.0)
    with pytest.raises(InputError, match="kind"):
        Noise("cauchy")
    with pytest.raises(InputError, match="degrees_of_freedom"):
        Noise("student", degrees_of_freedom=0.0)
    with pytest.raises(InputError, match="optimizer"):
        Rule("adam")
    with pytest.raises(InputError, match="two different x"):
        exponents([1.0, 1.0], torch.ones(2))
    with pytest.raises(InputError, match="at least one"):
        descend(
            Landscape(CURVATURES),
            Noise(),
            Rule("msgd"),
            START,
            lrs=[],
            sigmas=[1.0],
            seeds=[0],
            steps=5,
        )


def test_log_curves_draw_geometric_means_bands_and_guides():
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    figure = log_curves(
        {"a": {"one": values}, "b": {"two": values, "one": values}},
        [1, 10],
        "x",
        "y",
        {"guide": [1.0, 1.0]},
    )
    left, right = figure.axes
    assert left.get_xscale() == left.get_yscale() == "log"
    assert list(left.lines[0].get_ydata()) == pytest.approx([2, 4])
    band = left.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band.tolist()} >= {(1, 1), (1, 4), (10, 2), (10, 8)}
    # a name keeps its colour, whichever panel it stands in and wherever
    assert left.lines[0].get_color() == right.lines[1].get_color() != right.lines[0].get_color()
    assert [line.get_label() for line in right.lines] == ["two", "one", "guide"]
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == ("a", "x", "y")
