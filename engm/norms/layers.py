"""What each example contributes to the gradient of a layer's weight and bias.

A layer saw the input a and passes on the output b = dL/d(output) of a whole batch. The gradient of
its weight is a sum over rows, and the rows of example i in a and b give its share of it. A share is
kept in one of two forms, whichever is cheaper: itself, or as the a and b it is made of.

    Linear     share_i = sum_p b_ip a_ip^T           p: positions, such as those in a sequence
    Conv       the same with the patch of a that output position p sees
    norms      share_i = sum_p b_ip x_ip             x: the normalised input
    PReLU      share_i = sum_p b_ip min(a_ip, 0)
    Embedding  share_i = sum_p b_ip, in the row of the table that a_ip names

Sources: Goodfellow 2015 (arXiv 1510.01799) for the norm of a linear layer's share; Li et al.
(arXiv 2110.05679) and Bu et al. (arXiv 2205.10683, 2210.00038) for Gram matrices where the share is
large; that convolutions are done without unfolding, and BatchNorm in train mode, is this kit's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight
from torch.nn.utils.parametrize import is_parametrized

from engm.errors import InputError
from engm.norms.rows import Rows

# (a, b) of each call of a layer, and which of their rows belong to which example
Calls = Sequence[tuple[Tensor, Tensor, Rows]]
Pairs = Sequence[tuple[Tensor, Tensor]]  # (a, b), a row an example
# To write a number of a share and read it twice costs a CPU as much as this many multiplications
# (measured on one; what decides is at most a factor of time, never the result).
_MEMORY_COST = 24


@dataclass(frozen=True)
class Stored:
    """Shares as they are, `[n, ...]`; `arrange` gives their sum the parameter's shape."""

    shares: Tensor
    arrange: Callable[[Tensor], Tensor] = lambda total: total

    def squares(self) -> Tensor:
        """Returns the square of each share's length, `[n]`."""
        flat = self.shares.reshape(len(self.shares), -1)
        return torch.linalg.vector_norm(flat, dim=1, dtype=_precise(flat.dtype)).square()

    def weighted(self, weights: Tensor, keep: Tensor | None) -> Tensor:
        """Returns sum_i w_i share_i in the parameter's shape, of the rows to `keep` where given."""
        shares = _kept(self.shares, keep)
        return self.arrange(
            (weights.to(shares.dtype) @ shares.reshape(len(shares), -1)).view(shares.shape[1:])
        )


@dataclass(frozen=True)
class Factors:
    """Shares as the a and b they are made of.

    Attributes:
        calls: (a, b) of each call of the layer.
        inner: The inner products, `[n]`, of the shares of two calls: (a, b, other a, other b).
        product: The gradient of the weight from an a and a b.
    """

    calls: Pairs
    inner: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]

    def squares(self) -> Tensor:
        """Returns the square of each share's length, `[n]`."""
        calls = [(_precisely(a), _precisely(b)) for a, b in self.calls]
        # |sum of the calls' shares|^2 = the sum over all pairs of calls
        total = _total(self.inner(*one, *other) for one in calls for other in calls)
        return total.clamp(min=0)

    def weighted(self, weights: Tensor, keep: Tensor | None) -> Tensor:
        """Returns sum_i w_i share_i in the parameter's shape, of the rows to `keep` where given."""
        return _total(
            self.product(_kept(a, keep), _kept(b, keep) * _per_row(weights.to(b.dtype), b))
            for a, b in self.calls
        )


Share = Stored | Factors  # the shares of all examples in one parameter


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    # zeros for the other rows: 0 times nan is nan, and to pick rows would wait for a GPU
    if keep is None:
        return values
    return torch.where(_per_row(keep, values), values, 0)


def _per_row(numbers: Tensor, values: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (values.dim() - 1))


def formula_of(module: nn.Module) -> "_Formula | None":
    """Returns what gives the shares in the parameters of `module`; `None` where nothing does.

    There is a formula for torch's layers, for what was registered, and for subclasses of both that
    leave `forward` as it is, while weight and bias are parameters of their own: not for a layer
    whose `forward` was replaced, or whose weight is made of other parameters.
    """
    for kind in type(module).__mro__:
        if kind in _REGISTRY:
            formula, forward = _REGISTRY[kind]
            plain = type(module).forward is forward and "forward" not in vars(module)
            return formula if plain and _its_own(module) else None
    return None


