"""The exercises of the notebooks: `check`, which never raises, and what it compares with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engm.optim import example_weights


def check(answer: Any, expected: Any, hint: str, *, tolerance: float = 1e-4) -> None:
    """Says whether an answer is right: `right`, `not yet` and a hint, or `not answered yet`.

    Args:
        answer: What the reader assigned; `None` is no answer.
        expected: The answer, as a number, text, a tensor or a sequence of numbers; or a function
            that takes the reader's answer and returns whether it is right.
        hint: What a wrong answer is met with.
        tolerance: How far numbers may be off, relative to the expected ones, or absolute near 0.
    """
    if answer is None:
        print("not answered yet")
        return
    try:
        good = expected(answer) if callable(expected) else _close(answer, expected, tolerance)
        good = bool(good)
    except Exception as error:  # an answer of any kind may be tried
        print(f"not yet: {hint} (your answer gave {type(error).__name__}: {error})")
        return
    print("right" if good else f"not yet: {hint}")


def _close(answer: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, bool | str):
        return type(answer) is type(expected) and answer == expected
    found, wanted = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (answer, expected))
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=tolerance, atol=tolerance * 1e-2
    )


# What the answers are compared with. They stand here so that a notebook can be read without them.


def success_rate(logits: Tensor, logits_adv: Tensor, y: Tensor) -> float:
    """Returns the part of the images read correctly when clean that an attack makes misread.

    Args:
        logits: The model's answers to the clean images, `[n, K]`.
        logits_adv: Those to the attacked ones, `[n, K]`.
        y: The labels, `[n]`.
    """
    correct = logits.argmax(1) == y
    return float((correct & (logits_adv.argmax(1) != y)).sum() / correct.sum())


def part_of_longest(lengths: Tensor, count: int) -> float:
    """Returns the part of the sum of `lengths`, `[n]`, that its `count` largest have."""
    return float(lengths.sort().values[-count:].sum() / lengths.sum())


def pull(length: float, estimate: float, floor: float) -> float:
    """Returns w |g| in units of c, for |g| = `length` c and a weight from an estimate of |g|."""
    return length / max(estimate, floor)


def worst_case(answer: Callable[[Tensor], Any]) -> bool:
    """Tells whether `answer` maps rows of survivals `[restarts, n]` to the worst-case accuracy."""
    example = torch.tensor([[True, True, False, True], [True, False, True, True]])
    chance = torch.Generator().manual_seed(0)
    drawn = (torch.rand(restarts, 30, generator=chance) < 0.9 for restarts in (1, 3, 8))
    return all(
        abs(float(answer(rows)) - sum(map(all, zip(*rows, strict=True))) / rows.shape[1]) < 1e-6
        for rows in (example, *drawn)
    )


def projects(answer: Callable[[Tensor, float], Tensor]) -> bool:
    """Tells whether `answer` brings changes `[n, c, h, w]` into the l2 ball of a radius."""
    changes = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    changes *= torch.tensor([0.001, 0.05, 0.1, 0.3, 1.0, 10.0]).reshape(6, 1, 1, 1)
    return all(
        torch.allclose(answer(changes, radius).flatten(1), changes.flatten(1).renorm(2, 0, radius))
        for radius in (0.2, 1.0, 4.0)
    )


def variance_from_lengths(answer: Callable[[Tensor, Tensor], Any]) -> bool:
    """Tells whether `answer` finds tr Cov from the lengths `[n]` and the mean of n gradients."""
    draw = torch.Generator().manual_seed(0)
    for n, size in ((8, 50), (40, 3), (1, 5)):
        g = torch.randn(n, size, generator=draw, dtype=torch.float64) + 0.5
        g *= 1 + 4 * torch.rand(n, 1, generator=draw, dtype=torch.float64)
        mean = g.mean(dim=0)
        variance = float((g - mean).square().sum(dim=1).mean())
        if not abs(float(answer(g.norm(dim=1), mean)) - variance) <= 1e-6 * (1 + variance):
            return False
    return True


def noise_scale(variance: float, gradient_norm: float) -> float:
    """Returns the n at which tr Cov / n is the squared length of the full gradient."""
    return variance / gradient_norm**2


def variance_at_unit_length(g: Tensor) -> float:
    """Returns tr Cov of the rows of `g`, `[n, weights]`, after each is divided by its length."""
    return float(1 - torch.nn.functional.normalize(g, dim=1).mean(dim=0).square().sum())


def clips(answer: Callable[[Tensor, float], Tensor]) -> bool:
    """Tells whether `answer` gives the weights of per-example clipping from lengths `[n]` and c."""
    lengths = torch.tensor([0.0, 0.3, 1.9, 2.0, 2.1, 50.0])
    return all(
        torch.allclose(answer(lengths, c), example_weights(lengths, c, 1.0)) for c in (2.0, 0.7)
    )


def norms_of_gamma(answer: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Tells whether `answer` finds the lengths of the examples' gradients w.r.t. a norm's gamma.

    From its normalised inputs and output gradients, both `[n, channels, height, width]`.
    """
    draw = torch.Generator().manual_seed(0)
    x_hat, b = torch.randn(2, 5, 4, 3, 3, generator=draw, dtype=torch.float64)
    gamma = torch.ones(4, 1, 1, dtype=torch.float64, requires_grad=True)
    norms = [
        torch.autograd.grad((b_i * gamma * x_i).sum(), gamma)[0].norm()
        for b_i, x_i in zip(b, x_hat, strict=True)
    ]
    return torch.allclose(answer(x_hat, b), torch.stack(norms))


def refreshing(estimated: float, exact: float, k: int, at_most: float) -> list[float]:
    """Returns what a step costs on average, and the smallest k for which it is `at_most`.

    Args:
        estimated: Cost of a step with estimated norms.
        exact: Cost of one that takes exact norms as well; one in `k` is such a step.
        k: For the first of the two answers.
        at_most: For the second.
    """
    averages = {every: (exact + (every - 1) * estimated) / every for every in range(1, 1000)}
    enough = next(every for every, cost in averages.items() if cost <= at_most * (1 + 1e-9))
    return [averages[k], enough]
