"""A whole run: it survives being killed, and several processes can share it."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from tqdm.auto import tqdm

from engm import data, distributed, methods, optim
from engm.config import RunConfig
from engm.device import Precision, attacked_model, kernels_compared, pick_device
from engm.errors import InputError, NonFiniteLossError
from engm.evaluation.accuracy import accuracy_under, evaluate_run, validation_attack
from engm.methods import AWP
from engm.models import build_model
from engm.runs import (
    CHECKPOINTS,
    LOCK,
    RESULT,
    append_metrics,
    check_config,
    environment,
    fits_config,
    keep_metrics,
    load_tensors,
    locked,
    read_result,
    save_tensors,
    whole_metrics,
    write_config,
    write_json,
)

# --- a run


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Its run directory.
        config: Its resolved config.
        metrics: One mapping an epoch, as in `metrics.jsonl`.
        result: What `result.json` holds: the test set's accuracies for `last` and `best`.
    """

    folder: Path
    config: RunConfig
    metrics: list[dict[str, Any]]
    result: dict[str, Any]


def fit(
    config: RunConfig,
    out: Path | str = "runs",
    *,
    device: str = "auto",
    data_root: Path | None = None,
    save_adversarial: bool = True,
    progress: bool = True,
) -> RunResult:
    """Trains, evaluates and records a run; goes on where an earlier call was cut off.

    The run lives in `out / config.name`, so that the same config means the same folder. A complete
    run is not repeated. On the CPU a run that was killed and called again ends with bitwise the
    weights of one that was left alone. The test set is used at the end alone; the best epoch is
    chosen on the validation split.

    Started by `torchrun`, the processes share each batch, and the first of them writes. The run is
    that of a single process up to rounding, except that BatchNorm takes its statistics from the
    part of the batch that a process has.

    Args:
        config: What to run.
        out: Folder of the runs.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        data_root: Where the datasets live, see `engm.data.load`.
        save_adversarial: Keep the adversarial test examples in the run directory.
        progress: Show progress bars.

    Returns:
        The finished run.

    Raises:
        InputError: If the device, the data or the folder is not fit for the run.
        NonFiniteLossError: If a loss is inf or nan. The state before that step is kept in
            `checkpoint-failed.pt`, that of the last whole epoch in `checkpoint-last.pt`.
    """
    with distributed.joined():
        return _fit(
            config.resolved(), Path(out), pick_device(device), data_root, save_adversarial, progress
        )


def _fit(
    config: RunConfig,
    out: Path,
    target: torch.device,
    data_root: Path | None,
    save_adversarial: bool,
    progress: bool,
) -> RunResult:
    folder = out / config.name
    if (folder / RESULT).exists():
        check_config(folder, config)
        metrics = whole_metrics(folder, config.epochs)
        return RunResult(folder, config, metrics, read_result(folder))
    dataset = data.load(
        config.dataset,
        root=data_root,
        subset=config.subset,
        validation=config.validation_images,
        test=config.test_images,
    ).to(target)
    cuda = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        run = _Run(config, dataset, target, folder)  # what cannot start leaves no folder
        with locked(folder) if distributed.first() else nullcontext():
            run.go_on(progress and distributed.first())
            result = run.evaluate(save_adversarial, progress and distributed.first())
            if distributed.first():
                write_json(folder / RESULT, result)
    if distributed.first():
        (folder / LOCK).unlink(missing_ok=True)  # nobody writes to a complete run
    distributed.wait()
    return RunResult(folder, config, whole_metrics(folder, config.epochs), result)