def _its_own(module: Any) -> bool:
    for name in ("weight", "bias"):
        # not asked for: to read a parametrised weight makes it anew, which may change buffers
        if is_parametrized(module, name):
            return False
        if getattr(module, name, None) is not None and name not in module._parameters:
            return False
    # counts over the batch, sparse gradients, and a table that is changed as it is read
    return not isinstance(module, nn.Embedding) or not (
        module.scale_grad_by_freq or module.sparse or module.max_norm is not None
    )


def register_formula(
    kind: type[nn.Module],
    gradients: Callable[[Any, Tensor, Tensor], dict[str, Tensor]],
) -> None:
    """Tells ENGM how to find the gradients of each example in a layer of one's own.

        class Scale(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.factor = nn.Parameter(torch.ones(channels))

            def forward(self, x):
                return self.factor * x

        register_formula(Scale, lambda layer, a, b: {"factor": a * b})

    ENGM takes such a layer without that, too, since it follows its parameter through the graph; a
    formula is for operations that have none in `engm.norms.operations`, which are done one example
    at a time. A formula that is wrong is found out in the first step, and not used.

    Args:
        kind: The layer; subclasses that leave `forward` as it is count as well.
        gradients: Called with the layer, its input a and the gradient b of its output, both with a
            row an example; returns for each trainable parameter, by its name, the gradient of each
            example, `[n, *shape of the parameter]`.

    Raises:
        InputError: If `kind` is no module class, or `gradients` no function. Source: this kit.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or not callable(gradients):
        raise InputError(
            "register_formula takes a class of layers and a function of (layer, a, b), "
            f"got {kind!r} and {gradients!r}"
        )

    def formula(module: Any, calls: Calls, measure: bool) -> dict[str, Share]:
        found = [gradients(module, a, b) for a, b in single_rows(calls)]
        own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
        return {
            name: Stored(_total(one[name] for one in found))
            for name in own
            if all(name in one for one in found)
        }

    _REGISTRY[kind] = (formula, kind.forward)


def _with_bias(weight: Callable[[Any, Calls, bool], Share]) -> "_Formula":
    def formula(module: Any, calls: Calls, measure: bool) -> dict[str, Share]:
        shares: dict[str, Share] = {}
        if getattr(module, "weight", None) is not None and module.weight.requires_grad:
            shares["weight"] = weight(module, calls, measure)
        if getattr(module, "bias", None) is not None and module.bias.requires_grad:
            parts = (over_positions(module, rows.split(b)) for _, b, rows in calls)
            shares["bias"] = Stored(_total(parts))
        return shares

    return formula


def _linear(module: Any, calls: Calls, measure: bool) -> Share:
    pairs = [(_rows(rows.split(a.to(b.dtype))), _rows(rows.split(b))) for a, b, rows in calls]
    return linear_shares(pairs, measure)


def linear_shares(calls: Pairs, measure: bool, stored: bool = False) -> Share:
    """Returns sum_p b_p a_p^T of each example, from a and b `[n, positions, channels]`."""
    inputs, outputs = calls[0][0].shape[-1], calls[0][1].shape[-1]
    positions = sum(b.shape[1] for _, b in calls)
    gram_cost = positions**2 * (inputs + outputs)
    if not stored and (not measure or gram_cost < _MEMORY_COST * inputs * outputs):

        def product(a: Tensor, b: Tensor) -> Tensor:
            return b.flatten(0, 1).T @ a.flatten(0, 1)

        return Factors(calls, _linear_inner, product)
    return Stored(_total(b.transpose(1, 2) @ a for a, b in calls))


def _rows(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1, values.shape[-1])


def _linear_inner(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Tensor:
    # sum_pq (a_p . a_q) (b_p . b_q)
    return ((a @ other_a.transpose(1, 2)) * (b @ other_b.transpose(1, 2))).sum((1, 2))


def _conv2d(module: Any, calls: Calls, measure: bool) -> Share:
    pairs = single_rows(calls)
    groups, (height, width) = module.groups, module.kernel_size
    outputs, inputs = module.out_channels // groups, module.in_channels // groups

    if measure and inputs == outputs == 1:  # channels apart: there are no matrices to multiply
        return _conv(module, calls, measure)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return conv2d_weight(
            _padded(module, a),
            module.weight.shape,
            b,
            stride=module.stride,
            dilation=module.dilation,
            groups=groups,
        )

    pixels_a = sum(a.shape[2] * a.shape[3] for a, _ in pairs)
    pixels_b = sum(b.shape[2] * b.shape[3] for _, b in pairs)
    # two Gram matrices, and one of them shifted to each kernel position
    gram_cost = pixels_a**2 * inputs + pixels_b**2 * (outputs + 16 * height * width)
    if not measure or gram_cost < _MEMORY_COST * outputs * inputs * height * width:
        return Factors(pairs, partial(_conv2d_inner, module), product)

    def arrange(total: Tensor) -> Tensor:
        # [groups, height * width, outputs, inputs] -> [groups * outputs, inputs, height, width]
        return total.permute(0, 2, 3, 1).reshape(-1, inputs, height, width)

    return Stored(_total(_conv2d_shares(module, a, b) for a, b in pairs), arrange)


def _padded(module: Any, a: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around = module._reversed_padding_repeated_twice
    return functional.pad(a, around, mode=mode) if any(around) else a


def _conv2d_inner(module: Any, a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Tensor:
    """Returns the inner products of two calls' shares, `[n]`, from Gram matrices of pixels.

    With G_a and G_b the Gram matrices of the padded a and of b, it is the sum over kernel positions
    of <G_a shifted, G_b> = <G_a, sum of the G_b shifted back>, so no patch is ever formed.
    """
    n, groups = len(a), module.groups
    gram_a = _gram(_padded(module, a), _padded(module, other_a), groups)
    gram_b = _gram(b, other_b, groups)
    shifted = torch.zeros_like(gram_a)
    for y in range(module.kernel_size[0]):
        for x in range(module.kernel_size[1]):
            window = []
            for rows, columns in (b.shape[2:], other_b.shape[2:]):
                for first, count, k in ((y, rows, 0), (x, columns, 1)):
                    start, step = first * module.dilation[k], module.stride[k]
                    window.append(slice(start, start + (count - 1) * step + 1, step))
            shifted[:, *window] += gram_b
    return (shifted * gram_a).flatten(1).sum(1).view(n, groups).sum(1)


def _gram(one: Tensor, other: Tensor, groups: int) -> Tensor:
    # [n * groups, rows, columns, other rows, other columns], products over the group's channels
    flat = [v.reshape(len(v) * groups, v.shape[1] // groups, -1) for v in (one, other)]
    return (flat[0].transpose(1, 2) @ flat[1]).view(-1, *one.shape[2:], *other.shape[2:])


def _conv2d_shares(module: Any, a: Tensor, b: Tensor) -> Tensor:
    """Returns `[n, groups, kernel positions, outputs, inputs]`, without unfolding the padded a.

    For each kernel position the patches' pixels are a shifted window of a. When b is laid out in
    rows as long as those of a, zeros between, the window is a plain slice of a's memory, and the
    share one matrix product. With a stride, a is first dealt out into one plane for each phase.
    """
    n, groups, a = len(a), module.groups, _padded(module, a)
    (kernel_rows, kernel_columns), (down, across) = module.kernel_size, module.stride
    rows, columns = b.shape[2:]
    height, width = -(-a.shape[2] // down), -(-a.shape[3] // across)  # of a plane
    missing = (0, width * across - a.shape[3], 0, height * down - a.shape[2])
    a = functional.pad(a, missing) if any(missing) else a
    length = (rows - 1) * width + columns
    b = functional.pad(b, (0, width - columns)) if width > columns else b
    b = b.reshape(n * groups, b.shape[1] // groups, -1)[:, :, :length]
    planes: dict[tuple[int, int], Tensor] = {}
    inputs = a.shape[1] // groups
    shares = b.new_empty(n * groups, kernel_rows * kernel_columns, b.shape[1], inputs)
    for k in range(kernel_rows * kernel_columns):
        y, x = k // kernel_columns * module.dilation[0], k % kernel_columns * module.dilation[1]
        phase = (y % down, x % across)
        if phase not in planes:
            plane = a[:, :, phase[0] :: down, phase[1] :: across]
            planes[phase] = plane.reshape(n * groups, inputs, -1)
        first = y // down * width + x // across
        window = planes[phase][:, :, first : first + length]
        torch.bmm(b, window.transpose(1, 2), out=shares[:, k])
    return shares.view(n, groups, *shares.shape[1:])


def single_rows(calls: Calls) -> Pairs:
    """Returns a and b with one row an example: of a call with k rows an example, k pairs."""
    return [
        pair
        for a, b, rows in calls
        for pair in zip(rows.split(a.to(b.dtype)).unbind(1), rows.split(b).unbind(1), strict=True)
    ]


def _conv(module: Any, calls: Calls, measure: bool) -> Share:
    size = module.weight.shape
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    padding = module.padding if transposed else [0] * len(module.kernel_size)
    options = (
        module.stride, padding, module.dilation, transposed, module.output_padding, module.groups
    )  # fmt: skip
    return Stored(
        _total(
            conv_shares(a if transposed else _padded(module, a), b, size, options)
            for a, b in single_rows(calls)
        )
    )


def conv_shares(a: Tensor, b: Tensor, size: Sequence[int], options: tuple[Any, ...]) -> Tensor:
    """Returns the shares in the weight of any convolution, `[n, *size]`.

    With the examples dealt out as groups of channels of a single one, the gradient of the weight
    holds each example's share.

    Args:
        a: The input, `[n, channels, ...]`.
        b: The gradient of the output.
        size: Shape of the weight.
        options: stride, padding, dilation, transposed, output_padding, groups, as torch has them.
    """
    n = len(a)
    weight = b.new_empty(n * size[0], *size[1:])
    gradients = torch.ops.aten.convolution_backward(
        b.reshape(1, -1, *b.shape[2:]),
        a.reshape(1, -1, *a.shape[2:]),
        weight,
        None,
        *options[:5],
        options[5] * n,
        [False, True, False],
    )
    return gradients[1].view(n, *size)


def _embedding(module: Any, calls: Calls, measure: bool) -> Share:
    pairs = [(rows.split(a), rows.split(b)) for a, b, rows in calls]
    if module.padding_idx is not None:
        pairs = [(a, b * (a != module.padding_idx)[..., None]) for a, b in pairs]

    def inner(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Tensor:
        same = a.flatten(1)[:, :, None] == other_a.flatten(1)[:, None, :]
        return (same * (_rows(b) @ _rows(other_b).transpose(1, 2))).sum((1, 2))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return b.new_zeros(module.weight.shape).index_add(0, a.flatten(), b.flatten(0, -2))

    return Factors(pairs, inner, product)


def _elementwise(module: Any, calls: Calls, measure: bool) -> Share:
    # the factor from whole batches: its statistics may be those of all rows
    def sums(a: Tensor, b: Tensor, rows: Rows) -> Tensor:
        product = _precisely(b) * _factor(module, _precisely(a.to(b.dtype)))
        return over_positions(module, rows.split(product))

    return Stored(_total(sums(*call) for call in calls))


def _factor(module: Any, a: Tensor) -> Tensor:
    """Returns what an elementwise layer multiplies its weight with."""
    if isinstance(module, nn.PReLU):
        return a.clamp(max=0)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(a, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(a, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(a, module.num_groups, eps=module.eps)
    now = module.training or module.running_mean is None
    mean, variance = (None, None) if now else (module.running_mean, module.running_var)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return functional.batch_norm(a, mean, variance, training=now, eps=module.eps)
    return functional.instance_norm(a, mean, variance, use_input_stats=now, eps=module.eps)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _precisely(values: Tensor) -> Tensor:
    return values.to(_precise(values.dtype)) if values.is_floating_point() else values


def _total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def over_positions(module: Any, values: Tensor) -> Tensor:
    """Returns the sums over all positions, `[n, ...]`, of values `[n, k, ...]`."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        positions = [*range(1, values.dim() - len(module.normalized_shape))]
    elif isinstance(module, nn.Linear) or (isinstance(module, nn.PReLU) and values.dim() < 4):
        positions = [*range(1, values.dim() - 1)]
    else:  # channels come second
        positions = [1, *range(3, values.dim())]
    total = values.sum(positions)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return total.flatten(1).sum(1, keepdim=True)
    return total


_Formula = Callable[[Any, Calls, bool], dict[str, Share]]

_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU),
)
_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
# For each kind of layer the formula, and the `forward` that it is of.
_REGISTRY: dict[type[nn.Module], tuple[_Formula, Any]] = {
    nn.Linear: (_with_bias(_linear), nn.Linear.forward),
    nn.Conv2d: (_with_bias(_conv2d), nn.Conv2d.forward),
    nn.Embedding: (_with_bias(_embedding), nn.Embedding.forward),
    **{kind: (_with_bias(_conv), kind.forward) for kind in _CONVOLUTIONS},
    **{kind: (_with_bias(_elementwise), kind.forward) for kind in _ELEMENTWISE},
}
