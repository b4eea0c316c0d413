"""Means over the examples of all processes of `torch.distributed`, or of the only one."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def average(gradients: Sequence[Tensor], count: int) -> None:
    """Replaces each process's mean gradient over `count` examples by the mean over all examples.

    Args:
        gradients: Means over this process's examples; changed in place. Every process has the same
            ones, in the same order.
        count: How many examples this process had.
    """
    if not _several() or not gradients:
        return
    # one message: the sums, and the number of examples behind them
    flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_ones(1)]) * count
    distributed.all_reduce(flat)
    means = (flat[:-1] / flat[-1]).split([g.numel() for g in gradients])
    for gradient, total in zip(gradients, means, strict=True):
        gradient.copy_(total.view_as(gradient))


def mean(values: Tensor) -> float:
    """Returns the mean of the values of all processes; 0 where there are none."""
    total = torch.stack([values.double().sum(), values.new_tensor(len(values)).double()])
    if _several():
        distributed.all_reduce(total)
    return float(total[0] / total[1].clamp(min=1))


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
