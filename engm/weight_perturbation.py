"""Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884).

The gradients of a step are taken not at the weights themselves but at their worst neighbours:

    awp = AWP(gamma=0.01)
    optimizer.zero_grad()
    with awp(model, closure):
        optimizer.accumulate(closure)
    optimizer.step()
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engm import processes
from engm.errors import InputError
from engm.example_norms.measures import Closure, run_closure


@dataclass(frozen=True)
class AWP:
    """Moves each weight tensor by gamma times its length, up the gradient of the mean loss.

        w <- w + gamma |w| g / |g|

    Biases and the scales and shifts of norm layers stay, as in the paper's code. Where the paper's
    code subtracts the perturbation after the optimizer's step, the weights are put back before it,
    bit for bit, so that weight decay and momentum never see it.

    Attributes:
        gamma: Length of the perturbation relative to that of the tensor; 0.005 to 0.01 in the
            paper's experiments.

    Raises:
        InputError: If gamma is below 0.
    """

    gamma: float

    def __post_init__(self) -> None:
        """Refuses a gamma below 0."""
        if not 0 <= self.gamma < math.inf:
            raise InputError(f"gamma must be a number, 0 or more; got {self.gamma!r}")

    @contextmanager
    def __call__(self, model: nn.Module, closure: Closure) -> Iterator[None]:
        """Perturbs the weights of `model` in place for the block, then puts them back.

        Args:
            model: Its trainable tensors of two or more dimensions are moved.
            closure: Returns one loss per example, `[n]`; examples whose loss is inf or nan have no
                say. Its pass leaves the running statistics of BatchNorm as they were.
        """
        weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        if not self.gamma or not weights:
            yield
            return
        steps = self._steps(model, closure, weights)
        kept = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for weight, step in zip(weights, steps, strict=True):
                    weight.add_(step)
            yield
        finally:
            _put_back(weights, kept)

    def _steps(self, model: nn.Module, closure: Closure, weights: list[Tensor]) -> list[Tensor]:
        buffers = list(model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        try:
            with torch.enable_grad():
                losses = run_closure(closure)
                finite = losses.isfinite()
                count = finite.sum().clamp(min=1)
                mean = torch.where(finite, losses, 0).sum() / count
                found = torch.autograd.grad(mean, weights, allow_unused=True)
        finally:
            _put_back(buffers, kept)
        gradients = [
            torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)
        ]
        processes.average(gradients, finite.sum())
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
