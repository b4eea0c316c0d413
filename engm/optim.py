"""ENGM, the outer optimizer with example-normalised gradients, and its baselines.

All take their step with the same call, whose closure returns one loss per example:

    optimizer.step(lambda: method.losses(model, x, x_adv, y))
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engm import distributed
from engm.config import RunConfig
from engm.errors import InputError, NonFiniteLossError
from engm.norms.measures import (
    NO_STEP,
    Closure,
    ExactMeasure,
    InputMeasure,
    LoopMeasure,
    run_closure,
)

# After so many steps on a GPU the host waits to hear whether one of them failed.
_ASK_EVERY = 100
# The running mean of the example norms forgets over about 1 / (1 - 0.99) = 100 steps.
SCALE_DECAY = 0.99

# --- the step guard


class StepGuard:
    """Keeps an optimizer from updating the weights with a batch whose losses are not finite.

    On the CPU `check` raises at once. On a GPU to ask would stall the device until the host has had
    its answer. So the host goes on: the device skips the update, and all that follow, because
    `skip` is the `found_inf` of torch's fused optimizers; the error comes with `settle`, which
    `check` calls every 100 steps. Either way the weights are then those before the step that
    failed.

    Args:
        message: Of the error, with {bad} and {count} for the examples of the batch.

    Attributes:
        skip: `[1]`, above 0 once a step has failed; `None` on the CPU.
        steps: How many updates were asked for so far; the optimizer counts them.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.skip: Tensor | None = None
        self.steps = 0
        self._failure: Tensor | None = None  # the first: step from 1, or 0 for none; bad, count

    def check(self, failed: Tensor, bad: Tensor) -> None:
        """Takes note of a part of a batch.

        Args:
            failed: Whether no update may be made, a single boolean, the same in all processes.
            bad: Which examples are not finite, `[n]` booleans.

        Raises:
            NonFiniteLossError: If this part failed (on the CPU), or an earlier one did.
        """
        if not defers(bad.device):
            if bool(failed):
                raise NonFiniteLossError(self.message.format(bad=int(bad.sum()), count=len(bad)))
            return
        if self.steps and self.steps % _ASK_EVERY == 0:
            self.settle()
        now = torch.stack([failed * (self.steps + 1), failed * bad.sum(), failed * len(bad)])
        first = self._failure
        self._failure = now if first is None else torch.where(first[0] > 0, first, now)
        self.skip = (self._failure[:1] > 0).float()

    def settle(self) -> None:
        """Waits for the device, and raises what `check` could not yet.

        Raises:
            NonFiniteLossError: If an update was skipped.
        """
        step, bad, count = (0, 0, 0) if self._failure is None else self._failure.tolist()
        if step:
            error = NonFiniteLossError(self.message.format(bad=bad, count=count))
            error.steps_ago = self.steps - step + 1
            self._failure, self.skip = None, None
            raise error


def defers(device: torch.device) -> bool:
    """Returns whether to read a number from `device` would make the host wait for it."""
    return device.type != "cpu"


# --- what the optimizers share


