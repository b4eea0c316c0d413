"""The checks of the exercises refuse answers that are plausible and wrong."""

import json
import re
from itertools import product
from pathlib import Path
from statistics import mean, pstdev, stdev

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engm import MART, PGD
from engm.lab import exercises
from engm.lab.diagnostics import Moments
from engm.lab.exercises import check, expected
from engm.report.sensitivity import near_best
from engm.report.statistics import student_interval

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def rival(logits, y):
    return logits.softmax(1).scatter(1, y[:, None], 0.0).amax(1)


def trimmed(mean_of, plain=False):
    """An optimizer along the gradient of `mean_of(losses, k)`, k a tenth; `plain`: no momentum."""

    class Optimizer(torch.optim.SGD):
        def step(self, closure):
            losses = closure()
            mean_of(losses, round(0.1 * len(losses))).backward()
            if not plain:
                return super().step()
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p -= self.param_groups[0]["lr"] * p.grad

    return Optimizer


# An answer, or, where it is made of what the notebook has at hand, its source.
WRONG = {
    ("00_tour", 1): [
        "(logits_adv.argmax(1) != y).float().mean()",
        "1 - (logits_adv.argmax(1) == y).float().mean()",
        "(logits_adv.argmax(1) == y)[logits.argmax(1) == y].float().mean()",
        "((logits.argmax(1) == y) & (logits_adv.argmax(1) != y)).float().mean()",
        "(logits.argmax(1) != logits_adv.argmax(1)).float().mean()",
        "(logits_adv.argmax(1) != y)[logits.argmax(1) == y].sum()",
    ],
    ("00_tour", 2): [
        ["clean", "transferred", "own"],
        ["transferred", "own", "clean"],  # that strangers' images are the worst
        ["own", "clean", "transferred"],  # that they do no harm
        ["own", "transferred"],
        ["own", "own", "clean"],
        ["own", "transferred", "clean", "clean"],
        "'own'",
    ],
    ("00_tour", 3): [[1, 20], [0.05, 1], [20, 0], [20, 20], 20, [float("inf"), 1]],
    ("01_attacks", 1): [
        "x",
        "x + eps * gradient_of_loss(x).sign()",
        "(x + eps * gradient_of_loss(x).sign()).clamp(0, 1)",
        "x - eps * gradient_of_loss(x).sign()",
        "(x - 2 * eps * gradient_of_loss(x).sign()).clamp(0, 1)",
        "(x - eps * gradient_of_loss(x).sign())[:5].clamp(0, 1)",
    ],
    ("01_attacks", 2): [
        lambda survived: survived.float().mean(),
        lambda survived: survived.any(0).float().mean(),
        lambda survived: survived.float().mean(1).min(),
        lambda survived: 1 - (~survived).sum() / survived.shape[1],
        lambda survived: survived.float().prod(1).mean(),
    ],
    ("01_attacks", 3): [
        ["nothing"] * 4,
        ["nothing", "turned gradient", "no gradient", "saturation"],  # the highest number is right
        ["turned gradient", "nothing", "saturation", "no gradient"],
        ["no gradient", "nothing", "no gradient", "saturation"],
        ["turned gradient", "nothing", "random answers", "saturation"],
        ["turned gradient", "weak attack", "no gradient", "saturation"],
        ["turned gradient", "nothing", "no gradient"],
        {"turned gradient", "nothing", "no gradient", "saturation"},  # without an order
    ],
    ("02_gradient_variance", 1): [
        lambda norms, mean_gradient: norms.mean().square() - mean_gradient.square().sum(),
        lambda norms, mean_gradient: norms.square().mean() - mean_gradient.norm(),
        lambda norms, mean_gradient: norms.square().mean() - mean_gradient.square().mean(),
        lambda norms, mean_gradient: norms.square().sum() - mean_gradient.square().sum(),
        lambda norms, mean_gradient: norms.var(unbiased=False),
        lambda norms, mean_gradient: (norms - mean_gradient.norm()).square().mean(),
    ],
    ("02_gradient_variance", 2): [
        "pool.signal_to_noise",
        "pool.variance / pool.gradient_norm",
        "pool.variance",
        "pool.variance / pool.mean_norm**2",
        "(pool.variance / pool.gradient_norm**2) ** 0.5",
    ],
    ("02_gradient_variance", 3): [
        1,
        0,
        "1 - (g.mean(0) / g.norm(dim=1).mean()).square().sum()",
        "(g / g.norm()).var(dim=0, unbiased=False).sum()",
        "(g / g.norm(dim=1, keepdim=True)).var(dim=0).sum()",
        "(g / g.norm(dim=0)).var(dim=0, unbiased=False).sum()",
        "variance / g.norm(dim=1).mean()",
    ],
    ("03_engm_step_by_step", 1): [
        lambda norms, c: norms.clamp(max=c),
        lambda norms, c: c / norms,
        lambda norms, c: (c / norms.max()).clamp(max=1) * torch.ones_like(norms),
        lambda norms, c: norms.clamp(max=c) / norms,
        lambda norms, c: torch.where(norms > c, c / norms, norms),
        lambda norms, c: (norms <= c).float(),
        lambda norms, c: 1 / norms.clamp(min=1),
    ],
    ("03_engm_step_by_step", 2): [
        torch.optim.SGD,
        trimmed(lambda losses, k: losses.mean()),
        trimmed(lambda losses, k: losses.sort().values[k:].mean()),  # without the smallest
        trimmed(lambda losses, k: losses[: len(losses) - k].mean()),  # without the last
        trimmed(lambda losses, k: losses.sort().values[: len(losses) - k].sum() / len(losses)),
        trimmed(lambda losses, k: losses.sort().values[: len(losses) - k].sum()),
        trimmed(lambda losses, k: losses.sort().values[: int(0.9 * len(losses))].mean()),
        trimmed(lambda losses, k: losses.clamp(max=losses.quantile(0.9)).mean()),
        trimmed(lambda losses, k: losses.topk(k).values.mean()),
        trimmed(lambda losses, k: losses.median()),
        trimmed(lambda losses, k: losses.sort().values[: len(losses) - k].mean(), plain=True),
    ],
    ("03_engm_step_by_step", 3): [
        lambda x_hat, b: (b * x_hat).flatten(1).norm(dim=1),
        lambda x_hat, b: (b * x_hat).flatten(2).norm(dim=2).sum(1),
        lambda x_hat, b: (b * x_hat).sum((1, 2, 3)).abs(),
        lambda x_hat, b: (b * x_hat).mean((2, 3)).norm(dim=1),
        lambda x_hat, b: (b.sum((2, 3)) * x_hat.sum((2, 3))).norm(dim=1),
        lambda x_hat, b: b.sum((2, 3)).norm(dim=1),
        lambda x_hat, b: (b * x_hat).sum((2, 3)).norm(),
        lambda x_hat, b: (b * x_hat).sum((2, 3)).square().sum(1),
    ],
    ("05_norms_from_inputs", 1): [
        "input_norms",
        "input_norms**2",
        "-(2.0 ** input_norms.argsort().argsort())",
        "input_norms.argsort().double()",
        "2.0 ** input_norms.argsort()",
        "torch.ones_like(input_norms)",
        "input_norms[:5]",
    ],
    ("05_norms_from_inputs", 2): [[0.5, 60], [2, 300], [2, 3], [2, 20], [1, 1], [60, 2], [2, 0.15]],
    ("05_norms_from_inputs", 3): [[1.22, 9], [1.22, 7], [1.28, 8], [1.4, 8], [1.25, 20], [1.24, 8]],
}


