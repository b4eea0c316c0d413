"""Momentum SGD with the call that ENGM has: the baseline, with or without clipping."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engm import processes
from engm.errors import InputError
from engm.example_norms.measures import NO_STEP, Closure, run_closure
from engm.step_guard import StepGuard


class MSGD(torch.optim.SGD):
    """Momentum SGD, `v <- mu v + mean_i g_i + lambda theta`, `theta <- theta - eta v`.

    `torch.optim.SGD` whose closure returns one loss per example, with optional clipping of the
    batch gradient. Under `torch.distributed` the mean runs over the examples of all processes.

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
        self._guard = StepGuard("{bad} of {count} losses are inf or nan; " + NO_STEP)
        self._count = 0  # examples of the batch so far, and their mean gradient
        self._means: dict[Tensor, Tensor] = {}

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, inputs: Tensor | None = None
    ) -> Tensor | None:
        """Takes a step along the mean gradient of the closure's losses.

        Args:
            closure: Runs the model and returns one loss per example, `[n]`. May be left out after
                `accumulate`.
            inputs: Not used; here so that every optimizer takes the same call.

        Returns:
            The losses, `[n]`, detached; `None` without a closure.

        Raises:
            InputError: If the closure returns something else than one loss per example.
            NonFiniteLossError: If a loss is inf or nan; the parameters are then as before. On a GPU
                it may come with a later step, see `settle`.
        """
        losses = None
        if closure is not None or not self._count:
            losses = self.accumulate(closure, inputs)
        processes.average(list(self._means.values()), self._count)
        update(self, self._means, self._guard, super().step, self.max_norm)
        self._count, self._means = 0, {}
        return losses

    def accumulate(self, closure: Closure | None, inputs: Tensor | None = None) -> Tensor:
        """Takes the gradient of a part of a batch, for a `step()` that follows.

        Args:
            closure: As for `step`, for the part.
            inputs: Not used.

        Returns:
            The losses of the part, `[n]`, detached.
        """
        losses = run_closure(closure)
        bad = ~losses.detach().isfinite()
        # wherever the losses are, so that no process waits
        self._guard.check(processes.mean(bad) > 0, bad)
        parameters = [p for p in _parameters(self) if p.requires_grad]
        gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
        share = len(losses) / (self._count + len(losses))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            before = self._means.get(parameter)
            if before is not None:
                after = torch.zeros_like(before) if gradient is None else gradient
                self._means[parameter] = before.lerp(after, share)
            elif gradient is not None:
                self._means[parameter] = gradient if share == 1 else gradient * share
        self._count += len(losses)
        return losses.detach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and the parts of a batch that no step was taken along."""
        super().zero_grad(set_to_none)
        self._count, self._means = 0, {}

    def settle(self) -> None:
        """Waits for the device, and raises what steps on a GPU had no answer to yet.

        See `ENGM.settle`.
        """
        self._guard.settle()


def update(
    optimizer: torch.optim.SGD,
    gradients: dict[Tensor, Tensor],
    guard: StepGuard,
    step: Callable[[], Any],
    max_norm: float | None = None,
) -> None:
    """Gives each parameter its gradient and calls `step` of `torch.optim.SGD`.

    Args:
        optimizer: Whose parameters they are.
        gradients: What is added to each parameter's `grad`.
        guard: On a GPU the update is skipped there where this says so.
        step: The update.
        max_norm: Longest gradient, all parameters together.
    """
    deferred = guard.skip is not None
    fused = deferred or any(group["fused"] for group in optimizer.param_groups)
    for parameter, gradient in gradients.items():
        gradient = _laid_out(gradient, parameter) if fused else gradient
        before = parameter.grad
        parameter.grad = gradient if before is None else before + gradient
    if max_norm is not None:
        nn.utils.clip_grad_norm_(_parameters(optimizer), max_norm)
    if deferred:
        optimizer.found_inf = guard.skip  # type: ignore[attr-defined]
    for group in optimizer.param_groups if fused else ():
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"] if group["momentum"] else ():
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                buffer = _laid_out(buffer, parameter)
            elif group["dampening"]:
                guard.settle()  # a first step that is skipped would leave it unset
                continue
            else:
                buffer = torch.zeros_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = buffer
    step()
    guard.stepped()


def _laid_out(values: Tensor, parameter: Tensor) -> Tensor:
    # fused kernels run through the memory of both, whatever their strides
    same = values.stride() == parameter.stride()
    return values if same else torch.empty_like(parameter).copy_(values)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