class _ExampleSGD(torch.optim.SGD):
    """`torch.optim.SGD` whose closure returns one loss per example.

    A subclass says in `accumulate` how the losses become a gradient: it calls the guard's `check`,
    and keeps in `_gradients` what it has of the batch so far, in `_count` of how many examples.
    """

    max_norm: float | None = None  # of the gradient of a batch, all parameter groups together

    def __init__(self, params: Iterable[Any], message: str, **sgd: Any) -> None:
        super().__init__(params, **sgd)
        self._guard = StepGuard(message)
        self._count = 0
        self._gradients: dict[Tensor, Tensor] = {}

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, inputs: Tensor | None = None
    ) -> Tensor | None:
        """Takes a step along the gradient of the closure's losses.

        Args:
            closure: Runs the model and returns one loss per example, `[n]`. May be left out after
                `accumulate`.
            inputs: The images that the closure gives to the model; `ENGM(norms="input")` alone
                needs them, the others take the same call.

        Returns:
            The losses, `[n]`, detached; `None` without a closure.

        Raises:
            InputError: If the closure returns something else than one loss per example.
            NonFiniteLossError: If a loss is inf or nan (under ENGM: if no example has a finite loss
                and gradient); the parameters are then as before. On a GPU it may come with a later
                step, see `settle`.
        """
        losses = None
        if closure is not None or not self._count:
            losses = self.accumulate(closure, inputs)
        self._take_step()
        self._forget()
        return losses

    def accumulate(self, closure: Closure | None, inputs: Tensor | None = None) -> Tensor:
        """Takes the gradient of a part of a batch, for a `step()` that follows."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and the parts of a batch that no step was taken along."""
        super().zero_grad(set_to_none)
        self._forget()

    def settle(self) -> None:
        """Waits for the device, and raises what steps on a GPU had no answer to yet.

        There a step whose losses are not finite is skipped, with all that follow, and the error
        comes within 100 steps, or here. Call it before the weights are used or kept.

        Raises:
            NonFiniteLossError: If a step was skipped.
        """
        self._guard.settle()

    def _forget(self) -> None:
        self._count, self._gradients = 0, {}

    def _take_step(self) -> None:
        """Updates the weights along the mean over all processes of `_gradients`."""
        distributed.average(list(self._gradients.values()), self._count)
        skip = self._guard.skip
        fused = skip is not None or any(group["fused"] for group in self.param_groups)
        for parameter, gradient in self._gradients.items():
            gradient = _laid_out(gradient, parameter) if fused else gradient
            before = parameter.grad
            parameter.grad = gradient if before is None else before + gradient
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters(), self.max_norm)
        if fused:
            self._fuse()
        if skip is not None:
            self.found_inf = skip
        super().step()
        self._guard.steps += 1

    def _fuse(self) -> None:
        # the fused update alone can be skipped on the device; it needs the momentum from the start
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, False
            for parameter in group["params"] if group["momentum"] else []:
                buffer = self.state[parameter].get("momentum_buffer")
                if buffer is not None:
                    self.state[parameter]["momentum_buffer"] = _laid_out(buffer, parameter)
                elif group["dampening"]:
                    self.settle()  # a first step that is skipped would leave it unset
                else:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _laid_out(values: Tensor, parameter: Tensor) -> Tensor:
    # fused kernels run through the memory of both, whatever their strides
    same = values.stride() == parameter.stride()
    return values if same else torch.empty_like(parameter).copy_(values)


# --- MSGD