# 04, 06, 07, 08, 09


def flipped(differences, at_least):
    patterns = product([1, -1], repeat=len(differences))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in patterns]
    return mean(at_least(found, sum(differences)) for found in sums)


def outside(differences, level):
    interval = student_interval(differences, level)
    return not interval.low <= 0 <= interval.high


def last_of_equals(validation):
    return max(range(len(validation)), key=lambda epoch: (validation[epoch], epoch))


OVERFITTING = "08_overfitting_and_sensitivity"
WRONG |= {
    ("04_convergence", 1): [
        lambda g, c: (c / g.norm(dim=1))[:, None].mul(g).mean(0),  # normalised, not clipped
        lambda g, c: g.mean(0) * (c / g.mean(0).norm()).clamp(max=1),  # the batch gradient clipped
        lambda g, c: (g * (c / g.norm(dim=1)).clamp(max=1)[:, None]).sum(0),
        lambda g, c: (g * (c / g.norm(dim=1)).clamp(max=1)[:, None]).mean(1),
        lambda g, c: (g * (c / g.norm(dim=1)).clamp(min=1)[:, None]).mean(0),
        lambda g, c: g.clamp(-c, c).mean(0),  # coordinate by coordinate
        lambda g, c: (g * (c / g.norm(dim=0)).clamp(max=1)).mean(0),
    ],
    ("04_convergence", 2): [2, 4, 8, 32, 64, 256, 1 / 16],
    ("04_convergence", 3): [
        [10.0, 1.0, 1.0],  # nothing goes astray
        [-10.0, 1.0, 1.0],  # the mean is below 0
        [10.0, -1.0],  # a draw of the votes
        [1.0, -1.0, -1.0],
        [10.0, 10.0, -1.0],
        [3.0, -3.0],
    ],
    ("06_cifar", 1): [
        lambda logits, y: -torch.log(1 - logits.softmax(1).amax(1)),
        lambda logits, y: -torch.log(1 - logits.softmax(1).gather(1, y[:, None])[:, 0]),
        lambda logits, y: -torch.log(rival(logits, y)),
        lambda logits, y: -torch.log(1 - rival(logits, y)).mean(),
        lambda logits, y: torch.log(1 - rival(logits, y)),
        lambda logits, y: -torch.log(1 - logits.softmax(1).topk(2).values[:, 1]),
    ],
    ("06_cifar", 2): [0.53 - 0.52, 0.52 - 0.49, 0.53 - 0.48, 0.49 - 0.53, 4, 0.53, 0],
    ("06_cifar", 3): [
        lambda d: flipped(d, lambda found, seen: found >= seen - 1e-9),  # one-sided
        lambda d: flipped(d, lambda found, seen: abs(found) > abs(seen) + 1e-9),  # without itself
        lambda d: 2 / 2 ** len(d),  # the least that there is
        lambda d: sum(x <= 0 for x in d) / len(d),
        lambda d: 1 - flipped(d, lambda found, seen: abs(found) >= abs(seen) - 1e-9),
    ],
    ("07_tiny_imagenet", 1): [
        [200, 5],  # all classes, and too few images of each
        [200, 50],  # all test images
        [10, 100],  # ten classes
        [20, 50],  # a good plan the other way round
        [100, 10],
        [50, 14],  # what ten classes take
        [50, 15],
        [50, 21],  # 1,050 images
        [50, 1000],  # the images in all
        [200, 16],
        [50, 16.5],
        [50, 0],
        50,
    ],
    ("07_tiny_imagenet", 2): [
        ["nothing"] * 6,
        ["learning rate", "classes", "attack", "image size", "nothing", "choice of epoch"],
        ["nothing", "classes", "attack", "image size", "choice of epoch", "choice of epoch"],
        ["nothing", "nothing", "attack", "image size", "nothing", "choice of epoch"],
        ["nothing", "classes", "nothing", "image size", "nothing", "choice of epoch"],
        ["nothing", "classes", "attack", "nothing", "nothing", "choice of epoch"],  # the same eps
        ["nothing", "classes", "attack", "image size", "nothing", "nothing"],
        ["nothing", "classes", "choice of epoch", "image size", "nothing", "choice of epoch"],
        ["classes", "attack", "image size", "choice of epoch"],
        {"nothing", "classes", "attack", "image size", "choice of epoch"},
    ],
    ("07_tiny_imagenet", 3): [
        list("abcdef"),
        list("acdef"),
        list("abcdf"),
        ["c", "d", "f"],  # longer runs overlooked
        ["a", "c", "f"],  # the interval overlooked
        ["f"],
        [],
        ["a", "a", "c", "d", "f"],
    ],
    (OVERFITTING, 1): [
        lambda validation, test: test[1] - test[-1],
        lambda validation, test: max(test) - test[-1],
        lambda validation, test: max(validation) - test[-1],
        lambda validation, test: max(validation) - validation[-1],
        lambda validation, test: test[0] - test[-1],
        lambda validation, test: test[-1] - test[validation.index(max(validation))],
        lambda validation, test: test[last_of_equals(validation)] - test[-1],
        lambda validation, test: abs(test[validation.index(max(validation))] - test[-1]),
        lambda validation, test: max(0, test[validation.index(max(validation))] - test[-1]),
    ],
    (OVERFITTING, 2): [3, 0.5, 1.5, 2, 5, 4, 3.5, 1.25],
    (OVERFITTING, 3): [0, 0.1, 0.02, 0.9, 10, 100],
    ("09_results", 1): [
        [0.73, pstdev([0.70, 0.72, 0.77]), pstdev([0.70, 0.72, 0.77]) / 3**0.5],
        [0.73, stdev([0.70, 0.72, 0.77]), stdev([0.70, 0.72, 0.77]) / 3],
        [0.73, stdev([0.70, 0.72, 0.77]), stdev([0.70, 0.72, 0.77]) / 2**0.5],
        [0.73, stdev([0.70, 0.72, 0.77]), stdev([0.70, 0.72, 0.77])],
        [0.72, stdev([0.70, 0.72, 0.77]), stdev([0.70, 0.72, 0.77]) / 3**0.5],  # the median
        [0.73, 0.0013, 0.0013 / 3**0.5],  # the variance
        [73, 3.6, 2.1],
        0.73,
    ],
    ("09_results", 2): [
        [4, 3, 3],  # three seeds, as usual
        [4, 3, 8],  # 68%
        [4, 2, 9],  # 75%
        [4, 2, 13],  # 42 runs
        [4, 2, 32],  # one optimizer alone
        [10, 1, 10],  # a choice by a single seed
        [3, 3, 10],  # a short grid
        [1, 2, 18],  # one rate for all
        [4, 10, 10],
        [4, 2, 10.5],
    ],
    ("09_results", 3): [
        lambda d, m: outside(d, 0.95),
        lambda d, m: outside(d, max(0.01, 1 - 0.05 * m)),
        lambda d, m: outside(d, 0.95 / m),
        lambda d, m: not outside(d, 1 - 0.05 / m),
        lambda d, m: student_interval(d, 1 - 0.05 / m).low > 0,
        lambda d, m: mean(d) > 0,
        lambda d, m: outside(d, 1 - 0.05 / len(d)),
    ],
}


