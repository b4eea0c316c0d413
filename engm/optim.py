"""ENGM, the outer optimizer with example-normalised gradients, and its baselines.

All take their step with the same call, whose closure returns one loss per example:

    optimizer.step(lambda: method.losses(model, x, x_adv, y))
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointError

from engm import distributed
from engm.config import RunConfig
from engm.errors import InputError, NonFiniteLossError, check_choice, check_number, is_number, warn
from engm.norms.graph import nodes_under
from engm.norms.measures import (
    NO_STEP,
    Closure,
    ExactMeasure,
    LoopMeasure,
    ProxyMeasure,
    refuse_hidden,
    run_closure,
)
from engm.norms.operations import size_of

# After so many steps on a GPU the host waits to hear whether one of them failed.
_ASK_EVERY = 100
# The running mean of the example norms forgets over about 1 / (1 - 0.99) = 100 steps.
SCALE_DECAY = 0.99

_BACKWARD_IN_CLOSURE = (
    "a backward pass within the closure filled p.grad, which would be added to the step. The "
    "closure returns the losses and leaves the backward pass to step(); an attack that calls "
    "backward() runs before zero_grad(); checkpoints need use_reentrant=False"
)
_OF_GRAPHS = ("backward through the graph a second time", "modified by an inplace operation")
_GRAPH_KEPT = (
    "the losses depend on the graph of an earlier pass, or the model changes a tensor in place "
    "that its backward pass needs. What is kept from one call to the next, such as a hidden state, "
    "has to be detached, h = h.detach(); what comes of parameters, to be made anew in each closure"
)

# How the norms of the examples are found.
Norms = Literal["exact", "input", "output", "both", "loop"]

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")

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

    A subclass says in `_add` how the losses become a gradient: it calls `_check`, and keeps in
    `_gradients` what it has of the batch so far, in `_count` of how many examples.
    """

    max_norm: float | None = None  # of the gradient of a batch, all parameter groups together
    _left: tuple[Any, int] | None = None  # a gradient that the last step left, and its version
    _told = False
    # so that a GradScaler hands its scale to `step`, which refuses it
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], message: str, **sgd: Any) -> None:
        for name in _NUMBERS:
            if not isinstance(value := sgd.get(name, 0.0), Tensor):
                check_number(name, value, "0.1")
        super().__init__(params, **sgd)
        self._guard = StepGuard(message)
        self._count = 0
        self._gradients: dict[Tensor, Tensor] = {}
        self._bad: list[Tensor] = []  # which examples of each part, where processes share a batch
        self._in_closure = self._started = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch does; a number that is out of range is refused."""
        for name in _NUMBERS:
            if name in param_group and not isinstance(param_group[name], Tensor):
                check_number(f"{name} of a group", param_group[name], "0.1")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but hooks, for copies and pickles; torch's own keeps groups and state."""
        values = vars(self).items()
        # `step` on the instance is that of a scheduler
        apart = ("step", "_left")
        return {k: v for k, v in values if k not in apart and not k.endswith("_hooks")}

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, inputs: Tensor | None = None
    ) -> Tensor | None:
        """Takes a step along the gradient of the closure's losses.

        What `p.grad` holds is added to it, as the gradient of a penalty may be; so call
        `zero_grad()` right before, after an attack that may have filled it.

        Args:
            closure: Runs the model and returns one loss per example, `[n]`. May be left out after
                `accumulate`.
            inputs: The images that the closure gives to the model; `ENGM` with norms "input" or
                "both" needs them, the others take the same call.

        Returns:
            The losses, `[n]`, detached; `None` without a closure.

        Raises:
            InputError: If the closure returns something else than one loss per example.
            NonFiniteLossError: If a loss is inf or nan (under ENGM: if no example has a finite loss
                and gradient); the parameters are then as before. On a GPU it may come with a later
                step, see `settle`.
        """
        if getattr(self, "grad_scale", None) is not None:
            raise InputError(
                "a GradScaler scales losses for float16, which example norms are not made for; use "
                "bfloat16, torch.autocast(..., dtype=torch.bfloat16), without a GradScaler"
            )
        losses = None
        if closure is not None or not self._count:
            losses = self.accumulate(closure, inputs)
        self._take_step()
        self._forget()
        return losses

    def accumulate(self, closure: Closure | None, inputs: Tensor | None = None) -> Tensor:
        """Takes the gradient of a part of a batch, for a `step()` that follows.

        A batch that does not fit into memory is given in parts, each with its losses as they are,
        not divided by the number of parts; the step, `step()` without a closure, is the same as
        with the whole. For ENGM that is so since c is fixed by the steps before (under "mean", in
        the very first step, by the first part). BatchNorm in train mode sees the parts, not the
        whole, and a part of which every example is inf or nan ends in an error.

        Args:
            closure: As for `step`, for the part.
            inputs: As for `step`.

        Returns:
            The losses of the part, `[n]`, detached.

        Raises:
            InputError: As `step`, or if a backward pass filled `p.grad` meanwhile.
            NonFiniteLossError: As `step`.
        """
        if not self._count:
            self._warn_of_gradients()
        if not self._started:
            distributed.share_values(self._parameters())
            closure = partial(self._first_losses, closure)
        before = [(p, p.grad, _version(p.grad)) for p in self._parameters()]
        self._in_closure = True
        try:
            losses = self._add(closure, inputs)
        except CheckpointError as error:
            raise InputError(
                "what is under a checkpoint cannot be gone through as these norms need it; use "
                "norms='output' with refresh_every=None, or put no checkpoint round batch norms in "
                "train mode or instance norms, round parameters that are used outside of their own "
                "module, round the losses, nor, with norms='input' or 'both', round the first layer"
            ) from error
        except RuntimeError as error:
            if "selective activation checkpoint" in str(error):
                raise InputError(
                    "checkpoints with context_fn= allow one backward pass, and these norms take "
                    "more; leave it out, or use norms='output' with refresh_every=None"
                ) from error
            if "grad can be implicitly created only for scalar" in str(error):
                raise InputError(
                    "the closure calls backward(), which step() does itself; return the losses, "
                    "one per example, without it"
                ) from error
            if not any(phrase in str(error) for phrase in _OF_GRAPHS):
                raise
            self._forget()
            message = _BACKWARD_IN_CLOSURE if _filled_since(before) else _GRAPH_KEPT
            raise InputError(message) from error
        finally:
            self._in_closure = False
        self._started = True
        if _filled_since(before):
            self._forget()
            raise InputError(_BACKWARD_IN_CLOSURE)
        return losses

    def _warn_of_gradients(self) -> None:
        held = [p.grad for p in self._parameters() if p.grad is not None]
        left, version = self._left or (None, -1)
        if left is not None and any(left() is g and g._version == version for g in held):
            self._left = None
            if not self._told:
                self._told = True
                warn(
                    "p.grad holds the gradient of the step before, which is added to this step; "
                    "call zero_grad() before each step"
                )
        if not self._started and any(bool(gradient.any()) for gradient in held):
            warn(
                "p.grad is not empty before the first step, and is added to it, as is meant where "
                "it is the gradient of a penalty. If an attack filled it, call zero_grad() after "
                "the attack, right before step()"
            )

    def _add(self, closure: Closure | None, inputs: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _first_losses(self, closure: Closure | None) -> Tensor:
        losses = run_closure(closure)
        refuse_hidden(losses, self._parameters())
        return losses

    def _check(self, failed: Tensor, bad: Tensor) -> None:
        # processes that share a batch may have it in other numbers of parts: they ask in the step
        if distributed.several():
            self._bad.append(bad)
        else:
            self._guard.check(failed, bad)

    def _any_failed(self, bad: Tensor) -> Tensor:
        """Returns whether no update may be made, for the examples of a whole batch."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and the parts of a batch that no step was taken along.

        Within a closure it forgets the gradients alone, as people have it there from torch.
        """
        super().zero_grad(set_to_none)
        if not self._in_closure:
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
        self._count, self._gradients, self._bad = 0, {}, []

    def _take_step(self) -> None:
        """Updates the weights along the mean over all processes of `_gradients`."""
        if self._bad:
            bad = torch.cat(self._bad)
            self._guard.check(self._any_failed(bad), bad)
        self._gradients = distributed.averaged(self._gradients, self._parameters(), self._count)
        skip = self._guard.skip
        fused = skip is not None or any(group["fused"] for group in self.param_groups)
        for parameter, gradient in self._gradients.items():
            gradient = _laid_out(gradient, parameter)
            before = parameter.grad
            parameter.grad = gradient if before is None else before + gradient
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters(), self.max_norm)
        if fused:
            self._fuse()
        if skip is not None:
            self.found_inf = skip
        # without the hooks of steps, which run round this one already
        update = torch.optim.SGD.step
        if getattr(update, "hooked", False):
            update = update.__wrapped__  # type: ignore[attr-defined]
        update(self)
        self._guard.steps += 1
        left = next((p.grad for p in self._gradients if p.grad is not None), None)
        self._left = None if left is None else (ref(left), left._version)

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


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else gradient._version