class _Run:
    """A run in memory: model, optimizer, schedule, and how far it is."""

    def __init__(
        self, config: RunConfig, dataset: data.Dataset, device: torch.device, folder: Path
    ) -> None:
        self.config, self.dataset, self.device, self.folder = config, dataset, device, folder
        self.examples = dataset.train
        if config.label_noise:
            self.examples = data.with_wrong_labels(
                dataset.train, config.label_noise, dataset.num_classes, seed=config.seed
            )
        usual = data.SPECS[dataset.name].augment
        self.augment = usual if config.augment is None else config.augment != "none"
        self.precision = Precision.of(config)
        layout = self.precision.memory_format
        _seed(config.seed, 0)
        self.model = build_model(config, dataset).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.attacked = attacked_model(config, self.model)
        self.method = methods.build(config)
        self.optimizer = optim.build(config, self.model)
        assert config.batch_size is not None
        self.batch_size = config.batch_size
        steps = -(-len(dataset.train) // config.batch_size)
        self.scheduler = build_scheduler(config, self.optimizer, steps)
        self.epoch = 0
        self.best = {"epoch": 0, "validation_robust_accuracy": -1.0}

    def go_on(self, progress: bool) -> None:
        if distributed.first():
            write_config(self.folder, self.config, self.device)
        distributed.wait()
        self.resume()
        total, name = self.config.epochs, self.config.name
        epochs = range(self.epoch, total)
        for _ in tqdm(epochs, name, total, initial=self.epoch, disable=not progress):
            self.train_epoch()

    def resume(self) -> None:
        path = self.folder / CHECKPOINTS["last"]
        if path.exists():
            state = load_tensors(path, self.device)
            with fits_config(path):
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])
                self.epoch, self.best = state["epoch"], state["best"]
        # an epoch that was counted but not kept is run again
        if distributed.first():
            keep_metrics(self.folder, self.epoch)

    def train_epoch(self) -> None:
        started = perf_counter()
        epoch = self.epoch + 1
        # Each epoch draws from a stream of its own, so that no generator has to be kept.
        _seed(self.config.seed, epoch)
        lr = self.optimizer.param_groups[0]["lr"]
        examples = data.batches(
            self.examples,
            self.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            augment=self.augment,
        )
        try:
            with kernels_compared():
                metrics = train_one_epoch(
                    self.model,
                    self.method,
                    self.optimizer,
                    examples,
                    scheduler=self.scheduler,
                    attacked=self.attacked,
                    precision=self.precision,
                    awp=AWP(self.config.awp if epoch > self.config.awp_warmup else 0),
                )
        except NonFiniteLossError as error:
            failed = self.folder / "checkpoint-failed.pt"
            if distributed.first():
                save_tensors(failed, self._state())
            raise NonFiniteLossError(
                f"epoch {epoch}, {error} A smaller lr may help. The state before that step is in "
                f"{failed}, that of the last whole epoch (if any) in {CHECKPOINTS['last']}."
            ) from None
        distributed.share_buffers(self.model)
        attack = validation_attack(self.config)
        validation = accuracy_under(self.model, self.dataset.validation, attack)
        self.epoch = epoch
        robust = validation.robust_accuracy
        metrics = {
            "epoch": epoch,
            "lr": lr,
            **metrics,
            "validation_clean_accuracy": validation.clean_accuracy,
            "validation_robust_accuracy": robust,
            "seconds": perf_counter() - started,
        }
        better = robust > self.best["validation_robust_accuracy"]
        if better:
            self.best = {"epoch": epoch, "validation_robust_accuracy": robust}
        if distributed.first():
            self._write(metrics, better)
        distributed.wait()

    def evaluate(self, save_adversarial: bool, progress: bool) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for which in CHECKPOINTS:
            keep = save_adversarial and distributed.first()
            path = self.folder / f"adversarial-{which}.pt" if keep else None
            found = evaluate_run(self.folder, which, self.dataset, save_to=path, progress=progress)
            result[which] = found.to_dict()
        gap = result["best"]["robust_accuracy"] - result["last"]["robust_accuracy"]
        return {
            "data": self.dataset.title,
            **result,
            "robust_overfitting_gap": gap,
            "environment": environment(self.device),
        }

    def _write(self, metrics: dict[str, Any], better: bool) -> None:
        append_metrics(self.folder, metrics)
        if better:
            weights = {"epoch": self.epoch, "model": self.model.state_dict()}
            save_tensors(self.folder / CHECKPOINTS["best"], weights)
        # last of all: from here on the epoch counts as done
        save_tensors(self.folder / CHECKPOINTS["last"], self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }


def _seed(seed: int, epoch: int) -> None:
    # SeedSequence keeps neighbouring seeds and epochs apart
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


# --- an epoch


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
            rows = distributed.share(len(y))
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
    metrics = {"train_loss": float(distributed.mean(every, finite))}
    if norms:
        lengths = torch.cat(norms)
        good = finite & lengths.isfinite()
        excluded = distributed.total(int((~good).sum()), every.device)
        metrics |= {"example_norm": float(distributed.mean(lengths, good)), "excluded": excluded}
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
