"""The autograd graph of the losses, as far as example norms need it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from engm.norms.operations import name_of, size_of

# Operations that only put the numbers of a single input in another order or type.
_REORDER = {
    *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"),
    *("ToCopy", "Clone", "Alias"),
}
_LOOK_UPS = {"Embedding", "EmbeddingBag"}
_BATCH_NORMS = {"NativeBatchNorm", "CudnnBatchNorm"}


@dataclass
class Call:
    """What is known of a call of a layer; it lives as long as the node of its output.

    Attributes:
        layer: The layer.
        training: Whether it was in train mode.
        a: Its input; where a checkpoint (or another hook on what autograd saves) is to keep it, the
            node that asks for it; `None` once nobody needs it.
        version: Of a; counts the changes in place.
        above: What made a.
        output: Which of the node's outputs was the layer's.
        shape: Of the output.
    """

    layer: nn.Module
    training: bool
    a: Tensor | Node | None
    version: int
    above: Node | None
    output: int
    shape: torch.Size

    @property
    def anew(self) -> bool:
        """Whether the input is not kept, but computed or fetched anew."""
        return not isinstance(self.a, Tensor)

    def input(self) -> Tensor:
        """Returns the input; where it is not kept, that is possible once in a backward pass."""
        a: Any = self.a
        return a.saved_tensors[0] if self.anew else a


class Graph:
    """The nodes from the losses down to the parameters, stepping over the layers that are watched.

    A node is *plain* if nothing but parameters goes into it that has a gradient: a weight that is
    standardised, a table that is interpolated; or a first operation on the images.

    Args:
        start: The node of the losses.
        key: Under which a node's metadata hold its `Call`.
        owners: The model's trainable parameters.
        skip: Layers that count as if they were not watched.

    Attributes:
        order: All nodes, each after those that it leads to.
        calls: Those of watched layers.
        leaves: Of the parameters that are used outside of watched layers.
        plain: The plain nodes, leaves among them; empty where there are no leaves.
        coupled: Whether a batch norm takes its statistics from the examples.
        anew: Whether inputs of layers are computed anew, as under a checkpoint.
    """

    def __init__(
        self,
        start: Node | None,
        key: object,
        owners: Mapping[Tensor, str],
        skip: Iterable[nn.Module] = (),
    ) -> None:
        self._key, self._skip = key, set(skip)
        self.calls: dict[Node, Call] = {}
        self.leaves: dict[Node, Tensor] = {}
        self.order: list[Node] = []
        self._walk(start)
        for node in self.order:
            parameter: Any = getattr(node, "variable", None)
            if parameter in owners:
                self.leaves[node] = parameter
        self.plain = self._plain() if self.leaves else set()
        self.coupled = any(_couples(call.layer) for call in self.calls.values()) or any(
            map(_takes_statistics, self.order)
        )
        self.anew = any(call.anew for call in self.calls.values())

    def signature(self) -> tuple[object, ...]:
        """Returns what tells this graph from another: its calls, shapes and kinds of its nodes."""
        calls = [(id(call.layer), call.shape) for call in self.calls.values()]
        # the layers say no shape of what is outside of them
        outside = [n for n in self.order if n in self.plain and n not in self.leaves]
        outside += self.takers() if self.plain else []
        shapes = [size_of(GradientEdge(node, 0)) for node in outside]
        return (self.coupled, *calls, *shapes, *map(type, self.order))

    def below(self, node: Node) -> Iterator[Node]:
        """Yields what `node` leads to; from the output of a call, what made its input."""
        call = self.calls.get(node)
        if call is not None:
            if call.above is not None:
                yield call.above
            return
        for child, _ in node.next_functions:
            if child is not None:
                yield child

    def ends(self, nodes: Iterable[Node]) -> list[Node]:
        """Returns those of `nodes` that lead to no other of them."""
        nodes = set(nodes)
        deep: set[Node] = set()
        for node in self.order:
            if any(child in nodes or child in deep for child in self.below(node)):
                deep.add(node)
        return [node for node in self.order if node in nodes and node not in deep]

    def takers(self) -> list[Node]:
        """Returns the nodes that are not plain, but take the output of one that is."""
        return [
            node
            for node in self.order
            if node not in self.plain
            and node not in self.calls
            and any(child in self.plain for child, _ in node.next_functions)
        ]

    def parameters(self) -> list[Tensor]:
        """Returns the parameters of the calls and of the leaves, each once."""
        return list(dict.fromkeys([*self.parameters_at(self.calls), *self.leaves.values()]))

    def parameters_at(self, nodes: Iterable[Node]) -> list[Tensor]:
        """Returns the parameters of those nodes that are calls, and what is plain under others."""
        found: list[Tensor] = []
        others: list[Node | None] = []
        for node in nodes:
            if node in self.calls:
                own = self.calls[node].layer.parameters(recurse=False)
                found += [p for p in own if p.requires_grad]
            else:
                others += [child for child, _ in node.next_functions if child in self.plain]
        return found + [self.leaves[node] for node in nodes_under(others) if node in self.leaves]

    def tables(self) -> set[Node]:
        """Returns the plain nodes under a look-up: rows of a table are not rows of examples."""
        look_ups = [node for node in self.plain if name_of(node) in _LOOK_UPS]
        return {*nodes_under(look_ups)}.difference(look_ups)

    def leaves_under(self, node: Node) -> dict[Node, Tensor]:
        """Returns the leaves that a plain node leads to."""
        return {n: self.leaves[n] for n in nodes_under([node]) if n in self.leaves}

    def reorders(self, node: Node) -> bool:
        """Returns whether from a plain node to its parameter numbers are only put in order."""
        return all(n in self.leaves or name_of(n) in _REORDER for n in nodes_under([node]))

    def size_under(self, edge: GradientEdge) -> int:
        """Returns how many numbers there are between an edge and its parameters."""
        return sum(size_of(GradientEdge(n, 0)).numel() for n in nodes_under([edge.node]))

    def batch_norms(self) -> list[Node]:
        """Returns the nodes of batch norms with statistics of the batch, in the layers as well."""
        return [node for node in nodes_under(self.order) if _takes_statistics(node)]

    def _walk(self, start: Node | None) -> None:
        if start is None:
            return
        met, stack = {start}, [(start, iter(self._enter(start)))]
        while stack:
            node, rest = stack[-1]
            child = next((c for c in rest if c not in met), None)
            if child is None:
                stack.pop()
                self.order.append(node)
            else:
                met.add(child)
                stack.append((child, iter(self._enter(child))))

    def _enter(self, node: Node) -> list[Node]:
        call = node.metadata.get(self._key)  # type: ignore[attr-defined]
        if isinstance(call, Call) and call.layer not in self._skip:
            self.calls[node] = call
        return list(self.below(node))

    def _plain(self) -> set[Node]:
        plain: set[Node] = set()
        for node in self.order:  # children come first
            children = [child for child, _ in node.next_functions if child is not None]
            inner = bool(children) and all(child in plain for child in children)
            if node in self.leaves or (inner and node not in self.calls):
                plain.add(node)
        return plain


def nodes_under(starts: Iterable[Node | None]) -> list[Node]:
    """Returns all nodes that `starts` lead to, each once, with themselves first."""
    found = [node for node in starts if node is not None]
    met = set(found)
    for node in found:
        for child, _ in node.next_functions:
            if child is not None and child not in met:
                met.add(child)
                found.append(child)
    return found


def _couples(module: nn.Module) -> bool:
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or module.running_mean is None)


def _takes_statistics(node: Node) -> bool:
    # instance norms are batch norms of a batch of one
    return (
        name_of(node) in _BATCH_NORMS
        and node._saved_training  # type: ignore[attr-defined]
        and len(node._saved_input) != 1  # type: ignore[attr-defined]
    )
