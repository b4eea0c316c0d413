"""How ENGM finds the norms of its examples: exactly, estimated from input gradients, or in a loop.

A measure is called with the closure, and gives the losses, the norms |g_i| and a function that
gives sum_i w_i g_i for weights found from the norms.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engm.errors import InputError, NonFiniteLossError
from engm.norms.inputs import InputEstimate
from engm.norms.watch import Watch, loop_norms

Closure = Callable[[], Tensor]
Weighted = Callable[[Tensor, Tensor | None], dict[Tensor, Tensor]]
Measured = tuple[Tensor, Tensor, Weighted]
NO_STEP = "no step was taken."


class _Stateless:
    def state(self) -> dict[str, Any]:
        """Returns what a `state_dict` keeps: nothing."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state` returned."""


class ExactMeasure(_Stateless):
    """Exact norms from one forward and one backward pass, see `Watch`."""

    def __init__(self, model: nn.Module) -> None:
        Watch(model)  # says now, not in the first step, which layer it has no formula for
        self._model = model

    def __call__(self, closure: Closure | None, inputs: Tensor | None) -> Measured:
        """Runs the closure and its backward pass."""
        with Watch(self._model) as watch:
            losses = run_closure(closure)
        watch.backward(losses)
        return losses.detach(), watch.norms(), watch.weighted


class InputMeasure:
    """Norms estimated from the gradients w.r.t. the inputs, see `InputEstimate`.

    Every `refresh_every` steps, and as long as the estimate is useless, they are measured exactly.

    Attributes:
        estimate: The line from input gradients to norms, with all its fits.
    """

    def __init__(self, model: nn.Module, refresh_every: int) -> None:
        if refresh_every < 1:
            raise InputError(f"refresh_every must be at least 1, got {refresh_every!r}")
        Watch(model)
        self.estimate = InputEstimate()
        self._model, self._refresh_every = model, refresh_every
        self._calls = 0

    def __call__(self, closure: Closure | None, inputs: Tensor | None) -> Measured:
        """Runs the closure and its backward pass, down to the inputs."""
        refresh = self._calls % self._refresh_every == 0 or not self.estimate.useful
        with _gradient_wanted(inputs):
            with Watch(self._model, measure=refresh) as watch:
                losses = run_closure(closure)
            if inputs is not None and len(inputs) != len(losses):
                raise InputError(
                    f"inputs has {len(inputs)} rows for {len(losses)} losses; give one an example"
                )
            gradient = watch.backward(losses, inputs)
        if gradient is None:
            raise InputError(
                "the losses do not depend on inputs; give the very tensor that the model is given"
            )
        precise = torch.promote_types(gradient.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=precise)
        self._calls += 1
        if refresh:
            norms = watch.norms()
            self.estimate.fit(self._calls, lengths, norms)
        else:
            norms = self.estimate.estimate(lengths)
        return losses.detach(), norms, watch.weighted

    def state(self) -> dict[str, Any]:
        """Returns what a `state_dict` keeps: the line and when it is due."""
        return {"calls": self._calls, "fit": self.estimate.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._calls = state.get("calls", 0)
        self.estimate.load(state.get("fit", []))


class LoopMeasure(_Stateless):
    """Norms by one backward pass an example, see `loop_norms`; then one more for the gradient."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, closure: Closure | None, inputs: Tensor | None) -> Measured:
        """Runs the closure and n backward passes."""
        losses = run_closure(closure)
        parameters: list[Tensor] = [p for p in self._model.parameters() if p.requires_grad]
        norms = loop_norms(losses, parameters)

        def weighted(weights: Tensor, keep: Tensor | None) -> dict[Tensor, Tensor]:
            # sum_i w_i g_i is the gradient of sum_i w_i l_i, the weights held constant
            total = (weights.to(losses.dtype) * losses).sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True)
            pairs = zip(parameters, found, strict=True)
            gradients = {p: g for p, g in pairs if g is not None}
            if not all(g.isfinite().all() for g in gradients.values()):
                raise NonFiniteLossError(
                    f"an example that is inf or nan reaches the gradient of the others; {NO_STEP} "
                    "norms='exact' would leave it out."
                )
            return gradients

        return losses.detach(), norms, weighted


def run_closure(closure: Closure | None) -> Tensor:
    """Returns the losses of a closure, `[n]`, attached to their graph.

    Raises:
        InputError: If they are not one loss per example, or depend on nothing trainable.
    """
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
    return losses


@contextmanager
def _gradient_wanted(inputs: Tensor | None) -> Iterator[None]:
    if (
        not isinstance(inputs, Tensor)
        or not (inputs.is_leaf and inputs.is_floating_point())
        or inputs.is_inference()
    ):
        raise InputError(
            "norms='input' needs the images too: optimizer.step(closure, inputs=x_adv), with "
            "x_adv a tensor of floats from outside of the model, such as x_adv.detach()"
        )
    before = inputs.requires_grad
    inputs.requires_grad_(True)
    try:
        yield
    finally:
        inputs.requires_grad_(before)
