"""How long the examples' gradients are, and how much they vary, over a whole set of examples.

With g_i the gradient of example i's loss, and means over all n examples of the set,

    tr Cov = mean |g_i|^2 - |mean g_i|^2

so that neither the single gradients nor their covariance are ever held.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engm.attacks import eval_mode
from engm.errors import InputError, NonFiniteLossError
from engm.methods import Method
from engm.norms.measures import run_closure
from engm.norms.watch import Watch
from engm.report import verdicts


@dataclass(frozen=True)
class Moments:
    """First and second moments of gradients g_i, of a whole network or of one layer.

    Attributes:
        mean_norm: Mean of the |g_i|.
        mean_square: Mean of the |g_i|^2.
        gradient_square: |mean g_i|^2, the square of the length of the full gradient.
    """

    mean_norm: float
    mean_square: float
    gradient_square: float

    @property
    def gradient_norm(self) -> float:
        """|mean g_i|, the length of the full gradient."""
        return math.sqrt(self.gradient_square)

    @property
    def variance(self) -> float:
        """Trace of the covariance, mean |g_i - mean g|^2, with 1/n: the set is the population."""
        return max(0.0, self.mean_square - self.gradient_square)

    @property
    def signal_to_noise(self) -> float:
        """|mean g_i|^2 / tr Cov; inf without variance, nan where all gradients are 0."""
        if self.variance:
            return self.gradient_square / self.variance
        return math.inf if self.gradient_square else math.nan

    @property
    def norm_variation(self) -> float:
        """Standard deviation of the |g_i| over their mean; nan where all gradients are 0."""
        if not self.mean_norm:
            return math.nan
        return math.sqrt(max(0.0, self.mean_square - self.mean_norm**2)) / self.mean_norm


@dataclass(frozen=True)
class GradientStatistics(Moments):
    """The moments of a whole network's gradients, and of each layer's.

    Attributes:
        mean_loss: Mean of the losses.
        count: n, how many examples there were.
        layers: Under the name of each layer that has trainable parameters the moments of their
            part of the g_i. Squares and variances add up to those of the network.
    """

    mean_loss: float
    count: int
    layers: Mapping[str, Moments] = field(repr=False)


def gradient_statistics(
    model: nn.Module, method: Method, examples: Iterable[tuple[Tensor, Tensor]], *, seed: int = 0
) -> GradientStatistics:
    """Measures norm and variance of the gradients of `method`'s losses, over all `examples`.

    The model is in eval mode meanwhile and afterwards as it was, so that BatchNorm treats examples
    apart and g_i is the gradient of loss i alone. How the set is cut into batches then makes no
    difference, but for random starts of the attack. Source: this kit.

    Args:
        model: From pixels `[n, c, h, w]` in [0, 1] to logits `[n, K]`.
        method: Its attack makes `x_adv`, its losses are differentiated; `Natural()` for NT.
        examples: Batches `(x, y)`, such as `data.batches` makes.
        seed: Seed of the attack's random starts. The global generator is left as it was.

    Returns:
        The moments over all examples, of the network and of each layer.

    Raises:
        InputError: If there are no examples, or the losses are not one an example.
        NonFiniteLossError: If a loss or a gradient is inf or nan.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if not names:
        raise InputError("the model has no parameter that requires a gradient")
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for parameter, name in names.items():
        layers[name.rpartition(".")[0] or "model"].append(parameter)
    losses: list[Tensor] = []
    squares: dict[Tensor, list[Tensor]] = {p: [] for p in names}  # |g_i|^2, batch by batch
    sums = {p: torch.zeros_like(p, requires_grad=False) for p in names}
    devices = {p.device for p in names if p.device.type == "cuda"}
    with eval_mode(model), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        for x, y in examples:
            x_adv = method.attack(model, x, y)
            with Watch(model) as watch:
                found = run_closure(partial(method.losses, model, x, x_adv, y))
            watch.backward(found)
            losses.append(found.detach())
            lengths, gradients = watch.squares(), watch.weighted(torch.ones_like(losses[-1]))
            for p, parts in squares.items():  # one without a part in the losses counts zero
                parts.append(lengths.get(p, torch.zeros_like(losses[-1])))
                if p in gradients:
                    sums[p] += gradients[p]
    if not losses:
        raise InputError("there are no examples; give batches (x, y)")
    every = {p: torch.cat(parts).double() for p, parts in squares.items()}
    mean_loss = torch.cat(losses).double().mean().item()
    whole = _moments(list(names), every, sums)
    if not all(map(math.isfinite, (mean_loss, whole.mean_square, whole.gradient_square))):
        raise NonFiniteLossError("a loss or a gradient is inf or nan, so there is no mean of them")
    return GradientStatistics(
        **vars(whole),
        mean_loss=mean_loss,
        count=sum(map(len, losses)),
        layers={name: _moments(own, every, sums) for name, own in layers.items()},
    )


