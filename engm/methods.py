"""Training methods: an attack (inner maximisation) and one loss per example (outer minimisation).

A training step with any method and any outer optimizer reads

    x_adv = method.attack(model, x, y)
    optimizer.zero_grad()
    optimizer.step(lambda: method.losses(model, x, x_adv, y))

`AWP` goes with each of them. `engm.config.RECIPES` has the published hyperparameters; where kit and
published code differ, and whether it matters, is in results/methods-as-published.md.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engm import distributed
from engm.attacks import PGD, kl
from engm.config import RunConfig
from engm.errors import InputError, check_number
from engm.norms.measures import Closure, run_closure

# --- training methods

Attack = Callable[..., Tensor]


class Method(Protocol):
    """What a training loop needs of a method."""

    @property
    def attack(self) -> Attack:
        """Makes `x_adv` from `(model, x, y)`, before the optimizer's step.

        Processes that share a batch give `rows=` too, and want the x_adv of these alone.
        """

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns one loss per example, `[n]`, inside the optimizer's closure."""


def no_attack(model: nn.Module, x: Tensor, y: Tensor, rows: slice | None = None) -> Tensor:
    """Returns `x` itself, or `rows` of it."""
    return x if rows is None else x[rows]


class _Checked:
    beta = label_smoothing = 0.0

    def __post_init__(self) -> None:
        """Refuses a beta below 0 and a label smoothing that is no fraction."""
        check_number("beta", self.beta, "6.0")
        if not 0 <= self.label_smoothing < 1:
            value = self.label_smoothing
            raise InputError(f"label_smoothing must be in [0, 1), got {value!r}; 0.1 is usual")


@dataclass(frozen=True)
class Natural(_Checked):
    """Natural training (NT): cross-entropy on the clean images.

    Args:
        label_smoothing: Fraction of the label that is spread over all classes.
    """

    attack: Attack = no_attack
    label_smoothing: float = 0.0

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the cross-entropy of each clean example, `[n]`."""
        return _cross_entropy(_logits(model, x), y, self.label_smoothing)


@dataclass(frozen=True)
class PGDAT(_Checked):
    """Adversarial training with PGD (Madry et al. 2018, arXiv 1706.06083).

    With a single step of `1.25 * eps` it is the fast AT of Wong et al. 2020 (arXiv 2001.03994):
    `PGDAT(PGD(eps=eps, step_size=1.25 * eps, num_steps=1))`.

    Args:
        attack: The inner maximisation, such as `PGD(eps=8 / 255, step_size=2 / 255)`.
        label_smoothing: Fraction of the label that is spread over all classes.
    """

    attack: Attack
    label_smoothing: float = 0.0

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the cross-entropy of each adversarial example, `[n]`."""
        return _cross_entropy(_logits(model, x_adv), y, self.label_smoothing)


@dataclass(frozen=True)
class TRADES(_Checked):
    """Clean cross-entropy plus beta times KL(p(x) || p(x_adv)) (Zhang et al. 2019, 1901.08573).

    The attack climbs the same divergence from x plus a little normal noise, without the label:
    `PGD(eps=eps, step_size=..., loss="kl", start_noise=0.001)`. With PGD's default, the
    cross-entropy, it is another method.

    Args:
        attack: The inner maximisation.
        beta: Weight of the divergence; 6 in the paper's main result.
        label_smoothing: Fraction of the label that is spread over all classes.
    """

    attack: Attack
    beta: float = 6.0
    label_smoothing: float = 0.0

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of each pair of a clean and an adversarial example, `[n]`."""
        logits = _logits(model, x)
        divergence = kl(_logits(model, x_adv), logits)
        return _cross_entropy(logits, y, self.label_smoothing) + self.beta * divergence


@dataclass(frozen=True)
class MART(_Checked):
    """Misclassification-aware AT (Wang et al., ICLR 2020).

    The loss of an example is

        - log p_y(x_adv) - log(1 - max_{k != y} p_k(x_adv)) + beta (1 - p_y(x)) KL(p(x) || p(x_adv))

    The second term is computed from logits, where the paper's code adds 1e-4 to stay finite.

    Args:
        attack: The inner maximisation, PGD on the cross-entropy in the paper; its code starts from
            x plus a little normal noise, `start_noise=0.001`.
        beta: Weight of the divergence, lambda in the paper; 5 there.
    """

    attack: Attack
    beta: float = 5.0

    def losses(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of each pair of a clean and an adversarial example, `[n]`."""
        logits, logits_adv = _logits(model, x), _logits(model, x_adv)
        true = y[:, None]
        # the wrong class that x_adv is most taken for
        rival = logits_adv.scatter(1, true, -math.inf).argmax(1, keepdim=True)
        # log(1 - p_k): all the other classes together
        rest = logits_adv.scatter(1, rival, -math.inf).logsumexp(1) - logits_adv.logsumexp(1)
        missed = 1 - logits.softmax(1).gather(1, true)[:, 0]
        boosted = F.cross_entropy(logits_adv, y, reduction="none") - rest
        return boosted + self.beta * missed * kl(logits_adv, logits)


