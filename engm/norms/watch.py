"""Example norms: how long is what each example contributes to the gradient of a batch?

`Watch` finds it exactly for all examples in one backward pass; `loop_norms` in one an example.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from engm.errors import InputError, warn
from engm.norms.graph import Call, Graph
from engm.norms.layers import Share, Stored, formula_of
from engm.norms.operations import (
    batch_statistics,
    has_formula,
    name_of,
    one_by_one,
    shares_in,
    taken,
)
from engm.norms.rows import Rows, Summary, probe_weights
from engm.norms.saved import Kept, Reader, hooks_on_saved

_NOTHING = "the losses do not depend on any of the parameters; is it the same model?"
WAY_OUT = "use norms='loop', which takes every model at the price of one backward pass an example"
_DETACH = (
    "give one loss for each image, in the order of the images, and detach what a loss holds of the "
    "whole batch, such as losses.mean()"
)
# Numbers that may be held at once where the gradients of all examples go through a plain part.
_AT_ONCE = 2**26


def loop_norms(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns |g_i|, g_i the gradient of `losses[i]`, with one backward pass an example.

    Obviously correct, but slow: n passes over the graph of the whole batch. It works with every
    model and keeps no more than one gradient at a time. The graph of `losses` survives, so that a
    backward pass can follow.

    Train-mode BatchNorm lets every example of a batch act on the activations of all others; g_i is
    then the gradient of `losses[i]` with the statistics as functions of the whole batch. In every
    case the g_i add up to the gradient of `losses.sum()`.

    Args:
        losses: One loss per example, `[n]`, attached to a graph.
        parameters: The tensors to differentiate by; those the losses do not depend on count zero.

    Returns:
        The norms, `[n]`, in float32, or float64 where the parameters are. Source: this kit.

    Raises:
        InputError: If the losses depend on none of the parameters.
    """
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms.append(norm_of([g for g in gradients if g is not None]))
    return torch.stack(norms)


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the length of an example's gradient, see `loop_norms`."""
    if not gradients:
        raise InputError(_NOTHING)
    sizes = [g.abs() for g in gradients]  # of complex ones, too
    dtype = reduce(torch.promote_types, (size.dtype for size in sizes), torch.float32)
    return torch.stack([size.to(dtype).square().sum() for size in sizes]).sum().sqrt()


def gradients_of(
    losses: Tensor,
    parameters: Sequence[Tensor],
    weights: Tensor,
    keep: Tensor | None,
    retain: bool = False,
) -> dict[Tensor, Tensor]:
    """Returns sum_i w_i g_i, the gradient of sum_i w_i l_i, for the parameters that have one.

    Args:
        losses: l_i, `[n]`.
        parameters: The tensors to differentiate by.
        weights: w_i, held constant; 0 where `keep` is false.
        keep: Which examples count, `[n]` booleans; all where left out. The others may be nan.
        retain: Whether the graph is kept.
    """
    with torch.enable_grad():
        kept = losses if keep is None else torch.where(keep, losses, 0)
        total = (weights.to(losses.dtype) * kept).sum()
    found = torch.autograd.grad(total, parameters, retain_graph=retain, allow_unused=True)
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


@dataclass(frozen=True)
class _Plan:
    """Which rows belong to which example, as far as a probe found out.

    Attributes:
        rows: Of the nodes, by their place in the graph's order: of the calls, and of the operations
            in which a parameter meets the batch.
        unseen: Nodes that no gradient reached, as below a last layer that is zero, or in a block
            that was dropped: what they hold is not known yet.
    """

    rows: dict[int, Rows]
    unseen: frozenset[int] = frozenset()

    @classmethod
    def of(cls, graph: Graph, rows: dict[Node, Rows], unseen: Collection[Node] = ()) -> "_Plan":
        place = {node: k for k, node in enumerate(graph.order)}
        return cls(
            {place[node]: own for node, own in rows.items()},
            frozenset(place[node] for node in unseen if node not in rows),
        )