class C1Verdict(NamedTuple):
    """Whether claim C1 holds, and what that was decided from.

    Attributes:
        outcome: One of those of `engm.report.verdicts`.
        norm_ratios: For each seed the mean example norm of AT over that of NT.
        variance_ratios: Likewise for the variance.
        horizons: What the outcome would be, had training stopped earlier: one for each moment in
            the last third, the end of training last.
    """

    outcome: str
    norm_ratios: list[float]
    variance_ratios: list[float]
    horizons: list[str]


def c1_verdict(
    natural: Sequence[Sequence[Moments]], adversarial: Sequence[Sequence[Moments]]
) -> C1Verdict:
    """Decides claim C1: AT has a higher gradient norm and variance than NT (arXiv 2209.01199).

    The rule (source: this kit): in each seed, mean example norm and variance are averaged over the
    moments of training. The claim holds in a seed if both averages are higher under AT. It holds
    if it does so in every seed, does not hold if it does so in none, and is not settled if the
    seeds disagree or are fewer than three. How long one trains must not decide it: the outcome is
    that of every horizon in the last third of the moments, and not settled where they differ.

    Args:
        natural: For each seed what was measured along natural training.
        adversarial: The same for adversarial training, with the same seeds at the same moments.

    Raises:
        InputError: If the two do not match, or there is nothing.
    """
    count = min(map(len, natural), default=0)
    if not count or [*map(len, natural)] != [*map(len, adversarial)]:
        raise InputError("give both trainings with the same seeds, measured at the same moments")
    horizons = []
    for end in range(count - (count - 1) // 3, count + 1):
        norms = _ratios("mean_norm", natural, adversarial, end)
        variances = _ratios("variance", natural, adversarial, end)
        held = [norm > 1 and variance > 1 for norm, variance in zip(norms, variances, strict=True)]
        horizons.append(verdicts.from_seeds(held))
    outcome = horizons[-1] if len(set(horizons)) == 1 else verdicts.NOT_SETTLED
    return C1Verdict(outcome, norms, variances, horizons)


def _ratios(
    kind: str,
    natural: Sequence[Sequence[Moments]],
    adversarial: Sequence[Sequence[Moments]],
    end: int,
) -> list[float]:
    def mean(run: Sequence[Moments]) -> float:
        return fmean(getattr(moments, kind) for moments in run[:end])

    return [mean(at) / mean(nt) for nt, at in zip(natural, adversarial, strict=True)]


def _moments(
    parameters: Sequence[Tensor], squares: Mapping[Tensor, Tensor], sums: Mapping[Tensor, Tensor]
) -> Moments:
    total = torch.stack([squares[p] for p in parameters]).sum(0)  # |g_i|^2, [n]
    lengths = [torch.linalg.vector_norm(sums[p]).double().square() for p in parameters]
    gradient_square = torch.stack(lengths).sum().item() / len(total) ** 2
    return Moments(total.sqrt().mean().item(), total.mean().item(), gradient_square)
