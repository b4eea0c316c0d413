"""A problem with a dial for the noise, to see how a rate of convergence depends on it.

The gradients of the examples are explicit: grad F(theta), known in closed form, and noise of size
sigma. Many runs (learning rates, sigmas, seeds) go side by side under the update of `engm.optim`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engm.errors import check_choice
from engm.optim import SCALE_DECAY, example_weights

_CHUNK = 64  # steps whose noise is drawn at once


@dataclass(frozen=True)
class Noise:
    """How the gradients g_i of a batch scatter about grad F; their mean is grad F.

    Args:
        kind: "gaussian": g_i = grad F + sigma xi_i, each coordinate of xi_i normal with variance 1.
            "student": likewise, and xi_i divided by a random length of its own, which makes it
            Student's t in d dimensions. "lengths": g_i = a_i (grad F + xi_i) with xi_i as in
            "gaussian" and a_i > 0 log-normal with mean 1 and standard deviation sigma: the dial
            turns the lengths alone.
        batch_size: n.
        degrees_of_freedom: Of "student": the smaller, the heavier the tail. Up to 2 the variance
            is infinite, up to 1 there is no mean.
    """

    kind: Literal["gaussian", "student", "lengths"] = "gaussian"
    batch_size: int = 8
    degrees_of_freedom: float = 1.5

    def __post_init__(self) -> None:
        """Refuses other kinds, which would pass for "gaussian"."""
        check_choice("kind", self.kind, ("gaussian", "student", "lengths"))

    def draw(self, generator: np.random.Generator, steps: int, dimension: int) -> np.ndarray:
        """Draws what `gradients` needs for so many steps, `[steps, n, d + 1]`."""
        drawn = generator.standard_normal((steps, self.batch_size, dimension + 1))
        if self.kind == "student":
            squares = generator.chisquare(self.degrees_of_freedom, (steps, self.batch_size, 1))
            drawn[..., :-1] /= np.sqrt(squares / self.degrees_of_freedom)
        return drawn

    def gradients(self, gradient: Tensor, sigma: Tensor, drawn: Tensor) -> Tensor:
        """Returns g_i, `[..., n, d]`, from grad F, `[..., d]`, and one step of `draw`.

        `sigma` is the dial, of a shape that broadcasts against `[..., n, d]`.
        """
        xi, last = drawn[..., :-1], drawn[..., -1:]
        if self.kind != "lengths":
            return gradient[..., None, :] + sigma * xi
        variance = sigma.square().log1p()  # of log a_i
        return (variance.sqrt() * last - variance / 2).exp() * (gradient[..., None, :] + xi)


@dataclass(frozen=True)
class Rule:
    """An outer optimizer on explicit gradients: the update of `engm.MSGD` and `engm.ENGM`.

    Args:
        optimizer: "msgd"; "msgd-clip", with the batch gradient shortened to `max_norm`; "engm".
        momentum: Momentum.
        max_norm: The longest batch gradient under "msgd-clip".
        scale: ENGM's c, a number or "mean".
        floor: ENGM's f.
    """

    optimizer: Literal["msgd", "msgd-clip", "engm"]
    momentum: float = 0.9
    max_norm: float = 1.0
    scale: float | Literal["mean"] = "mean"
    floor: float = 0.05

    def combine(self, gradients: Tensor, mean_norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns u, which the momentum takes in, `[..., d]`, and the new running mean.

        They follow from g_i, `[..., n, d]`, and, with scale "mean", from the running mean of |g_i|
        over the steps before, `[..., 1]`; `None` in the first step.
        """
        if self.optimizer == "engm":
            norms = gradients.norm(dim=-1)
            scale: Any = self.scale
            if scale == "mean":
                now = norms.mean(-1, keepdim=True)
                scale = now if mean_norm is None else mean_norm
                mean_norm = SCALE_DECAY * scale + (1 - SCALE_DECAY) * now
            # c / max(|g|, f c) = 1 / max(|g| / c, f): each run has a c of its own
            weights = example_weights(norms / scale, 1.0, self.floor)
            return (weights[..., None, :] @ gradients)[..., 0, :] / norms.shape[-1], mean_norm
        mean = gradients.mean(-2)
        if self.optimizer == "msgd-clip":  # as torch.nn.utils.clip_grad_norm_
            mean = mean * (self.max_norm / (mean.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1)
        return mean, None


class Paths(NamedTuple):
    """Runs side by side, one a learning rate, sigma and seed: `[lrs, sigmas, seeds, steps]` each.

    Attributes:
        gradient_norms: |grad F(theta_t)| before each step; inf where a run left all bounds.
        progress: <grad F(theta_t), u_t>.
    """

    gradient_norms: Tensor
    progress: Tensor


def descend(
    gradient_of: Callable[[Tensor], Tensor],
    start: Tensor,
    noise: Noise,
    rule: Rule,
    *,
    lrs: Sequence[float],
    sigmas: Sequence[float],
    seeds: Sequence[int],
    steps: int,
) -> Paths:
    """Runs an optimizer with each learning rate, sigma and seed.

    A seed stands for the same draws whatever the rule, learning rate, sigma and other seeds are,
    so what is compared has met the same noise.

    Args:
        gradient_of: grad F, from points `[..., d]` to gradients `[..., d]`.
        start: theta_0, `[d]`; its device and dtype are those of all runs.
        noise: What is added to grad F.
        rule: The optimizer.
        lrs: Learning rates.
        sigmas: Settings of the dial.
        seeds: Of the noise.
        steps: How many each run has.
    """
    eta, sigma = (start.new_tensor(values)[:, None, None, None] for values in (lrs, sigmas))
    generators = [np.random.default_rng(seed) for seed in seeds]
    theta = start.expand(len(lrs), len(sigmas), len(seeds), -1)
    velocity, mean_norm = torch.zeros_like(theta), None
    found = start.new_empty(2, *theta.shape[:-1], steps)
    for step in range(steps):
        if step % _CHUNK == 0:
            drawn = [noise.draw(g, min(_CHUNK, steps - step), len(start)) for g in generators]
            chunk = torch.from_numpy(np.stack(drawn, 1)).to(start)  # [steps, seeds, n, d + 1]
        gradient = gradient_of(theta)
        gradients = noise.gradients(gradient, sigma, chunk[step % _CHUNK])
        u, mean_norm = rule.combine(gradients, mean_norm)
        found[0, ..., step] = gradient.norm(dim=-1)
        found[1, ..., step] = (gradient * u).sum(-1)
        velocity = rule.momentum * velocity + u
        theta = theta - eta * velocity
    return Paths(found[0].nan_to_num(torch.inf), found[1])
