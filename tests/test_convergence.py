import math

import numpy as np
import pytest
import torch
from torch import nn

from engm import ENGM, MSGD
from engm.errors import InputError
from engm.lab.convergence import Noise, Rule, descend
from engm.plots import log_curves

CURVATURES = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
START = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)


def value(theta, ripple=1.0):
    """F(theta) = sum_j k_j (theta_j^2 / 2 + ripple sin^2 theta_j), lowest at 0 with F = 0."""
    return (CURVATURES * (theta.square() / 2 + ripple * theta.sin().square())).sum(-1)


def gradient(theta, ripple=1.0):
    return CURVATURES * (theta + ripple * (2 * theta).sin())


def quadratic(theta):
    return gradient(theta, 0.0)


class Explicit(nn.Module):
    """Loss i is F(theta) + <n_i, theta>, so that its gradient is grad F(theta) + n_i."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(START.clone())

    def forward(self, noise):
        return value(self.theta) + noise @ self.theta


# the objective is the same for all examples, as a penalty would be
@pytest.mark.filterwarnings("ignore:the losses hold a term")
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
    noise, steps = Noise(kind, batch_size=4), 150
    dial = dict(lrs=[0.01, 0.03], sigmas=[0.2, 2.0], seeds=[5], steps=steps)
    found = descend(gradient, START, noise, rule, **dial)
    model = Explicit()
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
            norms.append(gradient(model.theta.detach()).norm())
            optimizer.zero_grad()
            optimizer.step(lambda: model(2.0 * xi))
    assert len(norms) == steps and min(norms) < norms[0] / 2
    torch.testing.assert_close(found.gradient_norms[1, 1, 0], torch.stack(norms))


def test_a_seed_means_the_same_noise_whatever_runs_beside_it():
    def norms(rule, sigmas, seeds, steps):
        dial = dict(lrs=[0.1], sigmas=sigmas, seeds=seeds, steps=steps)
        return descend(quadratic, START, Noise(), rule, **dial).gradient_norms

    together = norms(Rule("msgd"), [0.0, 1.0], [0, 1, 2], 100)
    alone = norms(Rule("msgd"), [1.0], [2], 70)
    torch.testing.assert_close(together[0, 1, 2, :70], alone[0, 0, 0])
    assert not torch.allclose(together[0, 1, 2], together[0, 1, 1])
    # a batch far below its clip is MSGD's, on the same noise
    clipped = norms(Rule("msgd-clip", max_norm=1e6), [1.0], [2], 70)
    torch.testing.assert_close(clipped, alone)


def test_without_noise_and_momentum_the_path_is_the_closed_form():
    dial = dict(lrs=[0.1], sigmas=[0.0], seeds=[0], steps=20)
    paths = descend(quadratic, START, Noise(), Rule("msgd", momentum=0.0), **dial)
    factors = (1 - 0.1 * CURVATURES) ** torch.arange(20)[:, None]
    expected = (CURVATURES * factors * START).norm(dim=1)
    torch.testing.assert_close(paths.gradient_norms[0, 0, 0], expected)
    torch.testing.assert_close(paths.progress[0, 0, 0], expected.square())


def test_a_run_that_leaves_all_bounds_is_inf():
    dial = dict(lrs=[1e3, 0.1], sigmas=[1.0], seeds=[0, 1], steps=200)
    norms = descend(quadratic, START, Noise(), Rule("msgd"), **dial).gradient_norms
    assert norms[0, ..., -1].isinf().all()
    assert norms[1].isfinite().all()


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
    rule = Rule("engm", momentum=momentum, scale=2.0)
    lrs, steps = torch.tensor([1e-3, 1e-2, 1e-1]), torch.tensor([10, 100, 300])
    dial = dict(lrs=lrs.tolist(), sigmas=[0.1, 1, 100], seeds=range(10), steps=300)
    smoothness = CURVATURES.max() * (1 + 2 * 1.0)
    eta = lrs[:, None] / (1 - momentum)
    bound = value(START) / (eta * steps)
    bound = bound + smoothness * eta * 2.0**2 * (0.5 + momentum / (1 - momentum))

    def progress(noise, rule):
        found = descend(gradient, START, noise, rule, **dial).progress
        return found.cumsum(-1)[..., steps - 1] / steps  # the mean over the first steps

    heavy = progress(Noise(kind, degrees_of_freedom=1.0), rule)
    assert (heavy <= bound[:, None, None, :]).all()
    # and it is not an empty one: MSGD passes it
    msgd = progress(Noise(kind), Rule("msgd", momentum=momentum))
    assert (msgd > bound[:, None, None, :]).any()


def test_a_noise_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="cauchy"):
        Noise("cauchy")


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
