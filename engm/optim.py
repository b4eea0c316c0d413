"""ENGM, the outer optimizer with example-normalised gradients, and its baselines.

All take their step with the same call, whose closure returns one loss per example:

    optimizer.step(lambda: method.losses(model, x, x_adv, y))
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from engm.config import RunConfig
from engm.errors import InputError, NonFiniteLossError
from engm.example_norms import loop_norms

Closure = Callable[[], Tensor]

# The running mean of the example norms forgets over about 1 / (1 - 0.99) = 100 steps.
_SCALE_DECAY = 0.99


class MSGD(torch.optim.SGD):
    """Momentum SGD, `v <- mu v + mean_i g_i + lambda theta`, `theta <- theta - eta v`.

    `torch.optim.SGD` whose closure returns one loss per example, with optional clipping of the
    batch gradient.

    Args:
        params: Parameters or parameter groups, as for `torch.optim.SGD`.
        lr: Learning rate.
        max_norm: Longest batch gradient, all parameter groups together; longer ones are
            shortened to it. `None`: no clipping.
        **sgd: `momentum`, `weight_decay`, `nesterov` and what else `torch.optim.SGD` takes.

    Raises:
        InputError: If `max_norm` is not above 0.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, max_norm: float | None = None, **sgd: Any
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise InputError(f"max_norm must be above 0, or None for no clipping; got {max_norm}")
        super().__init__(params, lr=lr, **sgd)
        self.max_norm = max_norm

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Takes a step along the mean gradient of the closure's losses.

        Args:
            closure: Runs the model and returns one loss per example, `[n]`.

        Returns:
            The losses, `[n]`, detached.

        Raises:
            InputError: If the closure returns something else than one loss per example.
            NonFiniteLossError: If a loss is inf or nan; the parameters are then as before.
        """
        losses = _evaluate(closure)
        losses.mean().backward()
        if self.max_norm is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.max_norm)
        super().step()
        return losses.detach()


@dataclass(frozen=True)
class ExampleWeights:
    """How a step of ENGM weighed its examples.

    Attributes:
        norms: |g_i| before weighing, `[n]`.
        weights: w_i, `[n]`; the step followed the mean of the w_i g_i.
        scale: c, the longest that a w_i g_i may be.
    """

    norms: Tensor
    weights: Tensor
    scale: float


class ENGM(torch.optim.SGD):
    """Momentum SGD over example-normalised gradients (arXiv 2209.01199, abstract).

    MSGD follows the mean of the g_i, the gradients of the examples; ENGM follows the mean of the
    w_i g_i with w_i = c / max(|g_i|, f c). No example pulls harder than c, whatever its gradient.
    The abstract fixes the idea; scale, floor and their defaults are decisions of this kit.

    Momentum, weight decay, schedulers, parameter groups and `state_dict` are those of
    `torch.optim.SGD`; weight decay stays outside the weights.

        optimizer = ENGM(model, lr=0.1, momentum=0.9, weight_decay=5e-4)
        optimizer.zero_grad()
        optimizer.step(lambda: F.cross_entropy(model(x_adv), y, reduction="none"))

    Args:
        model: The model whose trainable parameters are optimised.
        lr: Learning rate. With `scale="mean"` one that was tuned for MSGD carries over.
        momentum: Momentum.
        weight_decay: Weight decay.
        scale: c, a number above 0, or "mean": the running mean, over steps, of the mean |g_i| of
            the batch.
        floor: f in (0, 1]. Close to 0 every example is normalised to length c; 1 is per-example
            clipping, which leaves examples shorter than c as they are.
        norms: How |g_i| is found. "loop": one backward pass an example, see `loop_norms`.
        **sgd: `nesterov`, `dampening` and what else `torch.optim.SGD` takes.

    Attributes:
        last: The `ExampleWeights` of the last step, for plots; `None` before the first.

    Raises:
        InputError: If an argument is out of range, or the model has nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        scale: float | Literal["mean"] = "mean",
        floor: float = 0.05,
        norms: Literal["loop"] = "loop",
        **sgd: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"ENGM takes the model, not {type(model).__name__}: write ENGM(model, lr=...)"
            )
        if scale != "mean" and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise InputError(f"scale must be a number above 0, or 'mean'; got {scale!r}")
        if not 0 < floor <= 1:
            raise InputError(f"floor must be in (0, 1], got {floor!r}")
        if norms != "loop":
            raise InputError(f"norms must be 'loop', got {norms!r}")
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise InputError("the model has no parameter that requires a gradient")
        super().__init__(trainable, lr=lr, momentum=momentum, weight_decay=weight_decay, **sgd)
        self.scale, self.floor = scale, floor
        self.last: ExampleWeights | None = None
        self._mean_norm = 0.0

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Takes a step along the mean of the weighted gradients of the closure's losses.

        Args:
            closure: Runs the model and returns one loss per example, `[n]`.

        Returns:
            The losses, `[n]`, detached.

        Raises:
            InputError: If the closure returns something else than one loss per example.
            NonFiniteLossError: If a loss or its gradient is inf or nan; the parameters are then
                as before.
        """
        losses = _evaluate(closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms = loop_norms(losses, parameters)
        if not norms.isfinite().all():
            raise NonFiniteLossError("the gradient of an example is inf or nan; no step was taken")
        scale = self._next_scale(norms)
        weights = example_weights(norms, scale, self.floor)
        # mean_i w_i g_i is the gradient of mean_i w_i l_i, the weights held constant
        (weights.to(losses.dtype) * losses).mean().backward()
        super().step()
        self.last = ExampleWeights(norms, weights, scale)
        return losses.detach()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of `torch.optim.SGD` and the running mean of the example norms."""
        return {**super().state_dict(), "mean_norm": self._mean_norm}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; that of an MSGD starts the running mean anew."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "mean_norm"})
        self._mean_norm = float(state_dict.get("mean_norm", 0.0))

    def _next_scale(self, norms: Tensor) -> float:
        if self.scale != "mean":
            return float(self.scale)
        mean = float(norms.mean())
        decay = _SCALE_DECAY if self._mean_norm else 0.0
        self._mean_norm = decay * self._mean_norm + (1 - decay) * mean
        return self._mean_norm