class MSGD(_ExampleSGD):
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
        super().__init__(params, "{bad} of {count} losses are inf or nan; " + NO_STEP, lr=lr, **sgd)
        self.max_norm = max_norm

    def accumulate(self, closure: Closure | None, inputs: Tensor | None = None) -> Tensor:
        """Takes the mean gradient of a part of a batch, for a `step()` that follows.

        Args:
            closure: As for `step`, for the part.
            inputs: As for `step`.

        Returns:
            The losses of the part, `[n]`, detached.
        """
        losses = run_closure(closure)
        bad = ~losses.detach().isfinite()
        # wherever the losses are, so that no process waits
        self._guard.check(distributed.mean(bad) > 0, bad)
        parameters = [p for p in self._parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
        share = len(losses) / (self._count + len(losses))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            before = self._gradients.get(parameter)
            if before is not None:
                after = torch.zeros_like(before) if gradient is None else gradient
                self._gradients[parameter] = before.lerp(after, share)
            elif gradient is not None:
                self._gradients[parameter] = gradient if share == 1 else gradient * share
        self._count += len(losses)
        return losses.detach()


# --- ENGM


class ENGM(_ExampleSGD):
    """Momentum SGD over example-normalised gradients (arXiv 2209.01199, abstract).

    MSGD follows the mean of the g_i, the gradients of the examples; ENGM follows the mean of the
    w_i g_i with w_i = c / max(|g_i|, f c). No example pulls harder than c, whatever its gradient.
    The abstract fixes the idea; scale, floor and their defaults are decisions of this kit.

    Momentum, weight decay, schedulers, parameter groups and `state_dict` are those of
    `torch.optim.SGD`; weight decay stays outside the weights. With BatchNorm in train mode, which
    couples the examples, "exact" and "input" weigh the losses by the norms of shares and take a
    second backward pass, see `Watch`.

        optimizer = ENGM(model, lr=0.1, momentum=0.9, weight_decay=5e-4)
        optimizer.zero_grad()
        optimizer.step(lambda: F.cross_entropy(model(x_adv), y, reduction="none"))

    An example whose loss or gradient is inf or nan gets weight 0. On a GPU a step does not wait for
    the device (with "input", only where the estimate is fitted anew); see `settle`. Under
    `torch.distributed` each process gives its own examples and the mean runs over all; the model is
    the bare one, not wrapped for data parallelism.

    Args:
        model: The model whose trainable parameters are optimised.
        lr: Learning rate. With `scale="mean"` one that was tuned for MSGD carries over.
        momentum: Momentum.
        weight_decay: Weight decay.
        scale: c, a number above 0, or "mean": the running mean of |g_i| over the steps before (in
            the first step, of the batch itself).
        floor: f in (0, 1]. Close to 0 every example is normalised to length c; 1 is per-example
            clipping, which leaves examples shorter than c as they are.
        norms: How |g_i| is found. "exact": in the backward pass itself, see `Watch`. "input":
            estimated from the gradients w.r.t. the inputs, see `InputEstimate`; the bound c then
            holds for the estimates. "loop": one backward pass an example, for models that "exact"
            has no formula for.
        refresh_every: With "input", after how many closures the estimate is fitted anew.
        **sgd: `nesterov`, `dampening` and what else `torch.optim.SGD` takes.

    Attributes:
        last: The `ExampleWeights` of the last step, for plots; `None` before the first.
        measure: What finds |g_i|; with "input" its `estimate.fits` tell how good the estimate is.

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
        norms: Literal["exact", "input", "loop"] = "exact",
        refresh_every: int = 20,
        **sgd: Any,
    ) -> None:
        _check_model(model)
        if scale != "mean" and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise InputError(f"scale must be a number above 0, or 'mean'; got {scale!r}")
        if not 0 < floor <= 1:
            raise InputError(f"floor must be in (0, 1], got {floor!r}")
        if norms not in ("exact", "input", "loop"):
            raise InputError(f"norms must be 'exact', 'input' or 'loop', got {norms!r}")
        trainable = [p for p in model.parameters() if p.requires_grad]
        message = f"all losses or their gradients are inf or nan; {NO_STEP}"
        how = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(trainable, message, **how, **sgd)
        self.scale, self.floor = scale, floor
        self.last: ExampleWeights | None = None
        self.measure: ExactMeasure | InputMeasure | LoopMeasure
        if norms == "exact":
            self.measure = ExactMeasure(model)
        elif norms == "input":
            self.measure = InputMeasure(model, refresh_every)
        else:
            self.measure = LoopMeasure(model)
        self._mean_norm: Tensor | None = None  # of the steps so far, float64
        self._norms: list[Tensor] = []  # of each part of the batch so far; nan where left out

    def accumulate(self, closure: Closure | None, inputs: Tensor | None = None) -> Tensor:
        """Takes sum_i w_i g_i of a part of a batch, for a `step()` that follows.

        A batch that does not fit into memory is given in parts; the step is the same as with the
        whole, since c is fixed by the steps before (under "mean", in the very first step, by the
        first part). BatchNorm in train mode sees the parts, not the whole. Arguments and result
        are those of `MSGD.accumulate`.
        """
        losses, norms, weighted = self.measure(closure, inputs)
        good = norms.isfinite() & losses.isfinite()
        self._guard.check(distributed.mean(good) == 0, ~good)
        scale = self._current_scale(norms, good)
        weights = torch.where(good, example_weights(norms, scale, self.floor), 0.0)
        # on a GPU nobody waits to hear that all of them are good, as they nearly always are
        all_good = not defers(good.device) and bool(good.all())
        gradients = weighted(weights, None if all_good else good)
        for parameter, gradient in gradients.items():
            gradient = gradient.to(parameter.dtype)
            before = self._gradients.get(parameter)
            self._gradients[parameter] = gradient if before is None else before + gradient
        self._count += len(losses)
        self._norms.append(norms.masked_fill(~good, math.nan))
        self.last = ExampleWeights(norms, weights, good, scale)
        return losses

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of `torch.optim.SGD`, the running mean and the estimate's line."""
        mean_norm = 0.0 if self._mean_norm is None else float(self._mean_norm)
        own = {"mean_norm": mean_norm, "measure": self.measure.state()}
        return {**super().state_dict(), "engm": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; after that of an MSGD, ENGM's part starts anew."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "engm"})
        own = state_dict.get("engm", {})
        device = self.param_groups[0]["params"][0].device
        mean_norm = own.get("mean_norm", 0.0)
        self._mean_norm = torch.tensor(mean_norm, dtype=torch.float64, device=device)
        self.measure.load(own.get("measure", {}))

    def _forget(self) -> None:
        super()._forget()
        self._norms = []

    def _take_step(self) -> None:
        for total in self._gradients.values():
            total.div_(self._count)
        super()._take_step()
        norms = torch.cat(self._norms)
        mean = distributed.mean(norms, norms.isfinite())
        before = torch.zeros_like(mean) if self._mean_norm is None else self._mean_norm
        decay = SCALE_DECAY * (before > 0).double()
        after = decay * before + (1 - decay) * mean
        skip = self._guard.skip
        self._mean_norm = after if skip is None else torch.where(skip[0] > 0, before, after)

    def _current_scale(self, norms: Tensor, good: Tensor) -> Tensor:
        if self.scale != "mean":
            return torch.full((), self.scale, dtype=torch.float64, device=norms.device)
        if self._count and self.last:
            return self.last._scale  # the first part speaks for all
        mean = distributed.mean(norms, good)
        if self._mean_norm is None:
            return mean
        return torch.where(self._mean_norm > 0, self._mean_norm, mean)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"ENGM takes the model, not {type(model).__name__}: write ENGM(model, lr=...)"
        )
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "ENGM takes the model as it was before torch.compile; compile a copy of "
            "the reference for the attack alone"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(
            "ENGM takes the bare model, and averages over processes itself: give it "
            "model.module, in the closure too"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no parameter that requires a gradient")


# --- the weights of examples


@dataclass(frozen=True)
class ExampleWeights:
    """How a step of ENGM weighed its examples.

    Attributes:
        norms: |g_i| before weighing, or their estimates, `[n]`.
        weights: w_i, `[n]`; the step followed the mean of the w_i g_i.
        good: Which examples had a finite loss and gradient, `[n]` booleans; others got weight 0.
    """

    norms: Tensor
    weights: Tensor
    good: Tensor
    _scale: Tensor

    # read when they are asked for, so that a step on a GPU need not wait for them
    @property
    def scale(self) -> float:
        """c, the longest that a w_i g_i may be."""
        return float(self._scale)

    @property
    def excluded(self) -> int:
        """How many examples had an inf or nan loss or gradient, and got weight 0."""
        return int((~self.good).sum())


def example_weights(norms: Tensor, scale: float | Tensor, floor: float) -> Tensor:
    """Returns w_i = c / max(|g_i|, f c), so that |w_i g_i| <= c.

    Args:
        norms: |g_i|, `[n]`.
        scale: c, a number or a tensor of one. Where it is 0, all gradients are, and the weights
            are 1.
        floor: f in (0, 1].
    """
    scale = torch.as_tensor(scale, dtype=torch.float64, device=norms.device)
    weights = norms.clamp(min=floor * scale).reciprocal() * scale
    return torch.where(scale == 0, 1.0, weights).to(norms.dtype)


# --- the optimizer of a run


def build(config: RunConfig, model: nn.Module) -> MSGD | ENGM:
    """Makes the outer optimizer that a run asks for."""
    if config.optimizer in ("engm", "engm-input"):
        return ENGM(
            model,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            scale=config.scale,
            floor=config.floor,
            norms="exact" if config.optimizer == "engm" else "input",
        )
    return MSGD(
        (p for p in model.parameters() if p.requires_grad),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        max_norm=config.max_norm if config.optimizer == "msgd-clip" else None,
    )
