"""One pass over the training data, and the learning rate over all of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from engm import methods, optim, processes
from engm.config import RunConfig
from engm.errors import InputError, NonFiniteLossError
from engm.weight_perturbation import AWP


@dataclass(frozen=True)
class Precision:
    """How a model's passes are computed: arithmetic, and memory layout of the images."""

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    @classmethod
    def of(cls, config: RunConfig) -> "Precision":
        """Returns the precision of a run."""
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        return cls(getattr(torch, config.precision), layout)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context to run the model in."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


def train_one_epoch(
    model: nn.Module,
    method: methods.Method,
    optimizer: optim.MSGD | optim.ENGM,
    examples: Iterable[tuple[Tensor, Tensor]],
    *,
    scheduler: lr_scheduler.LRScheduler | None = None,
    attacked: nn.Module | None = None,
    precision: Precision | None = None,
    awp: AWP | None = None,
) -> dict[str, float]:
    """Takes one step an element of `examples`: attack, losses, outer step.

    Args:
        model: Left in train mode.
        method: Attack and losses.
        optimizer: Any whose `step` takes a closure of per-example losses.
        examples: Pairs of images `[n, c, h, w]` in [0, 1] and labels `[n]`. Processes of
            `torch.distributed` are each given all of them, and share each batch.
        scheduler: Stepped after each step of the optimizer.
        attacked: The model as the attack sees it, with the same weights, see `AttackedModel`.
        precision: float32 where left out.
        awp: Takes the gradients at perturbed weights.

    Returns:
        `train_loss`, the mean over the examples. Under ENGM also `example_norm`, the mean |g_i|,
        and `excluded`, how many examples had an inf or nan loss or gradient and got weight 0.

    Raises:
        NonFiniteLossError: If a loss is inf or nan (under ENGM: if all of a batch are); the message
            counts the steps from 1.
    """
    precision, awp = precision or Precision(), awp or AWP(0)
    losses, norms = [], []
    model.train()
    for step, (x, y) in enumerate(examples, start=1):
        x = x.contiguous(memory_format=precision.memory_format)
        with precision.autocast(x.device):
            # processes that share a batch draw the random starts of all of it
            rows = processes.share(len(y))
            part = {} if rows is None else {"rows": rows}
            x_adv = method.attack(attacked or model, x, y, **part)
        x, y = (x, y) if rows is None else (x[rows], y[rows])
        optimizer.zero_grad()

        def closure(x: Tensor = x, x_adv: Tensor = x_adv, y: Tensor = y) -> Tensor:
            with precision.autocast(x.device):
                return method.losses(model, x, x_adv, y)

        try:
            with awp(model, closure):
                losses.append(optimizer.accumulate(closure, inputs=x_adv))
            optimizer.step()
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"step {step - error.steps_ago}: {error}") from None
        if isinstance(optimizer, optim.ENGM) and optimizer.last:
            norms.append(optimizer.last.norms)
        if scheduler is not None:
            scheduler.step()
    if not losses:
        raise InputError("there is no batch to train on")
    try:
        optimizer.settle()
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"step {step + 1 - error.steps_ago}: {error}") from None
    every = torch.cat(losses)
    finite = every.isfinite()
    metrics = {"train_loss": float(processes.mean(every, finite))}
    if norms:
        lengths = torch.cat(norms)
        good = finite & lengths.isfinite()
        excluded = processes.total(int((~good).sum()), every.device)
        metrics |= {"example_norm": float(processes.mean(lengths, good)), "excluded": excluded}
    return metrics


def build_scheduler(
    config: RunConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """Makes the schedule of a run, to be stepped after each step of the optimizer.

    "piecewise" divides the learning rate by 10 after a half and after three quarters of the
    steps; "cosine" takes it to 0; "one-cycle" raises it from a tenth over the first 30% of the
    steps and takes it to about 0; "constant" leaves it.
    """
    steps = config.epochs * steps_per_epoch
    match config.schedule:
        case "piecewise":
            drops = [max(1, steps * k // 4) for k in (2, 3)]
            return lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, steps)
        case "one-cycle":
            steps = max(steps, 2)  # a single step would be taken at a rate of 0
            return lr_scheduler.OneCycleLR(
                optimizer, config.lr, total_steps=steps, div_factor=10, cycle_momentum=False
            )
        case "constant":
            return lr_scheduler.ConstantLR(optimizer, factor=1.0)
