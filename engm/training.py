"""Training: an epoch, a run in memory (`Trainer`), and a run on disk that survives being killed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from tqdm.auto import tqdm

from engm import data, distributed, methods, optim, runs
from engm.config import RunConfig
from engm.device import Precision, attacked_model, kernels_compared, pick_device
from engm.errors import InputError, NonFiniteLossError
from engm.evaluation.accuracy import accuracy_under, evaluate_run, validation_attack
from engm.methods import AWP
from engm.models import build_model


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
        optimizer: The outer optimizer.
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
    losses, norms, done = [], [], 0
    model.train()
    try:
        for x, y in examples:
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

            with awp(model, closure):
                losses.append(optimizer.accumulate(closure, inputs=x_adv))
            optimizer.step()
            done += 1
            if isinstance(optimizer, optim.ENGM) and optimizer.last:
                norms.append(optimizer.last.norms)
            if scheduler is not None:
                scheduler.step()
        if not done:
            raise InputError("there is no batch to train on")
        optimizer.settle()
    except NonFiniteLossError as error:
        step = done + 1 - error.steps_ago
        raise NonFiniteLossError(f"step {step}: {error} A smaller lr may help.") from None
    every = torch.cat(losses)
    finite = every.isfinite()
    metrics = {"train_loss": float(distributed.mean(every, finite))}
    if norms:
        lengths = torch.cat(norms)
        good = finite & lengths.isfinite()
        excluded = distributed.total(int((~good).sum()), every.device)
        metrics |= {"example_norm": float(distributed.mean(lengths, good)), "excluded": excluded}
    return metrics


class Trainer:
    """A run in memory: all that its steps need, and how far it is.

        for epoch in Trainer(RunConfig(optimizer="engm", epochs=5)):
            print(epoch["epoch"], epoch["validation_robust_accuracy"])

    Weights, batches and attacks are drawn from `config.seed`, and torch's global random state is
    left as it was. `fit` adds a run directory.

    Args:
        config: The run; every setting is honoured, or refused.
        dataset: That of `config`, on the device to train on; loaded by default.
        device: Where to load it to, by default `pick_device("auto")`.
        model: To be trained in place of the one that `config` describes.

    Attributes:
        config: Resolved.
        dataset: Its validation images choose the best epoch.
        examples: The training images, some of them with wrong labels where `config` asks for it.
        model: In train mode.
        method: Attack and losses.
        optimizer: The outer optimizer.
        scheduler: Stepped after each of its steps.
        steps: How many of them an epoch has.
        epoch: How many epochs are done.
        best: Number and robust validation accuracy of the best of them; the first of equal ones.

    Raises:
        InputError: If the data are not those of `config`, or the device is not able to.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: data.Dataset | None = None,
        device: torch.device | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        self.config = config = config.resolved()
        if dataset is None:
            dataset = load_data(config).to(device or pick_device("auto"))
        _check_data(config, dataset)
        self.dataset, self.examples = dataset, dataset.train
        self.device = dataset.train.images.device
        if config.label_noise:
            self.examples = data.with_wrong_labels(
                dataset.train, config.label_noise, dataset.num_classes, seed=config.seed
            )
        usual = data.SPECS[dataset.name].augment
        self.augment: bool | str = usual if config.augment is None else config.augment != "none"
        if config.augment == "reflect-crop-and-mirror":
            self.augment = "reflect"
        self.precision = Precision.of(config)
        with _stream(config.seed, 0, self.device):
            layout = self.precision.memory_format
            model = model or build_model(config, dataset)
            self.model = model.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
            self.attacked = attacked_model(config, self.model)
            _check_last_batch(config, self.model, self.examples)
        self.method = methods.build(config)
        self.optimizer = optim.build(config, self.model)
        assert config.batch_size is not None
        self.steps = -(-len(self.examples) // config.batch_size)
        self.scheduler = build_scheduler(config, self.optimizer, self.steps)
        self.epoch = 0
        self.best = {"epoch": 0, "validation_robust_accuracy": -1.0}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Trains the epochs that are left, and yields the numbers of each."""
        while self.epoch < self.config.epochs:
            yield self.train_epoch()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of the next epoch, images in [0, 1] and labels."""
        assert self.config.batch_size is not None
        return data.batches(
            self.examples,
            self.config.batch_size,
            seed=self.config.seed,
            epoch=self.epoch + 1,
            augment=self.augment,
        )

    def train_on(self, examples: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Takes a step for each of the batches, see `train_one_epoch`."""
        with kernels_compared():
            return train_one_epoch(
                self.model,
                self.method,
                self.optimizer,
                examples,
                scheduler=self.scheduler,
                attacked=self.attacked,
                precision=self.precision,
                awp=AWP(self.config.awp if self.epoch >= self.config.awp_warmup else 0),
            )

    def train_epoch(
        self, examples: Iterable[tuple[Tensor, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Trains the next epoch, on `batches()` by default, and validates.

        Returns:
            As in `metrics.jsonl`: epoch, lr, what `train_one_epoch` gives, accuracies on the
            validation images, seconds.

        Raises:
            NonFiniteLossError: With epoch and step. The epoch does not count.
        """
        started, epoch = perf_counter(), self.epoch + 1
        lr = self.optimizer.param_groups[0]["lr"]
        # Each epoch draws from a stream of its own, so that no generator has to be kept.
        with _stream(self.config.seed, epoch, self.device):
            try:
                metrics = self.train_on(self.batches() if examples is None else examples)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"epoch {epoch}, {error}") from None
            distributed.share_values(self.model.buffers())  # such as statistics of BatchNorm
            attack = validation_attack(self.config)
            validation = accuracy_under(self.model, self.dataset.validation, attack)
        self.epoch = epoch
        robust = validation.robust_accuracy
        if robust > self.best["validation_robust_accuracy"]:
            self.best = {"epoch": epoch, "validation_robust_accuracy": robust}
        return {
            "epoch": epoch,
            "lr": lr,
            **metrics,
            "validation_clean_accuracy": validation.clean_accuracy,
            "validation_robust_accuracy": robust,
            "seconds": perf_counter() - started,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` goes on from."""
        return {
            "epoch": self.epoch,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the state of an earlier `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.best = state["epoch"], state["best"]


def load_data(config: RunConfig, root: Path | None = None) -> data.Dataset:
    """Loads the images of a run, on the CPU; see `engm.data.load` for `root`."""
    return data.load(
        config.dataset,
        root=root,
        classes=config.classes,
        subset=config.subset,
        validation=config.validation_images,
        test=config.test_images,
    )


def expected_seconds(config: RunConfig, dataset: data.Dataset, epochs: int) -> float:
    """Returns about how long so many epochs and the final attacks take on a CPU.

    The time of one forward and backward pass of the untrained model, on a few images, times the
    passes that training, validation and the attacks on the test images take for each image. An
    attack that ends early, as on images that the model gets wrong, takes less.
    """
    config = config.resolved()
    assert config.num_steps
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, dataset).eval()  # BatchNorm takes a single image, too
    for count in (2, 8, 64):  # the first allocates memory; few are enough of a large network
        x, y = dataset.train.images[:count].float() / 255, dataset.train.labels[:count]
        started = perf_counter()
        cross_entropy(model(x), y).backward()
        seconds = (perf_counter() - started) / len(x)
        if count * seconds > 1:
            break
    attack = 0 if config.method == "natural" else config.num_steps
    attack += config.method == "trades"  # whose steps go away from the answers on clean images
    losses = 2 if config.method in ("trades", "mart") else 1  # these see the clean images, too
    training = attack + losses * (2 if config.awp else 1)
    watching = validation_attack(config).num_steps
    passes = epochs * (len(dataset.train) * training + len(dataset.validation) * watching)
    passes += 2 * len(dataset.test) * config.eval_steps  # of the best and the last checkpoint
    return seconds * passes


def _check_data(config: RunConfig, dataset: data.Dataset) -> None:
    if dataset.name != config.dataset:
        raise InputError(f"the run is on {config.dataset}; it was given {dataset.name}")
    counts = {
        "classes": (config.classes, dataset.num_classes),
        "subset": (config.subset, len(dataset.train)),
        "validation_images": (config.validation_images, len(dataset.validation)),
        "test_images": (config.test_images, len(dataset.test)),
    }
    for name, (wanted, count) in counts.items():
        if wanted not in (None, count):
            raise InputError(f"{name} is {wanted}, but the data have {count}; load as many")


def _check_last_batch(config: RunConfig, model: nn.Module, examples: data.Split) -> None:
    """Refuses a last batch of one image where BatchNorm has one value a channel of it."""
    assert config.batch_size is not None
    if (len(examples) - 1) % config.batch_size:
        return
    try:
        with torch.no_grad():
            deepcopy(model)(examples.images[:1].float() / 255)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"of {len(examples)} training images, batch_size={config.batch_size} leaves one for "
            "the last step, and BatchNorm has no variance of a single value; take another "
            "batch_size or subset, or model_norm=group"
        ) from None


