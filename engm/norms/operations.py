"""What each example contributes to the gradient of a parameter that no layer's formula reaches.

Such a parameter (a class token, the scale of a block, a table of positions, the weights of an
attention, one that a weight is made of) meets the batch in some operation, a node of the autograd
graph. The gradient of the node's output has rows of examples, that of the parameter has not any
more. Here the rows are kept apart, by a formula for the common operations, and for all others by
running the node once an example.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from engm.norms.layers import Share, Stored, conv_shares, linear_shares, single_rows
from engm.norms.rows import Rows

Gradients = Sequence[Tensor | None]  # of the outputs of a node


def name_of(node: Node) -> str:
    """Returns the name of an operation, such as "Mul"."""
    return type(node).__name__.split("Backward")[0]


def taken(node: Node, slot: int) -> GradientEdge:
    """Returns the edge to the input `slot` of an operation."""
    below, output = node.next_functions[slot]
    assert below is not None
    return GradientEdge(below, output)


def size_of(edge: GradientEdge) -> torch.Size:
    """Returns the shape of what an edge leads to."""
    node: Any = edge.node
    if hasattr(node, "variable"):
        return node.variable.shape
    return torch.Size(node._input_metadata[edge.output_nr].shape)


def has_formula(node: Node, slot: int) -> bool:
    """Returns whether the shares in the input `slot` of `node` are found for all rows at once."""
    return (name_of(node), slot) in _FORMULAS


def shares_in(
    node: Any, slot: int, gradients: Gradients, rows: Rows, factors: bool
) -> Share | None:
    """Returns the shares of the examples in the gradient of an input of an operation.

    Args:
        node: The operation; what it saved is still there.
        slot: Which of its inputs, one without rows of examples.
        gradients: Of its outputs.
        rows: Which rows of the outputs belong to which example.
        factors: Whether they may be `Factors`; else they are `Stored`.

    Returns:
        The shares; `None` where no formula holds, and `one_by_one` has to be asked.
    """
    formula, b = _FORMULAS.get((name_of(node), slot)), gradients[0]
    if formula is None or b is None:
        return None
    share = formula(node, b, rows, size_of(taken(node, slot)))
    if isinstance(share, tuple):  # a and b of a matrix product
        return linear_shares([share], measure=factors, stored=not factors)
    return None if share is None else Stored(share)


def one_by_one(node: Any, slot: int, gradients: Gradients, rows: Rows) -> Share:
    """Returns the same for any operation, by running it backward once an example.

    Not within a backward pass, in which a node computes only what that pass needs.
    """
    size = size_of(taken(node, slot))
    backward = node if callable(node) else node.apply
    given = next(b for b in gradients if b is not None)
    shares = []
    for example in range(rows.n):
        results = backward(*(None if b is None else _only(b, rows, example) for b in gradients))
        share = results[slot] if isinstance(results, tuple) else results
        shares.append(given.new_zeros(size) if share is None else share.sum_to_size(size))
    return Stored(torch.stack(shares))


def _only(b: Tensor, rows: Rows, example: int) -> Tensor:
    own = rows.owners(b.shape[rows.dim], b.device) == example
    return torch.where(own.view(-1, *[1] * (b.dim() - 1 - rows.dim)), b, 0)


# A formula gives the shares, `[n, *size]`; or the a and b that they are made of; or `None` where
# it does not hold.
_Result = Tensor | tuple[Tensor, Tensor] | None
_Formula = Callable[[Any, Tensor, Rows, torch.Size], _Result]


def _summed(values: Tensor, rows: Rows, size: torch.Size, channels: bool = False) -> Tensor | None:
    # over all that an input of this size was broadcast along; channels come second
    shape = [*size, *[1] * (values.dim() - 2)] if channels else list(size)
    shape = [1] * (values.dim() - len(shape)) + shape
    if len(shape) > values.dim() or shape[rows.dim] != 1:
        return None  # a row of it for each row of the batch
    wide = [d for d in range(values.dim()) if shape[d] == 1 and d != rows.dim]
    total = values.sum(wide, keepdim=True) if wide else values
    return rows.split(total).sum(1).reshape(rows.n, *size)


def _itself(node: Any, b: Tensor, rows: Rows, size: torch.Size, channels: bool = False) -> _Result:
    scaled = getattr(node, "_saved_beta", 1) != 1  # the shift of addmm
    return None if scaled else _summed(b, rows, size, channels)


def _scaled(node: Any, b: Tensor, rows: Rows, size: torch.Size, sign: int) -> _Result:
    return _summed(b * (sign * node._saved_alpha), rows, size)


def _times(node: Any, b: Tensor, rows: Rows, size: torch.Size, other: str) -> _Result:
    return _summed(b * getattr(node, other), rows, size)


def _product(node: Any, b: Tensor, rows: Rows, size: torch.Size, other: str) -> _Result:
    return _summed(b * (node._saved_value * getattr(node, other)), rows, size)


def _repeated(node: Any, b: Tensor, rows: Rows, size: torch.Size) -> _Result:
    whole = [1] * (b.dim() - len(size)) + list(size)
    if whole[rows.dim] > 1:
        return None
    # [copies, length] in place of each dimension
    apart = [v for have, one in zip(b.shape, whole, strict=True) for v in (have // one, one)]
    copies = [2 * d for d in range(b.dim()) if d != rows.dim]
    total = b.reshape(apart).sum(copies, keepdim=True).movedim(2 * rows.dim, 0)
    return replace(rows, dim=0).split(total).sum(1).reshape(rows.n, *size)


def _matrix(node: Any, b: Tensor, rows: Rows, size: torch.Size, other: str) -> _Result:
    if getattr(node, "_saved_alpha", 1) != 1 or rows.dim:
        return None
    # from a @ q comes the gradient a^T b of q
    return rows.split(b), rows.split(getattr(node, other).to(b.dtype))


def _matrices(node: Any, b: Tensor, rows: Rows, size: torch.Size, slot: int) -> _Result:
    if rows.dim != 2 - slot:
        return None
    # of a @ q, for each matrix of a stack: the gradient of q is a^T b, that of a is b q^T
    other = node._saved_self if slot else node._saved_mat2
    pair = (rows.split(other), rows.split(b)) if slot else (rows.split(b), rows.split(other))
    return torch.einsum("nksi,nkso->nsio", pair)


def _conv(node: Any, b: Tensor, rows: Rows, size: torch.Size) -> _Result:
    options = (
        *(node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed),
        *(node._saved_output_padding, node._saved_groups),
    )
    pairs = single_rows([(node._saved_input, b, rows)])
    return torch.stack([conv_shares(a, part, size, options) for a, part in pairs]).sum(0)


def _layer_norm(node: Any, b: Tensor, rows: Rows, size: torch.Size) -> _Result:
    return _summed(b * (node._saved_input - node._saved_result1) * node._saved_result2, rows, size)


def _group_norm(node: Any, b: Tensor, rows: Rows, size: torch.Size) -> _Result:
    x, groups = node._saved_input, node._saved_group
    parts = x.reshape(len(x), groups, -1)
    parts = (parts - node._saved_result1[..., None]) * node._saved_result2[..., None]
    return _summed(b * parts.view(b.shape), rows, size, channels=True)


def batch_statistics(node: Any) -> tuple[Tensor, Tensor]:
    """Returns the mean and 1 / standard deviation that a batch norm took off, `[channels]`."""
    if node._saved_training:
        return node._saved_result1, node._saved_result2
    return node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()


def _batch_norm(node: Any, b: Tensor, rows: Rows, size: torch.Size) -> _Result:
    shape = [-1, *[1] * (b.dim() - 2)]
    mean, scale = (v.view(shape) for v in batch_statistics(node))
    return _summed(b * (node._saved_input - mean) * scale, rows, size, channels=True)


_FORMULAS: dict[tuple[str, int], _Formula] = {
    ("Add", 0): _itself,
    ("Add", 1): partial(_scaled, sign=1),
    ("Sub", 0): _itself,
    ("Sub", 1): partial(_scaled, sign=-1),
    ("Expand", 0): _itself,
    ("Mul", 0): partial(_times, other="_saved_other"),
    ("Mul", 1): partial(_times, other="_saved_self"),
    ("Addcmul", 0): _itself,
    ("Addcmul", 1): partial(_product, other="_saved_tensor2"),
    ("Addcmul", 2): partial(_product, other="_saved_tensor1"),
    ("Repeat", 0): _repeated,
    ("Mm", 1): partial(_matrix, other="_saved_self"),
    ("Bmm", 0): partial(_matrices, slot=0),
    ("Bmm", 1): partial(_matrices, slot=1),
    ("Addmm", 0): _itself,
    ("Addmm", 2): partial(_matrix, other="_saved_mat1"),
    ("Convolution", 1): _conv,
    ("Convolution", 2): partial(_itself, channels=True),
    ("NativeLayerNorm", 1): _layer_norm,
    ("NativeLayerNorm", 2): _itself,
    ("NativeGroupNorm", 1): _group_norm,
    ("NativeGroupNorm", 2): partial(_itself, channels=True),
    ("NativeBatchNorm", 1): _batch_norm,
    ("NativeBatchNorm", 2): partial(_itself, channels=True),
    ("CudnnBatchNorm", 1): _batch_norm,
    ("CudnnBatchNorm", 2): partial(_itself, channels=True),
}
