"""The exercises of the notebooks: `check`, which never raises, and what it compares with."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    if not good and not callable(expected) and _nearly(answer, expected):
        hint = "nearly; is it rounded, or in percent?"
    print("right" if good else f"not yet: {hint}")


def _nearly(answer: Any, expected: Any) -> bool:
    # a count is right or wrong
    if not isinstance(expected, float) or not isinstance(answer, float | int):
        return False
    return any(_close(float(answer) / part, expected, 0.01) for part in (1, 100))


def _close(answer: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, bool | str):
        return type(answer) is type(expected) and answer == expected
    found, wanted = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (answer, expected))
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=tolerance, atol=tolerance * 1e-2
    )


# What the answers are compared with. They stand here so that a notebook can be read without them.


def success_rate(logits: Tensor, logits_adv: Tensor, y: Tensor) -> float:
    """Returns the part of the images read correctly when clean that an attack makes misread."""
    correct = logits.argmax(1) == y
    return float((correct & (logits_adv.argmax(1) != y)).sum() / correct.sum())


def ascending(measured: Mapping[str, float]) -> Callable[[Sequence[str]], bool]:
    """Returns what tells whether an answer lists the names in `measured`, lowest value first."""

    def holds(answer: Sequence[str]) -> bool:
        values = [measured[name] for name in answer]
        return len(values) == len(set(answer)) == len(measured) and values == sorted(values)

    return holds


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


class _Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = forward


def defences(fragile: nn.Module, robust: nn.Module) -> dict[str, nn.Module]:
    """Returns four defences under the names A to D; one is what it seems to be.

    Three are built on a classifier after natural training, one is after adversarial training.
    """
    return {
        "A": nn.Sequential(_Layer(lambda pixels: 2 * pixels.detach() - pixels), fragile),
        "B": robust,
        "C": nn.Sequential(_Layer(lambda pixels: (4 * pixels).round() / 4), fragile),
        "D": nn.Sequential(fragile, _Layer(lambda logits: 1e3 * logits)),
    }


def names_the_flaws(answer: Any) -> bool:
    """Tells whether `answer` says what is wrong with the four `defences`, from A to D."""
    return _lists(answer, "turned gradient", "nothing", "no gradient", "saturation")


def _lists(answer: Any, *wanted: str) -> bool:
    return isinstance(answer, list | tuple) and tuple(answer) == wanted  # a set has no order


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


def trims(answer: Callable[..., Any]) -> bool:
    """Tells whether `answer` is SGD that leaves out the tenth of the losses that are largest.

    It is made as `answer(parameters, lr=..., ...)` and called as `step(closure)`.
    """
    draw = torch.Generator().manual_seed(0)
    tried: list[dict[str, Any]] = [dict(lr=0.1), dict(lr=0.02, momentum=0.9, weight_decay=0.1)]
    for settings in tried:
        theta, by_hand = (torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer, sgd = answer([theta], **settings), torch.optim.SGD([by_hand], **settings)
        for n in (20, 43, 8, 4):
            a = torch.randn(n, 5, generator=draw, dtype=torch.float64)

            def losses(weights: Tensor, a: Tensor = a) -> Tensor:
                return (a @ weights - 1).square()

            optimizer.zero_grad()
            optimizer.step(partial(losses, theta))
            sgd.zero_grad()
            losses(by_hand).sort().values[: n - round(0.1 * n)].mean().backward()
            sgd.step()
        if not torch.allclose(theta, by_hand):
            return False
    return True


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

    One step in `k` takes exact norms and costs `exact`, all others cost `estimated`.
    """
    averages = {every: (exact + (every - 1) * estimated) / every for every in range(1, 1000)}
    enough = next(every for every, cost in averages.items() if cost <= at_most * (1 + 1e-9))
    return [averages[k], enough]


def expected(notebook: str, number: int) -> Any:
    """Returns what `check` compares the answer to an exercise of notebook "08", say, with."""
    return {
        ("04", 1): _clips_each_example,
        ("04", 2): 16,  # (4 ** (1 / 2)) ** 4
        ("04", 3): _leads_astray,
        ("06", 1): _is_the_second_term_of_mart,
        ("06", 2): 0.53 - 0.49,
        ("06", 3): _flips_signs,
        ("07", 1): _is_a_rehearsal,
        ("07", 2): lambda found: _lists(
            found, "nothing", "classes", "attack", "image size", "nothing", "choice of epoch"
        ),
        ("07", 3): lambda letters: sorted(letters) == ["a", "c", "d", "f"],
        ("08", 1): _is_the_gap,
        ("08", 2): 2.5,
        ("08", 3): 1.0,
        ("09", 1): [0.73, 0.0013**0.5, (0.0013 / 3) ** 0.5],
        ("09", 2): _is_a_plan,
        ("09", 3): _corrects_the_level,
    }[notebook, number]


