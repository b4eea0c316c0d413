"""Example norms: how long is what each example contributes to the gradient of a batch?

`Watch` finds it exactly for all examples in one backward pass; `loop_norms` in one an example.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from engm.errors import InputError
from engm.norms.layers import FORMULAS, Share, shares_of

_NOTHING = "the losses do not depend on any of the parameters; is it the same model?"
_WAY_OUT = "use norms='loop', which takes any model but one backward pass an example"


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
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            raise InputError(_NOTHING)
        squares = [g.to(dtype).square().sum() for g in gradients if g is not None]
        norms.append(torch.stack(squares).sum().sqrt())
    return torch.stack(norms)


@dataclass(frozen=True)
class _Call:
    layer: nn.Module
    training: bool
    a: Tensor  # its input
    version: int  # of a; counts the changes in place
    above: Node | None  # what made a
    edge: GradientEdge  # out of the layer
    shape: torch.Size  # of its output


class Watch:
    """The shares of all examples in the gradient, from one forward and one backward pass.

        with Watch(model) as watch:
            losses = closure()               # [n]
        watch.backward(losses)               # no gradient of a parameter is formed
        norms = watch.norms()                # |g_i|
        gradients = watch.weighted(weights)  # sum_i w_i g_i for each parameter

    For each layer the input a of the forward pass and the gradient b of its output are a batch of
    rows, and the gradient of the layer's parameters is a sum over the rows. g_i is row i's *share*
    of it. Where layers treat examples apart (Linear, Conv2d, GroupNorm, LayerNorm, InstanceNorm,
    BatchNorm in eval mode) that is the gradient of `losses[i]`.

    BatchNorm in train mode couples the examples: b of row i then holds what all losses say about
    row i, so row i's share counts it as a carrier of all losses, while `loop_norms` counts loss i
    as it reaches through all rows. Both add up to the gradient of `losses.sum()`. `norms` are still
    those of the shares, but `weighted` takes a second backward pass, of the weighted losses: their
    gradient is that of a function, which a weighted sum of shares is not. Shares hold what
    BatchNorm takes off the gradient of the whole batch (its mean, its part along the weights), and
    weights that differ bring it back; a network trained with them may hardly learn.

    Source: this kit; for the formulas see `layer_shares`.

    The model may be called several times in the block, as in TRADES.

    Args:
        model: Its trainable layers are watched while the block runs.
        measure: Whether `norms` will be asked for. Without, that work is spared, and what a layer
            saw is kept instead of its shares.

    Raises:
        InputError: If a trainable parameter belongs to a layer that there is no formula for, or to
            two layers.
    """

    def __init__(self, model: nn.Module, measure: bool = True) -> None:
        self._layers, self._owners = _trainable_layers(model)
        self._model, self._measure = model, measure
        self._hooks: list[Any] = []
        self._calls: dict[Node, _Call] = {}
        self._coupled: Tensor | None = None  # the losses, where their examples are
        self._shares: dict[Tensor, Share | None] = {}
        self._squares: dict[Tensor, Tensor] = {}

    def __enter__(self) -> "Watch":
        """Begins to watch the layers."""
        for layer in self._layers:
            # before all other hooks, which may change the output
            hook = layer.register_forward_hook(self._record, with_kwargs=True, prepend=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        """Ends to watch them."""
        for hook in self._hooks:
            hook.remove()

    def backward(self, losses: Tensor, inputs: Tensor | None = None) -> Tensor | None:
        """Runs the backward pass of `losses.sum()` and takes each layer's shares as it goes by.

        Args:
            losses: What the block computed, `[n]`.
            inputs: What the gradient is wanted of, such as the images.

        Returns:
            The gradient of `inputs`, or `None` where there are none or the losses do not depend on
            them.

        Raises:
            InputError: If a parameter was used outside of its layer, a layer saw another number of
                rows than there are losses, changed its mode, or had its input changed in place
                afterwards, or the losses depend on no parameter.
        """
        self._check(losses)
        if not self._calls:
            raise InputError(_NOTHING)
        self._coupled = losses if any(map(_couples, self._model.modules())) else None
        waiting = Counter(call.layer for call in self._calls.values())
        seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)

        def arrive(node: Node, b: Tensor | None) -> None:
            call = self._calls.pop(node)
            if b is not None:
                seen[call.layer].append((call.a, b.reshape(call.shape)))
            waiting[call.layer] -= 1
            if not waiting[call.layer] and seen[call.layer]:
                self._take(call.layer, seen.pop(call.layer))

        roots: list[GradientEdge] = []
        others: list[GradientEdge] = []
        for call in self._calls.values():
            (roots if self._is_root(call) else others).append(call.edge)
        hooks = [
            edge.node.register_prehook(
                lambda gradients, edge=edge: arrive(edge.node, gradients[edge.output_nr])
            )
            for edge in others
        ]
        # As far as the first layers' outputs: no gradient of a weight lies on the way there.
        ends: list[Any] = roots + ([] if inputs is None else [inputs])
        try:
            with torch.no_grad():
                ones = torch.ones_like(losses)
                again = self._coupled is not None
                found = torch.autograd.grad(
                    losses, ends, ones, retain_graph=again, allow_unused=True
                )
                for edge, b in zip(roots, found, strict=False):
                    arrive(edge.node, b)
        finally:
            # a hook holds the node that it is on: let go, or neither is ever freed
            for hook in hooks:
                hook.remove()
        if not self._shares:
            raise InputError(_NOTHING)
        return None if inputs is None else found[-1]

    def norms(self) -> Tensor:
        """Returns |g_i|, `[n]`, in float32, or float64 where the model's passes are."""
        return torch.stack(list(self._squares.values())).sum(0).sqrt()

    def squares(self) -> dict[Tensor, Tensor]:
        """Returns |g_i|^2 of each parameter that had a part in the losses, `[n]`."""
        return dict(self._squares)

    def weighted(self, weights: Tensor, keep: Tensor | None = None) -> dict[Tensor, Tensor]:
        """Returns sum_i w_i g_i for each parameter that had a part in the losses.

        Args:
            weights: w_i, `[n]`; 0 where `keep` is false.
            keep: Which examples count, `[n]` booleans; all where left out. The others may be nan.
        """
        if self._coupled is None:
            return {p: s.weighted(weights, keep) for p, s in self._shares.items() if s is not None}
        with torch.enable_grad():
            losses = self._coupled if keep is None else torch.where(keep, self._coupled, 0)
            total = (weights.to(losses.dtype) * losses).sum()
        found = torch.autograd.grad(total, list(self._shares), retain_graph=True, allow_unused=True)
        return {p: g for p, g in zip(self._shares, found, strict=True) if g is not None}

    def _take(self, layer: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> None:
        if self._coupled is not None and not self._measure:
            own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
            self._shares.update(dict.fromkeys(own))
            return
        for name, share in shares_of(layer, calls, self._measure).items():
            parameter = getattr(layer, name)
            self._shares[parameter] = share if self._coupled is None else None
            if self._measure:
                self._squares[parameter] = share.squares()

    def _record(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        # under functional_call a layer has other parameters than the model
        if not output.requires_grad or not all(p in self._owners for p in own):
            return
        a = args[0] if args else kwargs["input"]
        above = get_gradient_edge(a).node if a.requires_grad else None
        # The edge, not the tensor: it stays that of this layer if the output is changed in place.
        # If the output is a view, such a change replaces its edge, but not that of its base.
        edge = get_gradient_edge(output if output._base is None else output._base)
        self._calls[edge.node] = _Call(
            layer, layer.training, a.detach(), a._version, above, edge, output.shape
        )

    def _is_root(self, call: _Call) -> bool:
        # whether no watched layer lies above this one
        return not any(node in self._calls for node in _graph(call.above, self._calls))

    def _check(self, losses: Tensor) -> None:
        met = set(_graph(losses.grad_fn, self._calls))
        # other calls had no part in the losses
        self._calls = {node: call for node, call in self._calls.items() if node in met}
        for call in self._calls.values():
            name, rows = self._layers[call.layer], len(call.a)
            if call.training != call.layer.training:
                raise InputError(
                    f"layer {name!r} was put from train into eval mode, or back, "
                    f"while the losses were computed; keep one mode, or {_WAY_OUT}"
                )
            if rows != len(losses):
                raise InputError(
                    f"layer {name!r} saw {rows} rows for {len(losses)} losses; "
                    f"give the model one row an example, in each call, or {_WAY_OUT}"
                )
            if call.a._version != call.version:
                raise InputError(
                    f"the input of layer {name!r} was changed in place after the layer had seen "
                    "it; change a copy instead"
                )
        for node in met:
            # the walk steps over the layers, so nothing of theirs is to be met
            parameter = getattr(node, "variable", None)
            if parameter in self._owners:
                raise InputError(
                    f"{self._owners[parameter]} was used, but not by calling its layer; if the "
                    f"model is compiled, give the uncompiled one; otherwise {_WAY_OUT}"
                )


def _couples(module: nn.Module) -> bool:
    # its statistics are those of the batch
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or module.running_mean is None)


def _trainable_layers(model: nn.Module) -> tuple[dict[nn.Module, str], dict[Tensor, str]]:
    layers: dict[nn.Module, str] = {}
    owners: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        own = [(k, p) for k, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        if type(module) not in FORMULAS or not {k for k, _ in own} <= {"weight", "bias"}:
            raise InputError(
                f"there is no formula for {type(module).__name__} {name!r}; {_WAY_OUT}"
            )
        for kind, parameter in own:
            if parameter in owners:
                raise InputError(
                    f"{owners[parameter]!r} and '{name}.{kind}' are one parameter; {_WAY_OUT}"
                )
            owners[parameter] = f"{name}.{kind}".lstrip(".")
        layers[module] = name
    return layers, owners


def _graph(start: Node | None, calls: Mapping[Node, _Call]) -> Iterator[Node]:
    """Yields `start` and all nodes that it leads to; from the output of a call on to its input."""
    waiting, met = [start], {start}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        step = [calls[node].above] if node in calls else [n for n, _ in node.next_functions]
        for below in step:
            if below not in met:
                met.add(below)
                waiting.append(below)