def example_weights(norms: Tensor, scale: float, floor: float) -> Tensor:
    """Returns w_i = c / max(|g_i|, f c), so that |w_i g_i| <= c.

    Args:
        norms: |g_i|, `[n]`.
        scale: c. Where it is 0, all gradients are, and the weights are 1.
        floor: f in (0, 1].
    """
    if scale == 0:
        return torch.ones_like(norms)
    return scale / norms.clamp(min=floor * scale)


def build(config: RunConfig, model: nn.Module) -> MSGD | ENGM:
    """Makes the outer optimizer that a run asks for."""
    sgd: dict[str, Any] = dict(
        lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    if config.optimizer == "engm":
        return ENGM(model, **sgd, scale=config.scale, floor=config.floor)
    max_norm = config.max_norm if config.optimizer == "msgd-clip" else None
    return MSGD((p for p in model.parameters() if p.requires_grad), **sgd, max_norm=max_norm)


def _evaluate(closure: Closure) -> Tensor:
    if not callable(closure):
        raise InputError(
            "step() takes a closure that runs the model and returns one loss per example: "
            "optimizer.step(lambda: F.cross_entropy(model(x), y, reduction='none'))"
        )
    with torch.enable_grad():
        losses = closure()
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not len(losses):
        shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"the closure must return one loss per example, a tensor [n], not {shape}; "
            "write reduction='none'"
        )
    if not losses.requires_grad:
        raise InputError(
            "the losses do not depend on a trainable parameter; was a no_grad() active?"
        )
    bad = cast(int, (~losses.detach().isfinite()).sum().item())
    if bad:
        raise NonFiniteLossError(f"{bad} of {len(losses)} losses are inf or nan; no step was taken")
    return losses
