"""How ENGM finds the norms of its examples: exactly, from proxies, or in a loop.

A measure is called with the closure, and gives the losses, the norms |g_i| and a function that
gives sum_i w_i g_i for weights found from the norms.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engm.errors import InputError
from engm.norms.graph import nodes_under
from engm.norms.inputs import InputEstimate
from engm.norms.operations import size_of
from engm.norms.rows import Rows
from engm.norms.watch import Checked, Watch, gradients_of, loop_norms, norm_of, rows_of

Closure = Callable[[], Tensor]
Weighted = Callable[[Tensor, Tensor | None], dict[Tensor, Tensor]]
Measured = tuple[Tensor, Tensor, Weighted]
NO_STEP = "no step was taken."
_NO_INPUT = "the losses do not depend on inputs; give the very tensor that the model is given"
_NO_OUTPUT = (
    "the losses do not depend on the model's outputs; in the closure, call the model that ENGM was "
    "given, by model(x)"
)


class Measure:
    """What finds the norms for `model`; by default it has no state."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._checked = model, Checked()

    def __call__(self, closure: Closure | None, inputs: Tensor | None) -> Measured:
        """Runs the closure and the backward passes that are needed."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Returns what a `state_dict` keeps."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""


class ExactMeasure(Measure):
    """Exact norms from one forward and one backward pass, see `Watch`."""

    def __call__(self, closure: Closure | None, inputs: Tensor | None) -> Measured:
        """Runs the closure and its backward pass."""
        with Watch(self._model, checked=self._checked) as watch:
            losses = run_closure(closure)
        if len(losses) == 1:
            return _of_one(losses, watch.alone(losses, _trained(self._model)))
        watch.backward(losses)
        # as backward() does, so that what is kept of a graph cannot be used again in silence
        return losses.detach(), watch.norms(), partial(watch.weighted, retain=False)


class ProxyMeasure(Measure):
    """Norms from the gradients w.r.t. the model's inputs or outputs, see `InputEstimate`.

    With a line, the norms are measured exactly every `refresh_every` steps, and as long as the
    estimate is useless. Without one they are taken as proportional to the proxy (with both, to the
    mean of the two, each relative to its mean in the batch): scale "mean" makes the factor
    irrelevant, and the model is never watched; with outputs alone any that can be differentiated
    will do.

    Args:
        model: The model.
        of: The gradients that are the proxy.
        refresh_every: After how many steps the line is fitted anew; `None` for no line.

    Attributes:
        estimate: The line from proxies to norms, with all its fits.
    """

    def __init__(
        self,
        model: nn.Module,
        of: Literal["input", "output", "both"],
        refresh_every: int | None,
    ) -> None:
        if refresh_every is not None and refresh_every < 1:
            raise InputError(f"refresh_every must be at least 1, or None; got {refresh_every!r}")
        super().__init__(model)
        self.estimate = InputEstimate()
        self._of, self._refresh_every = of, refresh_every
        self._rows: dict[tuple[object, ...], list[Rows]] = {}
        self._calls = 0

    def __call__(self, closure: Closure | None, inputs: Tensor | None) -> Measured:
        """Runs the closure, and backward passes as far as they are needed."""
        every, of_inputs = self._refresh_every, self._of != "output"
        refresh = every is not None and (self._calls % every == 0 or not self.estimate.useful)
        # on the way down to the inputs all that is needed of the layers can be had
        watched = refresh or (every is not None and self._of == "input")
        watch = Watch(self._model, measure=refresh, checked=self._checked)
        key, proxies = object(), []
        with (
            _gradient_wanted(inputs) if of_inputs else nullcontext(),
            nullcontext() if self._of == "input" else _outputs_marked(self._model, key),
        ):
            with watch if watched else nullcontext():
                losses = run_closure(closure)
            if of_inputs and inputs is not None and len(inputs) != len(losses):
                raise InputError(
                    f"inputs has {len(inputs)} rows for {len(losses)} losses; give one an example"
                )
            if refresh and len(losses) == 1:
                self._calls += 1
                return _of_one(losses, watch.alone(losses, _trained(self._model)))
            if self._of != "input":
                outputs = _marks(losses, key)
                rows = self._rows_of(losses, outputs, watch if watched else None)
                proxies.append(_lengths(_gradients(losses, outputs), rows))
            if of_inputs:
                assert inputs is not None
                rows = self._rows_of(losses, [inputs], watch if watched else None)
                if watched:
                    gradient = watch.backward(losses, inputs)
                else:
                    (gradient,) = _gradients(losses, [inputs])
                if gradient is None:
                    raise InputError(_NO_INPUT)
                proxies.append(_lengths([gradient], rows))
            elif watched:
                watch.backward(losses)
        self._calls += 1
        lengths = proxies[0] if len(proxies) == 1 else torch.stack(proxies, 1)
        if refresh:
            norms = watch.norms()
            self.estimate.fit(self._calls, lengths, norms)
        elif every is not None:
            norms = self.estimate.estimate(lengths)
        elif len(proxies) == 1:
            norms = lengths
        else:
            norms = torch.stack([_relative(proxy) for proxy in proxies]).mean(0)
        weighted = weighted_losses(losses, self._model)
        if watched:
            weighted = partial(watch.weighted, retain=False)
        return losses.detach(), norms, weighted

    def _rows_of(
        self, losses: Tensor, ends: Sequence[Tensor | GradientEdge], watch: Watch | None
    ) -> list[Rows]:
        # looked for once: for a batch of this size
        shapes = [end.shape if isinstance(end, Tensor) else size_of(end) for end in ends]
        key = (len(losses), type(ends[0]), *shapes)
        if key not in self._rows:
            find = rows_of if watch is None else watch.rows_of
            rows, sure = find(losses, ends)
            if not sure:
                return rows
            self._rows[key] = rows
        return self._rows[key]

    def state(self) -> dict[str, Any]:
        """Returns what a `state_dict` keeps: the line and when it is due."""
        return {"calls": self._calls, "fit": self.estimate.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._calls = state.get("calls", 0)
        self.estimate.load(state.get("fit", []))


class LoopMeasure(Measure):
    """Norms by one backward pass an example, see `loop_norms`; then one more for the gradient."""

    def __call__(self, closure: Closure | None, inputs: Tensor | None) -> Measured:
        """Runs the closure and n backward passes."""
        losses = run_closure(closure)
        norms = loop_norms(losses, _trained(self._model))
        return losses.detach(), norms, weighted_losses(losses, self._model)


def weighted_losses(losses: Tensor, model: nn.Module) -> Weighted:
    """Returns what gives sum_i w_i g_i: the gradient of sum_i w_i l_i, the weights held constant.

    An example that is inf or nan and left out may still reach the gradient of the others.
    """
    return partial(gradients_of, losses, _trained(model))


def _of_one(loss: Tensor, found: dict[Tensor, Tensor]) -> Measured:
    """Measures a single loss, `[1]`, by its gradient."""
    gradients = {p: g.to_dense() for p, g in found.items()}
    norm = norm_of(list(gradients.values()))

    def weighted(weights: Tensor, keep: Tensor | None) -> dict[Tensor, Tensor]:
        # one that is left out may be nan
        w = weights[0]
        return {p: torch.where(w > 0, w.to(g.dtype) * g, 0) for p, g in gradients.items()}

    return loss.detach(), norm[None], weighted


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


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
    if losses is None:
        raise InputError(
            "the closure returns nothing; it must return one loss per example, a tensor [n], and "
            "leave backward() to step(): lambda: F.cross_entropy(model(x), y, reduction='none')"
        )
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not len(losses):
        shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        alone = isinstance(losses, tuple | list | dict)
        remedy = "return the losses alone" if alone else "write reduction='none'"
        if isinstance(losses, Tensor) and losses.dim():
            remedy = (
                "add up those of an example where they are over classes, losses.sum(1), and "
                "average them where they are over pixels, losses.flatten(1).mean(1)"
                if len(losses)
                else "give a batch"
            )
        raise InputError(
            f"the closure must return one loss per example, a tensor [n], not {shape}; {remedy}"
        )
    if not losses.requires_grad:
        raise InputError(
            "the losses do not depend on a trainable parameter; was a no_grad() active?"
        )
    return losses


def refuse_hidden(losses: Tensor, parameters: Sequence[Tensor]) -> None:
    """Refuses parameters whose gradient comes from a backward pass within a function.

    Such a function (a checkpoint with `use_reentrant=True`, a reversible block) adds to `p.grad` by
    itself; the graph of the losses does not lead to the parameters, which would never be trained.

    Raises:
        InputError: If there is one.
    """
    nodes = nodes_under([losses.grad_fn])
    met = {id(getattr(node, "variable", None)) for node in nodes}
    hidden = [p for p in parameters if p.requires_grad and id(p) not in met]
    if not hidden or not any(isinstance(node, BackwardCFunction) for node in nodes):
        return
    kept = [(p, p.grad) for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        losses.sum().backward(retain_graph=True)
        count = sum(p.grad is not None for p in hidden)
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
    if count:
        raise InputError(
            f"{count} parameters get their gradient from a backward pass within a function of the "
            "model, not through the graph of the losses; checkpoints need use_reentrant=False"
        )


@contextmanager
def _gradient_wanted(inputs: Tensor | None) -> Iterator[None]:
    if (
        not isinstance(inputs, Tensor)
        or not (inputs.is_leaf and inputs.is_floating_point())
        or inputs.is_inference()
    ):
        raise InputError(
            "norms='input' (or 'both') needs the images too: optimizer.step(closure, "
            "inputs=x_adv), with x_adv a tensor of floats from outside of the model, such as "
            "x_adv.detach()"
        )
    before = inputs.requires_grad
    inputs.requires_grad_(True)
    try:
        yield
    finally:
        inputs.requires_grad_(before)


@contextmanager
def _outputs_marked(model: nn.Module, key: object) -> Iterator[None]:
    # on the node that made it: an output that no loss depends on is let go with its graph
    def mark(module: nn.Module, args: Any, output: Any) -> None:
        parts = output.values() if isinstance(output, dict) else output
        for part in [output] if isinstance(output, Tensor) else parts:
            if isinstance(part, Tensor) and part.requires_grad:
                edge = get_gradient_edge(part)
                edge.node.metadata[key] = edge.output_nr  # type: ignore[index]

    hook = model.register_forward_hook(mark)
    try:
        yield
    finally:
        hook.remove()


def _marks(losses: Tensor, key: object) -> list[Tensor | GradientEdge]:
    marks: list[Tensor | GradientEdge] = []
    waiting, met = [losses.grad_fn], {losses.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        output = node.metadata.get(key)  # type: ignore[attr-defined]
        if output is not None:
            marks.append(GradientEdge(node, output))
            continue
        for child, _ in node.next_functions:
            if child not in met:
                met.add(child)
                waiting.append(child)
    if not marks:
        raise InputError(_NO_OUTPUT)
    return marks


def _gradients(losses: Tensor, ends: Sequence[Tensor | GradientEdge]) -> list[Tensor | None]:
    ones = torch.ones_like(losses)
    return list(
        torch.autograd.grad(losses, ends, ones, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    )


def _lengths(gradients: Sequence[Tensor | None], rows: Sequence[Rows]) -> Tensor:
    """Returns the lengths of each example's part of some gradients, `[n]`."""
    squares = [
        torch.linalg.vector_norm(
            one.split(gradient).flatten(1),
            dim=1,
            dtype=torch.promote_types(gradient.dtype, torch.float32),
        )
        for gradient, one in zip(gradients, rows, strict=True)
        if gradient is not None
    ]
    if not squares:
        raise InputError(_NO_OUTPUT)
    return squares[0] if len(squares) == 1 else torch.stack(squares).norm(dim=0)


def _relative(proxy: Tensor) -> Tensor:
    # examples that are not finite stay so
    good = proxy.isfinite()
    mean = torch.where(good, proxy, 0).sum() / good.sum().clamp(min=1)
    return proxy / mean.clamp(min=torch.finfo(proxy.dtype).tiny)