def _clips_each_example(answer: Any) -> bool:
    from engm.lab.convergence import Rule

    # lengths from 0.1 to 10: some are above c and some are not
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, 10, generator=generator, dtype=torch.float64)
    g = directions * torch.logspace(-1.5, 0.5, 8, dtype=torch.float64)[:, None]
    return all(
        torch.allclose(answer(g, c), Rule("engm", scale=c, floor=1.0).combine(g, None)[0])
        for c in (0.1, 1.0, 4.0, 100.0)
    )


def _leads_astray(answer: Any) -> bool:
    from engm.lab.convergence import Rule

    batch = torch.tensor(answer, dtype=torch.float64)[:, None]
    u, _ = Rule("engm", scale="mean", floor=1e-6).combine(batch, None)
    return bool(batch.mean() > 0 and u < -1e-9)


def _is_the_second_term_of_mart(answer: Any) -> bool:
    from engm.attacks import PGD
    from engm.methods import MART

    z = 2 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    # for half of them the likeliest class is the true one, as it is late in training
    y = torch.where(torch.arange(40) % 2 == 0, z.argmax(1), torch.arange(40) % 5)
    # with beta 0 MART has two terms; a network that returns its input takes logits for images
    mart = MART(PGD(eps=0.1, step_size=0.02, num_steps=1), beta=0.0)
    first = torch.nn.functional.cross_entropy(z, y, reduction="none")
    second = mart.losses(torch.nn.Identity(), z, z, y) - first
    found = answer(z, y)
    return found.shape == second.shape and torch.allclose(found, second, atol=1e-4)


def _flips_signs(answer: Any) -> bool:
    from engm.report.statistics import sign_flip_test

    tried = [[1.0, 2.0, 3.0], [1.0, -2.0, 4.0], [0.5, 0.5, -0.1, 0.3], [-3.0, -1.0, -2.0, 0.25]]
    return all(abs(answer(each) - sign_flip_test(each).p) < 1e-6 for each in tried)


def _whole_numbers(answer: Any) -> list[int]:
    whole = [int(number) for number in answer]
    assert whole == list(answer)
    return whole


def _is_a_rehearsal(answer: Any) -> bool:
    from engm.report.statistics import wilson

    classes, images = _whole_numbers(answer)
    in_all = classes * images
    above_chance = wilson(3 * images // 2, in_all).low > 1 / classes
    return classes >= 50 and in_all <= 1000 and above_chance


def _is_the_gap(answer: Any) -> bool:
    tried = [
        ([0.3, 0.5, 0.4, 0.2], [0.31, 0.46, 0.40, 0.35], 0.11),
        ([0.3, 0.2, 0.5, 0.5], [0.31, 0.5, 0.46, 0.48], -0.02),
        ([0.6, 0.5, 0.4], [0.52, 0.6, 0.4], 0.12),
        ([0.2, 0.5], [0.6, 0.4], 0.0),
    ]
    return all(abs(answer(validation, test) - gap) < 1e-9 for validation, test, gap in tried)


def _is_a_plan(answer: Any) -> bool:
    from scipy import stats

    rates, seeds, new_seeds = _whole_numbers(answer)
    runs = 2 * (rates * seeds + new_seeds)  # two optimizers
    # how often Student's interval leaves out 0 if the mean difference is one deviation
    t = stats.t.ppf(0.975, new_seeds - 1)
    law = stats.nct(new_seeds - 1, new_seeds**0.5)
    return bool(runs <= 40 and rates >= 4 and seeds >= 2 and law.sf(t) + law.cdf(-t) >= 0.8)


def _corrects_the_level(answer: Any) -> bool:
    close, wide = [0.010, 0.012, 0.014], [-0.01, 0.01, 0.02]
    found = [bool(answer(close, m)) for m in (1, 5, 10, 40)]
    # below 0 it is settled, too, and what is settled for one may not be for many
    found += [bool(answer([-d for d in close], 5)), bool(answer(wide, 1)), bool(answer(wide, 40))]
    return found == [True, True, False, False, True, False, False]
