"""The processes that share a run: who writes, who has which rows, means over all examples.

With a single process, without `torch.distributed`, all of it costs nothing.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that `torchrun` started, for the block; without it, does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or several():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo carries what is on the CPU, nccl what is on a GPU
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def first() -> bool:
    """Returns whether this process is the one that writes."""
    return not several() or distributed.get_rank() == 0


def wait() -> None:
    """Waits until all processes are here."""
    if several():
        distributed.barrier()


def share(count: int) -> slice | None:
    """Returns this process's rows of a batch of `count`; `None` where it has them all.

    A batch with fewer examples than processes is taken by each of them as a whole: the mean is the
    same.
    """
    if not several() or count < distributed.get_world_size():
        return None
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return slice(count * rank // size, count * (rank + 1) // size)


def total(value: int, device: torch.device) -> int:
    """Returns the sum of the values of all processes."""
    if not several():
        return value
    summed = torch.tensor(value, device=device)
    distributed.all_reduce(summed)
    return int(summed)


@torch.no_grad()
def share_values(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the values of the first one, as DDP does when it is made."""
    for tensor in tensors if several() else ():
        distributed.broadcast(tensor.data, 0)


def averaged(
    gradients: dict[Tensor, Tensor], parameters: Sequence[Tensor], count: int | Tensor
) -> dict[Tensor, Tensor]:
    """Returns the mean gradients over the examples of all processes.

    Given are the means over this process's `count` examples; one that is missing here, but not in
    all processes, counts as zero. `parameters` may have gradients, in the same order everywhere.
    """
    if not several():
        return gradients
    met = torch.tensor([p in gradients for p in parameters], device=parameters[0].device).float()
    distributed.all_reduce(met, distributed.ReduceOp.MAX)
    used = [p for p, is_met in zip(parameters, met.tolist(), strict=True) if is_met]
    means = [gradients[p] if p in gradients else torch.zeros_like(p) for p in used]
    average(means, count)
    return dict(zip(used, means, strict=True))


def average(gradients: Sequence[Tensor], count: int | Tensor) -> None:
    """Replaces each process's mean gradients over `count` examples by the means over all examples.

    They are changed in place; every process has the same ones, in the same order.
    """
    if not several() or not gradients:
        return
    # one message: the sums, and the number of examples behind them
    flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_ones(1)]) * count
    distributed.all_reduce(flat)
    means = (flat[:-1] / flat[-1]).split([g.numel() for g in gradients])
    for gradient, total in zip(gradients, means, strict=True):
        gradient.copy_(total.view_as(gradient))


def mean(values: Tensor, keep: Tensor | None = None) -> Tensor:
    """Returns the mean of the values of all processes, `[n]` each, one float64 on their device.

    `keep`, `[n]` booleans, says which of them count: all where left out; the mean of none is 0.
    """
    if keep is None:
        keep = torch.ones_like(values, dtype=torch.bool)
    total = torch.stack([torch.where(keep, values, 0).double().sum(), keep.sum().double()])
    if several():
        distributed.all_reduce(total)
    return total[0] / total[1].clamp(min=1)


def several() -> bool:
    """Returns whether there is more than this one process in the run."""
    return distributed.is_available() and distributed.is_initialized()