@dataclass
class Checked:
    """What was found about a model so far, for later steps.

    Attributes:
        plans: For each signature of a graph.
        skip: Layers that no formula holds for.
    """

    plans: dict[tuple[object, ...], _Plan] = field(default_factory=dict)
    skip: set[nn.Module] = field(default_factory=set)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles find it out anew: it is about the nodes of this process."""
        return Checked, ()


class Watch:
    """The shares of all examples in the gradient, from one forward and one backward pass.

        with Watch(model) as watch:
            losses = closure()               # [n]
        watch.backward(losses)               # no gradient of a parameter is formed
        norms = watch.norms()                # |g_i|
        gradients = watch.weighted(weights)  # sum_i w_i g_i for each parameter

    For each layer the input a of the forward pass and the gradient b of its output are a batch of
    rows, and the gradient of the layer's parameters is a sum over the rows. g_i is what the rows of
    example i add to it, its *share*. Where layers treat examples apart (all but BatchNorm in train
    mode) that is the gradient of `losses[i]`. A parameter that no layer's formula reaches (a class
    token, the weights of an attention, a weight that is standardised) is followed through the
    autograd graph to the operation in which it meets the batch, see `engm.norms.operations`.

    BatchNorm in train mode couples the examples: b of row i then holds what all losses say about
    row i, so row i's share counts it as a carrier of all losses, while `loop_norms` counts loss i
    as it reaches through all rows. Both add up to the gradient of `losses.sum()`. `norms` are still
    those of the shares, but `weighted` takes a second backward pass, of the weighted losses: their
    gradient is that of a function, which a weighted sum of shares is not. Shares hold what
    BatchNorm takes off the gradient of the whole batch (its mean, its part along the weights), and
    weights that differ bring it back; a network trained with them may hardly learn.

    Which rows belong to which example is not assumed. The first time, and whenever shapes or the
    layers that are called change, four more backward passes find out: with losses weighted by
    powers of two, a row that belongs to one example alone comes out as many times as large. Then
    the weighted gradient of each parameter is held against autograd's, and the norm of one example
    against its own gradient. With BatchNorm in train mode that is done with the statistics held,
    so that what the statistics themselves carry is not checked. What a layer's formula gets wrong
    is found in the graph instead; where examples meet (a batch norm that is written by hand, losses
    in another order than the images), one example at a time, with a warning where that is slow, or
    an `InputError` where they cannot be told apart.

    Source: this kit; for the formulas see `engm.norms.layers`.

    The model may be called several times in the block, as in TRADES.

    Args:
        model: Its trainable layers are watched while the block runs.
        measure: Whether `norms` will be asked for. Without, that work is spared, and what a layer
            saw is kept instead of its shares.
        checked: What was found about this model before; without it the check is made anew.
    """

    def __init__(
        self, model: nn.Module, measure: bool = True, checked: Checked | None = None
    ) -> None:
        self._checked = Checked() if checked is None else checked
        self._layers, self._owners = _trainable(model, self._checked.skip)
        self._without_formula = _without_formula(model, self._layers, self._owners)
        self._measure = measure
        self._saved = Reader()
        self._hooks: list[Any] = []
        self._key = object()
        self._anew = False  # whether inputs of layers are computed anew in each pass
        self._second: Tensor | None = None  # the losses, if they take a second backward pass
        self._found = _Shares(measure, keep=True)
        self._parameters: list[Tensor] = []

    def __enter__(self) -> "Watch":
        """Begins to watch the layers."""
        for module in self._without_formula:
            end = module.register_forward_hook(self._saved.end, always_call=True)
            self._hooks += [module.register_forward_pre_hook(self._saved.begin), end]
        self._watch_layers()
        return self

    def _watch_layers(self) -> None:
        for layer in self._layers:
            # before all other hooks, which may change the output
            hook = layer.register_forward_hook(self._record, with_kwargs=True, prepend=True)
            self._hooks.append(hook)

    def __exit__(self, *error: object) -> None:
        """Ends to watch them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def backward(self, losses: Tensor, inputs: Tensor | None = None) -> Tensor | None:
        """Runs the backward pass of `losses.sum()` and takes each layer's shares as it goes by.

        Args:
            losses: What the block computed, `[n]`.
            inputs: What the gradient is wanted of, such as the images.

        Returns:
            The gradient of `inputs`, or `None` where there are none or the losses do not depend on
            them.

        Raises:
            InputError: If a layer changed its mode or had its input changed in place afterwards,
                the losses depend on no parameter, or the check finds that norms or gradients are
                not those of autograd.
        """
        graph = self._graph(losses)
        self._refuse(graph)
        self._anew = graph.anew
        with self._during_a_pass():
            graph, plan = self._planned(graph, losses)
            try:
                gradient = self._backward(graph, plan, losses, inputs)
            except _SeenNow:
                graph, plan = self._planned(graph, losses, known=plan)
                gradient = self._backward(graph, plan, losses, inputs)
        for call in graph.calls.values():
            call.a = None
        if self._measure and not self.squares():
            raise InputError(_NOTHING)
        return gradient

    def alone(self, loss: Tensor, parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Returns the gradient of a single loss, `[1]`, whatever the model is."""
        self._anew = self._graph(loss).anew
        with self._during_a_pass():
            return gradients_of(loss, parameters, torch.ones_like(loss), None, retain=True)

    def rows_of(
        self, losses: Tensor, ends: Sequence[Tensor | GradientEdge]
    ) -> tuple[list[Rows], bool]:
        """As `rows_of`, of losses that the block computed."""
        graph = self._graph(losses)
        self._anew = graph.anew
        with self._during_a_pass():
            return rows_of(losses, ends, graph)

    def _backward(
        self, graph: Graph, plan: _Plan, losses: Tensor, inputs: Tensor | None
    ) -> Tensor | None:
        self._parameters = graph.parameters()
        self._second = losses if graph.coupled or graph.anew else None
        self._found = _Shares(self._measure, keep=self._second is None)
        return self._collect(graph, plan, losses, self._found, inputs)

    def _graph(self, losses: Tensor) -> Graph:
        return Graph(losses.grad_fn, self._key, self._owners, self._checked.skip)

    def norms(self) -> Tensor:
        """Returns |g_i|, `[n]`, in float32, or float64 where the model's passes are."""
        return self._found.norms().detach()  # what a layer saw may have a graph

    def squares(self) -> dict[Tensor, Tensor]:
        """Returns |g_i|^2 of each parameter that had a part in the losses, `[n]`."""
        return dict(self._found.squares)

    def weighted(
        self, weights: Tensor, keep: Tensor | None = None, *, retain: bool = True
    ) -> dict[Tensor, Tensor]:
        """Returns sum_i w_i g_i for each parameter that had a part in the losses.

        Args:
            weights: w_i, `[n]`; 0 where `keep` is false.
            keep: Which examples count, `[n]` booleans; all where left out. The others may be nan.
            retain: Whether the graph is kept for another call.
        """
        if self._second is None:
            return self._found.weighted(weights, keep, retain)
        with self._during_a_pass():
            return gradients_of(self._second, self._parameters, weights, keep, retain=retain)

    # --- one backward pass

    @contextmanager
    def _during_a_pass(self) -> Iterator[None]:
        # what is under a checkpoint runs again in a pass, and has to save what it saved before
        if self._anew:
            self._watch_layers()
        try:
            yield
        finally:
            self.__exit__()

    def _collect(
        self,
        graph: Graph,
        plan: _Plan,
        losses: Tensor,
        found: "_Shares",
        inputs: Tensor | None = None,
    ) -> Tensor | None:
        """Fills `found`; returns the gradient of `inputs`."""
        rows = {graph.order[k]: value for k, value in plan.rows.items()}
        unseen = {graph.order[k] for k in plan.unseen}
        parts = _parts(graph, rows, unseen)
        places = {place: part for part in parts for place in part.places}
        left: dict[tuple[Node, int], Sequence[Tensor | None]] = {}
        waiting = Counter(call.layer for call in graph.calls.values())
        seen: dict[nn.Module, list[tuple[Tensor, Tensor, Rows]]] = defaultdict(list)
        zero: list[Node] = []
        check = found.at_once is not None
        retain = check or not found.keep or bool(unseen or parts)

        def arrive(node: Node, gradients: Sequence[Tensor | None]) -> None:
            there = [b for b in gradients if b is not None]
            if node in unseen and there:
                if any(bool(b.any()) for b in there):
                    raise _SeenNow
                zero.append(node)
            call = graph.calls.get(node)
            if call is None:
                for slot in range(len(node.next_functions)):
                    part = places.get((node, slot))
                    if part is None or not there:
                        continue
                    factors = not part.push or not found.measure
                    with self._saved.reading():
                        share = shares_in(node, slot, gradients, rows[node], factors)
                    if share is None:
                        left[node, slot] = gradients
                    else:
                        part.shares[node, slot] = share
                return
            b = gradients[call.output]
            if b is not None:
                a = call.input()  # or it is held until the graph is let go
                if not retain:
                    call.a = None  # let go with the share, as the graph lets it go
                if node in rows:
                    seen[call.layer].append((a, b.reshape(call.shape), rows[node]))
            waiting[call.layer] -= 1
            if not waiting[call.layer] and seen[call.layer]:
                found.take(call.layer, seen.pop(call.layer))

        nodes = [*dict.fromkeys([*graph.calls, *(node for node, _ in places), *unseen])]
        ends = [] if inputs is None else [inputs]
        ones = torch.ones_like(losses)
        gradients = _pass(graph, losses, ones, nodes, arrive, ends, retain, held=check, stop=True)
        for (node, slot), outputs in left.items():
            with self._saved.reading():
                share = one_by_one(node, slot, outputs, rows[node])
            places[node, slot].shares[node, slot] = share
        self._saved.let_go()
        for part in parts:
            if part.shares:
                found.add(part, graph)
        if zero:
            found.add_zeros(graph.parameters_at(zero), len(losses))
        return None if inputs is None else gradients[-1]

    def _record(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        # under functional_call a layer has other parameters than the model
        if not output.requires_grad or not all(p in self._owners for p in _own(layer)):
            return
        a = args[0] if args else kwargs["input"]
        # The node, not the tensor: it stays that of this layer if the output is changed in place.
        # If the output is a view, such a change replaces its node, but not that of its base.
        edge = get_gradient_edge(output if output._base is None else output._base)
        above = get_gradient_edge(a).node if a.requires_grad else None
        kept: Any = a.detach()
        if hooks_on_saved() is not None:
            kept = Kept.apply(torch.empty(0, requires_grad=True), kept).grad_fn
        call = Call(layer, layer.training, kept, a._version, above, edge.output_nr, output.shape)
        # Kept by the node itself: what no loss leads to is let go with its graph.
        edge.node.metadata[self._key] = call  # type: ignore[index]

    def _refuse(self, graph: Graph) -> None:
        if not graph.calls and not graph.leaves:
            raise InputError(_NOTHING)
        outside = [*graph.takers(), *graph.plain]
        if any(name_of(node) == "CompiledFunction" for node in outside):
            raise InputError(
                f"the model is compiled; give the uncompiled one in the closure, or {WAY_OUT}"
            )
        if any(parameter.is_complex() for parameter in graph.parameters()):
            raise InputError(f"a parameter is complex, which these norms are not for; {WAY_OUT}")
        if any(getattr(node, "_saved_sparse", False) for node in outside):
            raise InputError(
                "an embedding has sparse gradients, in which the examples cannot be told apart; "
                f"make it with sparse=False, or {WAY_OUT}"
            )
        for call in graph.calls.values():
            name = self._layers[call.layer]
            if call.training != call.layer.training:
                raise InputError(
                    f"layer {name!r} was put from train into eval mode, or back, "
                    f"while the losses were computed; keep one mode, or {WAY_OUT}"
                )
            if isinstance(call.a, Tensor) and call.a._version != call.version:
                raise InputError(
                    f"the input of layer {name!r} was changed in place after the layer had seen "
                    "it; change a copy instead"
                )

    # --- the check

    def _planned(
        self, graph: Graph, losses: Tensor, known: _Plan | None = None
    ) -> tuple[Graph, _Plan]:
        # `known` is a plan in which a gradient has now reached what none had reached before
        checked, key = self._checked, (len(losses), *graph.signature())
        if key in checked.plans and known is None:
            return graph, checked.plans[key]
        if losses.is_meta:  # has no numbers to look at
            nodes = [*graph.calls, *graph.takers()]
            return graph, _Plan.of(graph, dict.fromkeys(nodes, Rows(0, len(losses))))
        plan, sure, wrong = self._probe(graph, losses, known)
        if wrong:
            checked.skip |= wrong
            return self._planned(self._graph(losses), losses)
        if sure:
            checked.plans[key] = plan
        return graph, plan

    def _probe(
        self, graph: Graph, losses: Tensor, known: _Plan | None
    ) -> tuple[_Plan, bool, set[nn.Module]]:
        """Returns a plan, whether it will do for later steps, and layers with a wrong formula."""
        n, weights = len(losses), probe_weights(losses)
        parameters = graph.parameters()
        inner = [node for node in graph.plain if node not in graph.leaves]
        nodes = [*graph.calls, *graph.takers(), *inner]

        def summed_up(factor: Tensor) -> tuple[dict[Node, Summary], list[Tensor | None]]:
            seen: dict[Node, Summary] = {}

            def note(node: Node, found: Sequence[Tensor | None]) -> None:
                there = [b for b in found if b is not None]
                # of several outputs, one that the losses depend on
                b = next((b for b in there if bool(b.any())), there[0] if there else None)
                call = graph.calls.get(node)
                if call is not None and call.anew:
                    call.input()  # or it is held until the graph is let go
                if b is not None:
                    seen[node] = Summary.of(b if call is None else b.reshape(call.shape), n)

            gradients = _pass(graph, losses, factor, nodes, note, parameters)
            return seen, gradients

        plain, _ = summed_up(torch.ones_like(weights))
        probe, gradients = summed_up(weights)
        rows = {graph.order[k]: value for k, value in known.rows.items()} if known else {}
        sure = bool(losses.isfinite().all())
        unseen = {node for node in nodes if node not in plain}
        tables = graph.tables()
        wrong: set[nn.Module] = set()
        for node, summary in plain.items():
            if node in rows or node in tables:
                continue
            if summary.empty:
                unseen.add(node)
                continue
            found, certain = summary.rows(probe[node], weights)
            call = graph.calls.get(node)
            if found is not None:
                rows[node] = found
                sure = sure and certain
            elif call is not None:
                wrong.add(call.layer)
            elif node not in graph.plain:
                raise InputError(
                    f"in the operation {name_of(node)!r}, in which a parameter meets the batch, "
                    f"the examples cannot be told apart; {WAY_OUT}"
                )
        plan = _Plan.of(graph, rows, unseen)
        wanted = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        return plan, sure, wrong or self._compare(graph, plan, losses, weights, wanted)

    def _compare(
        self,
        graph: Graph,
        plan: _Plan,
        losses: Tensor,
        weights: Tensor,
        wanted: dict[Tensor, Tensor],
    ) -> set[nn.Module]:
        """Holds weighted gradients and one norm against autograd's."""
        found = _Shares(measure=True, keep=False, at_once=weights)
        self._collect(graph, plan, losses, found)
        if not wanted:
            return set()
        tolerance, eps = _tolerance(losses, wanted)
        rounding = 10 * eps * torch.stack([g.norm() for g in wanted.values()]).norm()
        layers = {p: call.layer for call in graph.calls.values() for p in _own(call.layer)}
        wrong: set[nn.Module] = set()
        for parameter, gradient in wanted.items():
            if not bool(gradient.isfinite().all()):
                continue
            off, size = gradient, gradient.norm()
            if parameter in found.sums:
                each = found.squares[parameter].sqrt()
                off, size = found.sums[parameter] - gradient, size + (weights * each).sum()
            if bool(off.norm() <= tolerance * size + rounding):
                continue
            if parameter not in layers:
                raise InputError(
                    f"the part of the examples in the gradient of {self._owners[parameter]!r} "
                    f"is not the one that autograd finds; {_DETACH}, or {WAY_OUT}"
                )
            wrong.add(layers[parameter])
        if wrong or not found.squares:
            return wrong
        self._warn(graph, found.parts, len(losses))
        norms = found.norms()
        if not bool(norms.isfinite().all()):
            return wrong
        most = int(norms.argmax())
        only = torch.zeros_like(losses)
        only[most] = 1
        passed = _pass(graph, losses, only, *_let_go(graph), list(wanted))
        norm = torch.stack([g.to(norms.dtype).norm() for g in passed if g is not None]).norm()
        if bool((norm - norms[most]).abs() > tolerance * norm):
            raise InputError(
                f"the norm of example {most}, {float(norms[most]):.4g}, is not that of its "
                f"gradient, {float(norm):.4g}; {WAY_OUT}"
            )
        return wrong

    def _warn(self, graph: Graph, parts: "list[_Part]", n: int) -> None:
        leaves = {p for part in parts if not part.fast(graph, n) for p in part.leaves.values()}
        slow = [name for parameter, name in self._owners.items() if parameter in leaves]
        if slow:
            names = ", ".join(slow[:3]) + (f" and {len(slow) - 3} more" if len(slow) > 3 else "")
            warn(
                f"the norms of {names} are found one example at a time, which is slow: there is "
                "no formula for where they are used, a checkpoint makes something of them, or "
                f"examples meet on the way to the losses ({_DETACH})"
            )


class _SeenNow(InputError):
    """A gradient has reached what none had reached when the rows were looked for."""

    def __init__(self) -> None:
        super().__init__(
            "a gradient reaches a part of the model that it does not reach while the statistics of "
            f"batch norms are held; {WAY_OUT}"
        )


class _Shares:
    """The shares of the examples in all parameters.

    Args:
        measure: Whether their lengths are asked for.
        keep: Whether the shares themselves are kept.
        at_once: Weights for which the sums are formed at once.

    Attributes:
        shares: In the parameters of watched layers, where they are kept.
        parts: In all others.
        squares: Their squares, of each parameter, `[n]`.
        sums: Their sums with the weights `at_once`.
        zeros: Parameters whose gradient is zero, as nothing has reached them yet.
    """

    def __init__(self, measure: bool, keep: bool, at_once: Tensor | None = None) -> None:
        self.measure, self.keep, self.at_once = measure, keep, at_once
        self.shares: dict[Tensor, Share] = {}
        self.parts: list[_Part] = []
        self.squares: dict[Tensor, Tensor] = {}
        self.sums: dict[Tensor, Tensor] = {}
        self.zeros: list[Tensor] = []

    def take(self, layer: nn.Module, calls: list[tuple[Tensor, Tensor, Rows]]) -> None:
        if not (self.measure or self.keep):
            return
        formula = formula_of(layer)
        assert formula is not None
        for name, share in formula(layer, calls, self.measure).items():
            parameter = getattr(layer, name)
            if self.measure:
                self.squares[parameter] = share.squares()
            if self.at_once is not None:
                self.sums[parameter] = share.weighted(self.at_once, None)
            if self.keep:
                self.shares[parameter] = share

    def add(self, part: "_Part", graph: Graph) -> None:
        self.parts.append(part)
        if self.measure:
            self.squares |= part.squares(graph)
        if self.at_once is not None:
            self.sums |= part.weighted(self.at_once, None)
        if not self.keep:
            part.shares.clear()

    def add_zeros(self, parameters: Iterable[Tensor], n: int) -> None:
        """Takes in parameters of which nothing else is known."""
        known = {
            *self.shares,
            *self.squares,
            *(p for part in self.parts for p in part.leaves.values()),
        }
        self.zeros = [p for p in parameters if p not in known]
        if self.measure:
            for p in self.zeros:
                dtype = torch.promote_types(p.dtype, torch.float32)
                self.squares[p] = p.new_zeros(n, dtype=dtype)

    def norms(self) -> Tensor:
        return torch.stack(list(self.squares.values())).sum(0).sqrt()

    def weighted(self, weights: Tensor, keep: Tensor | None, retain: bool) -> dict[Tensor, Tensor]:
        total = {p: share.weighted(weights, keep) for p, share in self.shares.items()}
        for part in self.parts:
            total |= part.weighted(weights, keep, retain)
        return total | {p: torch.zeros_like(p) for p in self.zeros}


@dataclass
class _Part:
    """Parameters that are used outside of layers with a formula, and the operations they are in.

    Attributes:
        places: The operations, and which of their inputs the parameters lead to.
        leaves: The parameters, with those that are used together with them.
        push: Whether something is computed from the parameters before they meet the batch.
        shares: Of the examples, in each of the inputs.
    """

    places: list[tuple[Node, int]]
    leaves: dict[Node, Tensor]
    push: bool
    shares: dict[tuple[Node, int], Share] = field(default_factory=dict)

    def weighted(
        self, weights: Tensor, keep: Tensor | None, retain: bool = True
    ) -> dict[Tensor, Tensor]:
        totals = [share.weighted(weights, keep) for share in self.shares.values()]
        return self._passed_on(totals, retain=retain)

    def squares(self, graph: Graph) -> dict[Tensor, Tensor]:
        shares = list(self.shares.values())
        if not self.push:
            return {p: shares[0].squares() for p in self.leaves.values()}
        each = [share.shares for share in shares if isinstance(share, Stored)]
        if self._at_once(graph, len(each[0])):
            passed = self._passed_on(each, batched=True)
            return {p: Stored(g).squares() for p, g in passed.items()}
        rows = [
            {p: Stored(g[None]).squares() for p, g in self._passed_on(one).items()}
            for one in zip(*each, strict=True)
        ]
        return {p: torch.cat([row[p] for row in rows]) for p in rows[0]}

    def fast(self, graph: Graph, n: int) -> bool:
        """Whether all n examples are done at once."""
        formulas = all(has_formula(node, slot) for node, slot in self.places)
        return formulas and (not self.push or self._at_once(graph, n))

    def _at_once(self, graph: Graph, n: int) -> bool:
        size = sum(graph.size_under(taken(node, slot)) for node, slot in self.places)
        # what a checkpoint computes anew in a pass may not run for all at once
        return not graph.anew and n * size <= _AT_ONCE

    def _passed_on(
        self, totals: Sequence[Tensor], batched: bool = False, retain: bool = True
    ) -> dict[Tensor, Tensor]:
        # the gradients of the parameters, from those of what was computed from them
        parameters = list(self.leaves.values())
        gradients = torch.autograd.grad(
            [taken(node, slot) for node, slot in self.shares],
            parameters,
            totals,
            retain_graph=retain,
            is_grads_batched=batched,
            allow_unused=True,
        )
        return {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}


def _own(layer: nn.Module) -> list[Tensor]:
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


def _parts(graph: Graph, rows: dict[Node, Rows], unseen: Collection[Node]) -> list[_Part]:
    """Groups the operations in which parameters meet the batch by the parameters."""
    parts: list[_Part] = []
    for node in graph.order:
        if node in graph.calls or node not in rows:
            continue
        for slot, (child, _) in enumerate(node.next_functions):
            if child in graph.plain and child not in rows and child not in unseen:
                leaves = graph.leaves_under(child)
                push = len(leaves) > 1 or not graph.reorders(child)
                part = _Part([(node, slot)], leaves, push)
                for other in [p for p in parts if p.leaves.keys() & part.leaves.keys()]:
                    parts.remove(other)
                    part = _Part(other.places + part.places, other.leaves | part.leaves, True)
                parts.append(part)
    return parts


def _pass(
    graph: Graph,
    losses: Tensor,
    weights: Tensor,
    nodes: Sequence[Node],
    arrive: Callable[[Node, Sequence[Tensor | None]], None],
    ends: Sequence[Tensor | GradientEdge],
    retain: bool = True,
    held: bool = True,
    stop: bool = False,
) -> list[Tensor | None]:
    """Runs a backward pass that tells `arrive` the gradients of the outputs of `nodes`.

    Args:
        graph: Of the losses.
        losses: `[n]`.
        weights: Of the losses, `[n]`.
        nodes: All of them lie on the way to `ends`, unless the pass is to `stop`.
        arrive: Called before a node runs.
        ends: What the gradient is wanted of.
        retain: Whether the graph is kept.
        held: Whether batch norms pass gradients on as if their statistics were constants.
        stop: Go no further than to the last of `nodes`, so that no gradient of a weight is formed,
            unless it lies on the way to `ends`.

    Returns:
        The gradients of `ends`.
    """
    last = graph.ends(nodes) if stop else []
    hooks = [
        node.register_prehook(lambda gradients, node=node: arrive(node, gradients))
        for node in nodes
        if node not in last
    ]
    if held:
        hooks += [node.register_hook(partial(_held, node)) for node in graph.batch_norms()]
    edges = [GradientEdge(node, k) for node in last for k in range(len(node._input_metadata))]
    try:
        with torch.no_grad():
            gradients = torch.autograd.grad(
                losses,
                [*edges, *ends],  # type: ignore[arg-type]
                weights,
                retain_graph=retain,
                allow_unused=True,
            )
            rest = iter(gradients)
            for node in last:
                arrive(node, list(islice(rest, len(node._input_metadata))))
    finally:
        # a hook holds the node that it is on: let go, or neither is ever freed
        for hook in hooks:
            hook.remove()
    return list(rest)


def _let_go(graph: Graph) -> tuple[list[Node], Callable[[Node, Sequence[Tensor | None]], None]]:
    """Returns for `_pass` what lets go the inputs of layers that are computed anew."""

    def arrive(node: Node, _: Sequence[Tensor | None]) -> None:
        graph.calls[node].input()  # or it is held until the graph is let go

    return [node for node, call in graph.calls.items() if call.anew], arrive


def rows_of(
    losses: Tensor, ends: Sequence[Tensor | GradientEdge], graph: Graph | None = None
) -> tuple[list[Rows], bool]:
    """Finds which rows of tensors belong to which loss, by a probe with batch statistics held.

    Args:
        losses: `[n]`, attached to their graph, which is kept.
        ends: What the losses depend on, such as the images.
        graph: Of the losses, where they were computed under a `Watch`.

    Returns:
        The rows, for each of `ends`, and whether there was something to see in all of them.

    Raises:
        InputError: If a row belongs to several losses.
    """
    n, weights = len(losses), probe_weights(losses)
    if losses.is_meta:
        return [Rows(0, n) for _ in ends], True
    if graph is None:
        graph = Graph(losses.grad_fn, object(), {})
    both = [
        _pass(graph, losses, factor, *_let_go(graph), ends)
        for factor in (torch.ones_like(weights), weights)
    ]
    found, sure = [], bool(losses.isfinite().all())
    for plain, probe in zip(*both, strict=True):
        rows: Rows | None = Rows(0, n)
        if plain is None:
            sure = False
        elif not bool(plain.any()):
            rows, sure = next(Summary.of(plain, n).candidates(n), rows), False
        else:
            rows, certain = Summary.of(plain, n).rows(Summary.of(probe, n), weights)
            sure = sure and certain
        if rows is None:
            raise InputError(
                "what one loss says of the inputs or outputs cannot be told from what the others "
                f"say: give losses in the order of the images, one for each, or {WAY_OUT}"
            )
        found.append(rows)
    return found, sure


def _held(node: Any, gradients: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> Any:
    first, b = gradients[0], outputs[0]
    if first is None:
        return None
    factor = batch_statistics(node)[1]
    if node._saved_weight is not None:
        factor = factor * node._saved_weight
    scaled = b * factor.view(-1, *[1] * (b.dim() - 2))
    return (scaled.to(first.dtype), *gradients[1:])


def _tolerance(losses: Tensor, parameters: Iterable[Tensor]) -> tuple[float, float]:
    """Returns how far off two ways to the same may be, and the rounding of a single number."""
    if torch.is_autocast_enabled(losses.device.type):
        dtype = torch.get_autocast_dtype(losses.device.type)
    else:
        dtype = min((p.dtype for p in parameters), key=lambda d: d.itemsize)
    # TF32 rounds to 1e-3
    tolerances = {torch.float64: 1e-7, torch.float32: 3e-3}
    return tolerances.get(dtype, 0.1), torch.finfo(dtype).eps


def _without_formula(
    model: nn.Module, layers: Iterable[nn.Module], owners: Mapping[Tensor, str]
) -> list[nn.Module]:
    """Returns the modules that hold, or whose parts hold, parameters of no watched layer."""
    known = {p for layer in layers for p in layer.parameters(recurse=False)}
    names = [name.split(".") for parameter, name in owners.items() if parameter not in known]
    paths = {".".join(name[:k]) for name in names for k in range(len(name))}
    return [module for path, module in model.named_modules() if path in paths] if paths else []


def _trainable(
    model: nn.Module, skip: set[nn.Module]
) -> tuple[dict[nn.Module, str], dict[Tensor, str]]:
    """Returns the layers to watch and all trainable parameters, with their names."""
    layers: dict[nn.Module, str] = {}
    owners: dict[Tensor, str] = {}
    shared: set[Tensor] = set()
    for name, module in model.named_modules():
        own = [(k, p) for k, p in module.named_parameters(recurse=False) if p.requires_grad]
        for kind, parameter in own:
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise InputError(
                    f"{name}.{kind} has a hook on its gradient, which no gradient of an example "
                    f"passes by; remove it, or {WAY_OUT}"
                )
            shared |= {parameter} & owners.keys()
            owners.setdefault(parameter, f"{name}.{kind}".lstrip("."))
        if own and module not in skip and formula_of(module) is not None:
            layers[module] = name
    for layer in [layer for layer in layers if not shared.isdisjoint(layer.parameters(False))]:
        del layers[layer]
    return layers, owners
