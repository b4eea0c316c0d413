"""A whole run: it survives being killed, and several processes can share it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from engm import data, methods, optim, processes
from engm.attacked import AttackedModel
from engm.config import RunConfig
from engm.epochs import Precision, build_scheduler, train_one_epoch
from engm.errors import InputError, NonFiniteLossError
from engm.evaluation import accuracy_under, build_model, evaluate_run, validation_attack
from engm.files import write_json
from engm.run_directory import (
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
)
from engm.weight_perturbation import AWP

__all__ = ["Precision", "RunResult", "build_scheduler", "fit", "pick_device", "train_one_epoch"]


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
    with processes.joined():
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
        with locked(folder) if processes.first() else nullcontext():
            run.go_on(progress and processes.first())
            result = run.evaluate(save_adversarial, progress and processes.first())
            if processes.first():
                write_json(folder / RESULT, result)
    if processes.first():
        (folder / LOCK).unlink(missing_ok=True)  # nobody writes to a complete run
    processes.wait()
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
        if processes.first():
            write_config(self.folder, self.config, self.device)
        processes.wait()
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
        if processes.first():
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
            if processes.first():
                save_tensors(failed, self._state())
            raise NonFiniteLossError(
                f"epoch {epoch}, {error} A smaller lr may help. The state before that step is in "
                f"{failed}, that of the last whole epoch (if any) in {CHECKPOINTS['last']}."
            ) from None
        processes.share_buffers(self.model)
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
        if processes.first():
            self._write(metrics, better)
        processes.wait()

    def evaluate(self, save_adversarial: bool, progress: bool) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for which in CHECKPOINTS:
            keep = save_adversarial and processes.first()
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


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`; "auto" is CUDA where there is one, else the CPU.

    Each process that `torchrun` starts on a machine has a GPU of its own under "auto" and "cuda".

    Raises:
        InputError: If there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (local := os.environ.get("LOCAL_RANK")):
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" has no numbers to copy
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"cannot use device {name!r}: {reason}; use 'cpu' or 'auto'") from None
    return device


def attacked_model(config: RunConfig, model: nn.Module) -> AttackedModel | None:
    """Returns the model as the attacks of a run see it; `None` where that is the model itself."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not (config.compile or config.capture):
        return None
    dtype = Precision.of(config).dtype
    return AttackedModel(model, dtype, compile=config.compile, capture=config.capture)


@contextmanager
def kernels_compared() -> Iterator[None]:
    """Lets cuDNN try its kernels once for each shape, and keep the fastest.

    Not for an evaluation whose batches shrink as examples are fooled: each size would be tried.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _seed(seed: int, epoch: int) -> None:
    # SeedSequence keeps neighbouring seeds and epochs apart
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