def at_hand():
    """What the cells before an exercise leave: the same names, other values."""
    draw = torch.Generator().manual_seed(0)
    logits, logits_adv = torch.randn(2, 200, 10, generator=draw)
    y = torch.where(torch.rand(200, generator=draw) < 0.8, logits.argmax(1), torch.arange(200) % 10)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))
    torch.nn.init.normal_(model[1].weight, generator=draw)
    x, eps = torch.rand(200, 1, 8, 8, generator=draw), 0.1
    g = torch.randn(8, 30, generator=draw) * torch.arange(1.0, 9)[:, None] + 0.5

    def mean_loss(pixels):
        return F.cross_entropy(model(pixels), y).item()

    def gradient_of_loss(pixels):
        pixels = pixels.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(pixels), y), pixels)[0]

    def fit_line(u, v):
        ranks = torch.stack([u.argsort().argsort(), v.argsort().argsort()]).double()
        r_squared = torch.corrcoef(torch.stack([u, v]).double())[0, 1] ** 2
        return 0.0, 0.0, r_squared.item(), torch.corrcoef(ranks)[0, 1].item()

    return {
        **dict(torch=torch, F=F, MART=MART, exercises=exercises, check=check),
        **dict(expected=expected, student_interval=student_interval, near_best=near_best),
        **dict(np=np, lrs=[0.1, 1.0], weight_decays=[0.01, 0.1]),
        **dict(model=model, x_adv=x, at_clean=0.9, at_robust=0.4, accuracy=lambda *_: 0.6),
        **dict(attack=PGD(eps=0.1, step_size=0.02, num_steps=2)),
        **dict(logits=logits, logits_adv=logits_adv, y=y, x=x, eps=eps, g=g, fit_line=fit_line),
        **dict(norms=torch.rand(50, generator=draw) ** 3, pool=Moments(3.0, 14.0, 4.0)),
        **dict(mean_loss=mean_loss, gradient_of_loss=gradient_of_loss),
        **dict(variance=g.var(dim=0, unbiased=False).sum()),
        **dict(input_norms=torch.rand(50, generator=draw) + 0.1),
    }


def told(notebook, number, answer, capsys):
    """What the check cell of an exercise says to an answer; to the solution, where it is None."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    at = next(i for i, s in enumerate(sources) if s.startswith(f"exercise_{number} = None"))
    names = at_hand()
    names[f"exercise_{number}"] = eval(answer, names) if isinstance(answer, str) else answer
    if answer is None:
        exec(re.search(r"```python\n(.*?)```", sources[at + 2], re.S).group(1), names)
    exec(sources[at + 1], names)
    return capsys.readouterr().out


@pytest.mark.parametrize(("notebook", "number"), WRONG, ids=str)
def test_plausible_wrong_answers_are_refused_and_the_solution_is_right(notebook, number, capsys):
    assert told(notebook, number, None, capsys) == "right\n"
    for index, answer in enumerate(WRONG[notebook, number]):
        assert told(notebook, number, answer, capsys).startswith("not yet"), index


@pytest.mark.parametrize("notebook", [f"{number:02}" for number in range(10)])
def test_every_exercise_has_plausible_wrong_answers(notebook):
    assert {number for name, number in WRONG if name.startswith(notebook)} == {1, 2, 3}
    assert all(len(answers) >= 4 for answers in WRONG.values())