def build(config: RunConfig) -> Method:
    """Makes the method that a run asks for."""
    config = config.resolved()
    if config.method == "natural":
        return Natural(label_smoothing=config.label_smoothing)
    assert config.eps and config.step_size and config.num_steps
    trades = config.method == "trades"
    usual_noise = 0.001 if trades else 0.0
    attack = PGD(
        eps=config.eps,
        step_size=config.step_size,
        num_steps=config.num_steps,
        norm=config.norm,
        loss="kl" if trades else "ce",
        start_noise=usual_noise if config.start_noise is None else config.start_noise,
        mode=config.attack_mode,
    )
    if config.beta is None:  # which TRADES and MART have
        return PGDAT(attack, config.label_smoothing)
    if trades:
        return TRADES(attack, config.beta, config.label_smoothing)
    return MART(attack, config.beta)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    # in bfloat16 the differences of losses and log-probabilities would be rounded away
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)


# --- adversarial weight perturbation


@dataclass(frozen=True)
class AWP:
    """Moves each weight tensor by gamma times its length, up the gradient of the mean loss.

        w <- w + gamma |w| g / |g|

    Moved are what the paper's code moves (csdongxian/AWP, utils_awp.py): parameters of two or more
    dimensions with "weight" in their name. Biases, the scales and shifts of norm layers, and the
    position and class embeddings of a vision transformer stay. Where the paper's code subtracts the
    perturbation after the optimizer's step, the weights are put back before it, bit for bit, so
    that weight decay and momentum never see it.

    Attributes:
        gamma: Length of the perturbation relative to that of the tensor; 0.005 to 0.01 in the
            paper's experiments.

    Raises:
        InputError: If gamma is below 0 or above 1.
    """

    gamma: float

    def __post_init__(self) -> None:
        """Refuses a gamma below 0, or one that moves weights by more than their length."""
        check_number("gamma", self.gamma, "0.005")
        if self.gamma > 1:
            raise InputError(f"gamma is a fraction of the weights, as in 0.005; got {self.gamma}")

    @contextmanager
    def __call__(self, model: nn.Module, closure: Closure) -> Iterator[None]:
        """Perturbs the weights of `model` in place for the block, then puts them back.

        Args:
            model: Its trainable weights are moved, as above.
            closure: Returns one loss per example, `[n]`; examples whose loss is inf or nan have no
                say. Its pass leaves the running statistics of BatchNorm as they were.

        Raises:
            InputError: If no parameter has such a name, or the weights were changed within the
                block, as by `optimizer.step`.
        """
        if not self.gamma:
            yield
            return
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        weights: list[Tensor] = [p for name, p in named if "weight" in name and p.ndim > 1]
        if not weights:
            raise InputError(
                "AWP moves trainable parameters of two or more dimensions with 'weight' in their "
                f"name; here is none among {[name for name, _ in named][:5]}"
            )
        steps = self._steps(model, closure, weights)
        kept = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for weight, step in zip(weights, steps, strict=True):
                    weight.add_(step)
            versions = [weight._version for weight in weights]
            yield
            changed = [weight._version for weight in weights] != versions
        finally:
            _put_back(weights, kept)
        if changed:
            raise InputError(
                "the weights were changed within the block of AWP, which puts them back: the step "
                "is undone. Write `with awp(model, closure): optimizer.accumulate(closure)` and "
                "call optimizer.step() after the block"
            )

    def _steps(self, model: nn.Module, closure: Closure, weights: list[Tensor]) -> list[Tensor]:
        buffers = list(model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        try:
            with torch.enable_grad():
                losses = run_closure(closure)
                finite = losses.isfinite()
                count = finite.sum().clamp(min=1)
                mean = torch.where(finite, losses, 0).sum() / count
                gradients = torch.autograd.grad(
                    mean, weights, allow_unused=True, materialize_grads=True
                )
        finally:
            _put_back(buffers, kept)
        distributed.average(gradients, finite.sum())
        steps = []
        for weight, gradient in zip(weights, gradients, strict=True):
            length = gradient.norm()
            # no steps from gradients without a direction
            unit = torch.where((length > 0) & length.isfinite(), gradient / length, 0)
            steps.append(self.gamma * weight.detach().norm() * unit)
        return steps


@torch.no_grad()
def _put_back(tensors: list[Tensor], kept: list[Tensor]) -> None:
    for tensor, before in zip(tensors, kept, strict=True):
        tensor.copy_(before)