@contextmanager
def _stream(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # SeedSequence keeps neighbouring seeds and epochs apart
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        yield


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
    dataset: data.Dataset | None = None,
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
        dataset: What `load_data` gave, where the caller has it already.
        save_adversarial: Keep the adversarial test examples in the run directory.
        progress: Show progress bars.

    Returns:
        The finished run.

    Raises:
        InputError: If the device, the data or the folder is not fit for the run.
        NonFiniteLossError: If a loss is inf or nan. The state before that step is kept in
            `checkpoint-failed.pt`, that of the last whole epoch in `checkpoint-last.pt`.
    """
    if not isinstance(config, RunConfig):
        raise InputError(
            f"fit takes a RunConfig, not {type(config).__name__}; a model of your own takes "
            "Trainer(config, model=...), or a loop of your own"
        )
    with distributed.joined():
        config, on = config.resolved(), pick_device(device)
        folder, first = Path(out) / config.name, distributed.first()
        if finished := read_finished(config, out, data_root, dataset):
            return finished
        trainer = Trainer(config, (dataset or load_data(config, data_root)).to(on))
        with runs.locked(folder) if first else nullcontext():  # what cannot start leaves no folder
            if first:
                runs.write_config(folder, config, on, trainer.dataset.digest)
            distributed.wait()
            _resume(trainer, folder)
            _train(trainer, folder, progress and first)
            with _stream(config.seed, config.epochs, on):  # models are built, to be loaded into
                result = _evaluate(trainer, folder, save_adversarial, progress and first)
            if first:
                runs.write_json(folder / runs.RESULT, result)
                (folder / "result-partial.json").unlink(missing_ok=True)
        if first:
            (folder / runs.LOCK).unlink(missing_ok=True)  # nobody writes to a complete run
        distributed.wait()
        return RunResult(folder, config, runs.read_metrics(folder, config.epochs), result)


def read_finished(
    config: RunConfig,
    out: Path | str,
    data_root: Path | None = None,
    dataset: data.Dataset | None = None,
) -> RunResult | None:
    """Reads the finished run of `config` in `out`; None where there is none.

    Arguments are those of `fit`. A run can be read where its data are gone.

    Raises:
        InputError: If it is a run on other images than those of `dataset`, or of the cache in
            `data_root`; or what is in its folder is no run of `config`.
    """
    config = config.resolved()
    folder = Path(out) / config.name
    if not (folder / runs.RESULT).exists():
        return None
    runs.check_config(folder, config)
    digest = dataset.digest if dataset else data.recorded_digest(config.dataset, data_root)
    runs.check_data(folder, digest)
    metrics = runs.read_metrics(folder, config.epochs)
    return RunResult(folder, config, metrics, runs.read_result(folder))


def _resume(trainer: Trainer, folder: Path) -> None:
    path = folder / runs.CHECKPOINTS["last"]
    if path.exists():
        state = runs.load_tensors(path, trainer.device)
        with runs.fits_config(path):
            trainer.load_state_dict(state)
    # an epoch that was counted but not kept is run again
    if distributed.first():
        runs.keep_metrics(folder, trainer.epoch)


def _train(trainer: Trainer, folder: Path, progress: bool) -> None:
    try:
        for metrics in _epochs(trainer, progress):
            if distributed.first():
                runs.append_metrics(folder, metrics)
                if trainer.best["epoch"] == trainer.epoch:
                    weights = {"epoch": trainer.epoch, "model": trainer.model.state_dict()}
                    runs.save_tensors(folder / runs.CHECKPOINTS["best"], weights)
                # last of all: from here on the epoch counts as done
                runs.save_tensors(folder / runs.CHECKPOINTS["last"], trainer.state_dict())
            distributed.wait()
    except NonFiniteLossError as error:
        failed = folder / "checkpoint-failed.pt"
        if distributed.first():
            runs.save_tensors(failed, trainer.state_dict())
        raise NonFiniteLossError(
            f"{error} The state before that step is in {failed}, that of "
            f"the last whole epoch (if any) in {runs.CHECKPOINTS['last']}."
        ) from None


def _epochs(trainer: Trainer, progress: bool) -> Iterator[dict[str, Any]]:
    epochs, steps, done = trainer.config.epochs, trainer.steps, trainer.epoch * trainer.steps
    with tqdm(total=epochs * steps, initial=done, unit="step", disable=not progress) as bar:

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            bar.set_description(name)
            for batch in trainer.batches():
                yield batch
                bar.update()
            bar.set_description(f"{name}, validation")

        while trainer.epoch < epochs:
            name = f"epoch {trainer.epoch + 1} of {epochs}"
            yield trainer.train_epoch(counted())


def _evaluate(trainer: Trainer, folder: Path, keep: bool, progress: bool) -> dict[str, Any]:
    # what a kill leaves of a finished checkpoint; its batches are kept beside the images
    done = folder / "result-partial.json"
    found: dict[str, Any] = runs.read_json(done) if done.exists() else {}
    images = {which: folder / f"adversarial-{which}.pt" for which in runs.CHECKPOINTS}
    first = distributed.first()
    if keep:  # an earlier call may have been told to keep none
        found = {which: facts for which, facts in found.items() if images[which].exists()}
    for which in [which for which in runs.CHECKPOINTS if which not in found]:
        if which == "best" and trainer.best["epoch"] == trainer.epoch:  # the same weights
            found[which] = found["last"]
            if first and keep:
                runs.link(images["last"], images[which])
            continue
        path = images[which] if first else None  # even of images that are not to stay
        evaluated = evaluate_run(folder, which, trainer.dataset, save_to=path, progress=progress)
        found[which] = evaluated.to_dict()
        if first:
            runs.write_json(done, found)
    if first and not keep:
        for path in images.values():
            path.unlink(missing_ok=True)
    result = {"data": trainer.dataset.title, **found}
    gap = result["best"]["robust_accuracy"] - result["last"]["robust_accuracy"]
    return {
        **result,
        "robust_overfitting_gap": gap,
        "environment": runs.environment(trainer.device) | {"data_sha256": trainer.dataset.digest},
    }


def build_scheduler(
    config: RunConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """Makes the schedule of a run, to be stepped after each step of the optimizer.

    "piecewise" divides the learning rate by 10 after a half and after three quarters of the steps,
    "trades" at the start of the epochs 75, 90 and 100, as the code of TRADES and MART; "cosine"
    takes it to 0; "one-cycle" raises it from a tenth over the first 30% of the steps and takes it
    to about 0; "cyclic" goes in straight lines from 0 to the learning rate and back, while the
    momentum goes down by 0.1 and back, as the code of Wong et al. 2020; "constant" leaves it.
    """
    steps = config.epochs * steps_per_epoch
    match config.schedule:
        case "piecewise":
            drops = [max(1, steps * k // 4) for k in (2, 3)]
            return lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
        case "trades":
            drops = [(epoch - 1) * steps_per_epoch for epoch in (75, 90, 100)]
            return lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
        case "cyclic":
            low = max(0.0, config.momentum - 0.1)
            half: Any = steps / 2  # torch says int, and takes halves
            return lr_scheduler.CyclicLR(
                optimizer, 0, config.lr, half, base_momentum=low, max_momentum=config.momentum
            )
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, steps)
        case "one-cycle":
            steps = max(steps, 2)  # a single step would be taken at a rate of 0
            return lr_scheduler.OneCycleLR(
                optimizer, config.lr, total_steps=steps, div_factor=10, cycle_momentum=False
            )
        case "constant":
            return lr_scheduler.ConstantLR(optimizer, factor=1.0)