def _filled_since(before: Sequence[tuple[Tensor, Tensor | None, int]]) -> bool:
    # whether a backward pass filled p.grad; zero_grad(set_to_none=False) leaves zeros
    return any(
        p.grad is not None
        and not (p.grad is gradient and p.grad._version == version)
        and bool(p.grad.any())
        for p, gradient, version in before
    )


def _laid_out(values: Tensor, parameter: Tensor) -> Tensor:
    # fused kernels run through the memory of both, whatever their strides; and torch wants it so
    if values.layout != parameter.layout:  # of a sparse embedding; a sparse tensor has no strides
        return values
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
        if isinstance(params, nn.Module):
            raise InputError("MSGD takes parameters: write MSGD(model.parameters(), lr=...)")
        if max_norm is not None:
            check_number("max_norm", max_norm, "1.0")
            if max_norm == 0:
                raise InputError("max_norm must be above 0, or None for no clipping; got 0")
        super().__init__(params, "{bad} of {count} losses are inf or nan; " + NO_STEP, lr=lr, **sgd)
        self.max_norm = max_norm

    def _add(self, closure: Closure | None, inputs: Tensor | None) -> Tensor:
        losses = run_closure(closure)
        bad = ~losses.detach().isfinite()
        self._check(bad.any(), bad)
        parameters = [p for p in self._parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
        share = len(losses) / (self._count + len(losses))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            before = self._gradients.get(parameter)
            if before is not None:
                after = torch.zeros_like(before) if gradient is None else gradient
                self._gradients[parameter] = before.lerp(after, share)
            elif gradient is not None:
                # two parameters may have one gradient between them
                self._gradients[parameter] = gradient.clone() if share == 1 else gradient * share
        self._count += len(losses)
        return losses.detach()

    def _any_failed(self, bad: Tensor) -> Tensor:
        return distributed.mean(bad) > 0


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
        lr: Learning rate. With `scale="mean"` start from one for MSGD, and try both sides of it.
        momentum: Momentum.
        weight_decay: Weight decay.
        scale: c, a number above 0, or "mean": the running mean of |g_i| over the steps before (in
            the first step, of the batch itself).
        floor: f in (0, 1]. Close to 0 every example is normalised to length c; 1 is per-example
            clipping, which leaves examples shorter than c as they are.
        norms: How |g_i| is found. "exact": in the backward pass itself, see `Watch`. "input",
            "output", "both": estimated from the gradients w.r.t. the images, the model's outputs,
            or both, see `ProxyMeasure`; the bound c then holds for the estimates. "loop": one
            backward pass an example, obviously correct, but slow.
        refresh_every: With an estimate, after how many closures its line is fitted anew; `None`:
            no line, |g_i| is taken as proportional to the proxy. With "output" that costs
            nothing, and the model may be any.
        groups: Parameters with options of their own, as for `torch.optim.SGD`, such as
            `[{"params": ["0.bias", model.norm], "weight_decay": 0.0}]`; "params" lists names,
            parameters or modules. All others have the options above.
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
        *,
        weight_decay: float = 0.0,
        scale: float | Literal["mean"] = "mean",
        floor: float = 0.05,
        norms: Norms = "exact",
        refresh_every: int | None = 20,
        groups: Sequence[Mapping[str, Any]] = (),
        **sgd: Any,
    ) -> None:
        _check_model(model)
        if not (isinstance(scale, str) and scale == "mean") and not (
            is_number(scale) and scale > 0
        ):
            raise InputError(f"scale must be a number above 0, or 'mean'; got {scale!r}")
        if not (is_number(floor) and 0 < floor <= 1):
            raise InputError(f"floor must be a number above 0, at most 1, as 0.05; got {floor!r}")
        check_choice("norms", norms, get_args(Norms))
        message = f"all losses or their gradients are inf or nan; {NO_STEP}"
        how = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self._model, self._trained = model, model.training  # the groups are held against it
        super().__init__(_groups(model, groups), message, **how, **sgd)
        self.scale: float | Literal["mean"] = "mean" if scale == "mean" else float(scale)
        self.floor = float(floor)
        self.last: ExampleWeights | None = None
        self.measure: ExactMeasure | ProxyMeasure | LoopMeasure
        if norms == "exact":
            self.measure = ExactMeasure(model)
        elif norms == "loop":
            self.measure = LoopMeasure(model)
        else:
            self.measure = ProxyMeasure(model, norms, refresh_every)
        self._mean_norm: Tensor | None = None  # of the steps so far, float64

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters, such as those that were frozen till now.

        Raises:
            InputError: If one of them is not the model's, or a number is out of range.
        """
        super().add_param_group(param_group)
        if not {*self.param_groups[-1]["params"]} <= {*self._model.parameters()}:
            del self.param_groups[-1]
            raise InputError("a group lists a parameter that the model does not have")

    def _add(self, closure: Closure | None, inputs: Tensor | None) -> Tensor:
        self._check_model_again()
        losses, norms, weighted = self.measure(closure, inputs)
        good = norms.isfinite() & losses.isfinite()
        failed = ~good.any()
        if not defers(good.device):
            self._check(failed, ~good)
        scale = self._current_scale(norms, good)
        weights = torch.where(good, example_weights(norms, scale, self.floor), 0.0)
        # on a GPU nobody waits to hear that all of them are good, as they nearly always are
        all_good = not defers(good.device) and bool(good.all())
        gradients = weighted(weights, None if all_good else good)
        if not all_good:  # an example that is left out may have reached the others
            finite = torch.stack([g.isfinite().all() for g in gradients.values()]).all()
            if defers(good.device):
                self._check(failed | ~finite, ~good)
            elif not finite:
                raise NonFiniteLossError(
                    "an example that is inf or nan reaches the gradient of the others; "
                    f"{NO_STEP} Take it out of the batch; norms='exact' leaves it out by itself "
                    "where no checkpoint and no batch norm in train mode is in its way."
                )
        for parameter, gradient in gradients.items():
            gradient = gradient.to(parameter.dtype)
            before = self._gradients.get(parameter)
            self._gradients[parameter] = gradient if before is None else before + gradient
        part = ExampleWeights(norms, weights, good, scale)
        self.last = self.last.joined(part) if self.last and self._count else part
        self._count += len(losses)
        return losses

    def _any_failed(self, bad: Tensor) -> Tensor:
        return distributed.mean(~bad) == 0

    def _first_losses(self, closure: Closure | None) -> Tensor:
        given: list[int] = []

        def count(module: nn.Module, arguments: Any, named: Any) -> None:
            tensors = [t for t in (*arguments, *named.values()) if isinstance(t, Tensor)]
            if any(tensor.is_nested and tensor.layout == torch.strided for tensor in tensors):
                raise InputError("ENGM takes no nested tensors; pad them: x.to_padded_tensor(0)")
            given.extend(len(t) for t in tensors if t.dim() and not t.is_nested)

        hook = self._model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            losses = super()._first_losses(closure)
        finally:
            hook.remove()
        if len(losses) == 1 and max(given, default=1) > 1 and _was_a_number(losses):
            warn(
                f"the closure returns a single loss, and the model got a tensor of length "
                f"{max(given)}: if these are {max(given)} examples, write reduction='none', so "
                "that each has a loss of its own"
            )
        if _is_one_number(losses):
            raise InputError(
                "all losses are one number, as a mean that is repeated; write reduction='none', "
                "so that each example has a loss of its own"
            )
        if _has_term_for_all(losses):
            warn(
                "the losses hold a term that is the same for all examples, as a mean over the "
                "batch or a penalty on the weights is: it counts in the norm of each example, and "
                "is weighed as the example is. Of a mean take the parts of the examples, with "
                "reduction='none' (of kl_div: then .sum(1)). For a penalty give ENGM weight_decay "
                "instead, or call penalty.backward() between zero_grad() and step()"
            )
        return losses

    def _check_model_again(self) -> None:
        known = {p for group in self.param_groups for p in group["params"]}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and parameter not in known:
                raise InputError(
                    f"{name} became trainable, or was put in, after ENGM was made, which does not "
                    "step it; make the optimizer anew"
                )
        if self._model.training:
            self._trained = True
        elif self._trained:
            self._trained = False
            warn(
                "the model is in eval mode, though it was in train mode before; if an attack left "
                "it so, call model.train() after the attack"
            )

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

    def _take_step(self) -> None:
        # new tensors: two parameters may have one gradient between them
        self._gradients = {p: total / self._count for p, total in self._gradients.items()}
        super()._take_step()
        assert self.last is not None
        mean = distributed.mean(self.last.norms, self.last.good)
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
    if distributed.several() and any(
        isinstance(module, nn.SyncBatchNorm) for module in model.modules()
    ):
        raise InputError(
            "SyncBatchNorm couples the examples of all processes, which ENGM has no norms for; "
            "use BatchNorm, with the statistics of each process, or GroupNorm"
        )


_SUMS = ("AddBackward0", "SubBackward0", "RsubBackward1")
_SCALINGS = ("MulBackward0", "DivBackward0", "NegBackward0")


def _has_term_for_all(losses: Tensor) -> bool:
    """Returns whether a single number that depends on the weights is added to all losses.

    One that is made of the losses, such as their variance, is no such term.
    """
    terms, own = [], [losses.grad_fn]
    for node in own:  # sums, and what they are of
        if node is not None and node.name() in (*_SUMS, *_SCALINGS):
            for child, output in node.next_functions:
                if child is not None and size_of(GradientEdge(child, output)).numel() > 1:
                    own.append(child)
                elif child is not None and node.name() in _SUMS:
                    terms.append(child)
    return len(losses) > 1 and bool(terms) and set(own).isdisjoint(nodes_under(terms))


def _was_a_number(losses: Tensor) -> bool:
    """Returns whether a single loss is a mean, or comes from a number without dimensions.

    The loss of a single example has one, even where the model gets more: with TRADES its image and
    the attacked one, or a sequence that runs along the first dimension.
    """
    waiting = [losses.grad_fn]
    for node in waiting:
        for child, output in node.next_functions if node is not None else ():
            if child is None:
                continue
            size = size_of(GradientEdge(child, output))
            mean = node is not None and node.name().startswith("MeanBackward")
            if len(size) == 0 or (mean and size[0] > 1):
                return True
            if size.numel() == 1 and child not in waiting:
                waiting.append(child)
    return False


def _is_one_number(losses: Tensor) -> bool:
    """Returns whether several losses are copies of a single number."""
    if len(losses) == 1:
        return False
    sources, waiting = set(), [losses.grad_fn]
    for node in waiting:
        if node is None or not node.next_functions:  # a parameter
            return False
        for child, output in node.next_functions:
            if child is not None and size_of(GradientEdge(child, output)).numel() == 1:
                sources.add((child, output))
            elif child is not None and child not in waiting:
                waiting.append(child)
    return len(sources) == 1 and bool((losses == losses[0]).all())  # seldom asked of a GPU


_FOR_ALL = {"scale", "floor", "norms", "refresh_every"}


def _groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the parameter groups, that of all the others first."""
    named = dict(model.named_parameters())
    own: list[dict[str, Any]] = []
    form = "groups is a list of groups: groups=[{'params': [...], ...}]"
    if isinstance(groups, Mapping):
        raise InputError(form)
    for group in groups:
        if not isinstance(group, Mapping):
            raise InputError(f"{form}; all parameters that no group lists are trained, too")
        if "params" not in group:
            raise InputError(
                f"a group has {', '.join(group)}, but no 'params', which lists its own"
            )
        if isinstance(group["params"], str):
            raise InputError(f"'params' of a group is a list: [{group['params']!r}]")
        if unknown := group.keys() & _FOR_ALL:
            raise InputError(f"{', '.join(sorted(unknown))} is the same for all groups of ENGM")
        parameters: list[Tensor] = []
        for item in group["params"]:
            if isinstance(item, str) and item in named:
                parameters.append(named[item])
            elif isinstance(item, nn.Module):
                parameters.extend(item.parameters())
            elif isinstance(item, Tensor):
                parameters.append(item)
            else:
                raise InputError(
                    f"a group lists names of parameters, parameters or modules; got {item!r}. "
                    f"The names are {', '.join(named)}"
                )
        own.append({**group, "params": [p for p in parameters if p.requires_grad]})
    listed = {p for group in own for p in group["params"]}
    rest = [p for p in named.values() if p.requires_grad and p not in listed]
    return [group for group in ({"params": rest}, *own) if group["params"]]


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

    def __str__(self) -> str:
        """Returns a line on the examples: how many, how long their gradients, what they weigh."""
        norms = self.norms[self.good]
        if not len(norms):
            return f"{len(self.norms)} examples, all excluded"
        least, most = self.weights.aminmax()
        median = norms.float().quantile(0.5)
        return (
            f"{len(self.norms)} examples, {self.excluded} excluded; norms {norms.min():.3g} to "
            f"{norms.max():.3g}, median {median:.3g}; weights {least:.3g} to {most:.3g}; "
            f"scale {self.scale:.3g}"
        )

    def joined(self, other: "ExampleWeights") -> "ExampleWeights":
        """Returns this and another part of a batch as one."""
        return ExampleWeights(
            torch.cat([self.norms, other.norms]),
            torch.cat([self.weights, other.weights]),
            torch.cat([self.good, other.good]),
            self._scale,
        )

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

# How each of them finds the norms.
_NORMS: dict[str, dict[str, Any]] = {
    "engm": dict(norms="exact"),
    "engm-input": dict(norms="input", refresh_every=20),
    "engm-input-only": dict(norms="input", refresh_every=None),
    "engm-output": dict(norms="output", refresh_every=None),
    "engm-both": dict(norms="both", refresh_every=20),
}


def build(config: RunConfig, model: nn.Module) -> MSGD | ENGM:
    """Makes the outer optimizer that a run asks for."""
    sgd: dict[str, Any] = dict(
        lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    if config.optimizer in _NORMS:
        norms = _NORMS[config.optimizer]
        return ENGM(model, scale=config.scale, floor=config.floor, **norms, **sgd)
    max_norm = config.max_norm if config.optimizer == "msgd-clip" else None
    return MSGD([p for p in model.parameters() if p.requires_grad], max_norm=max_norm, **sgd)
