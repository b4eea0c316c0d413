"""Clean and robust accuracy, recomputed from the adversarial examples themselves."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from engm.attacks import FGSM, PGD, Model, eval_mode
from engm.config import RunConfig
from engm.data import Dataset, Split, to_float
from engm.errors import InputError, check_choice, check_count
from engm.models import build_model
from engm.runs import CHECKPOINTS, check_data, fits_config, load_tensors, read_config, save_tensors

# float32 rounds x + perturbation: |x_adv - x| may exceed eps by some 1e-7
_ROUNDING = 1e-5


class Attack(Protocol):
    """What an evaluation needs of an attack; `PGD`, `FGSM` and `RandomSearch` have it."""

    @property
    def eps(self) -> float:
        """Radius of the ball, in pixel units."""

    @property
    def norm(self) -> str:
        """Norm of the ball, "linf" or "l2"."""

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns x_adv for a batch."""


@dataclass(frozen=True)
class Attacked:
    """What an attack did to each of n examples; tensors are on the CPU.

    Attributes:
        correct: Whether the model still is right, `[n]` booleans, recomputed from `x_adv` as kept.
        claimed: The same before `x_adv` was written; it differs where the file or the model does.
        largest_perturbation: The largest norm of `x_adv - x`, in pixel units, at most eps.
        x_adv: The adversarial examples.
        answers: What the model says of each, `[n]` classes, -1 where a logit is nan.
    """

    correct: Tensor
    claimed: Tensor
    largest_perturbation: float
    x_adv: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What an attack left of a model's accuracy; accuracies are fractions of `num_examples`.

    The rest is as in `Attacked`; `attack` is its kind and settings, as plain JSON values.
    """

    clean_accuracy: float
    robust_accuracy: float
    num_examples: int
    largest_perturbation: float
    attack: dict[str, Any]
    x_adv: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Returns all but `x_adv`, as plain JSON values."""
        return {k: v for k, v in vars(self).items() if k != "x_adv"}


def settings_of(attack: Attack) -> dict[str, Any]:
    """Returns the kind and the settings of an attack, as plain JSON values."""
    kind = type(attack).__name__
    return {"kind": kind, **asdict(attack)} if is_dataclass(attack) else {"kind": repr(attack)}


def attack_of(config: RunConfig, *, num_steps: int | None = None) -> PGD:
    """Returns the PGD that a run is evaluated with, of `eval_steps` or `num_steps`."""
    config = config.resolved()
    assert config.eps
    steps = config.eval_steps if num_steps is None else num_steps
    size = 2.5 * config.eps / steps
    return PGD(eps=config.eps, step_size=size, num_steps=steps, norm=config.norm, stop_early=True)


def validation_attack(config: RunConfig) -> PGD:
    """Returns the PGD that a run is watched with, of as many steps as its training takes.

    A single one would see no catastrophic overfitting, and choose the wrong epoch: there it gets
    the steps of the evaluation.
    """
    config = config.resolved()
    return attack_of(config, num_steps=None if config.method == "fast_at" else config.num_steps)


def accuracy_under(
    model: nn.Module,
    split: Split,
    attack: Attack,
    *,
    batch_size: int = 500,
    seed: int = 0,
    save_to: Path | None = None,
    progress: bool | str = False,
) -> Evaluation:
    """Attacks every example of `split` with one attack and counts what is still classified rightly.

    It is what training uses; `engm.evaluate` runs many attacks and says what to think of them.
    Robust accuracy is recomputed from the adversarial examples as they were kept (read back from
    `save_to`, where given), after their norms and range were checked.

    Args:
        model: Takes pixels in [0, 1] and returns logits; evaluated in eval mode, left as it was.
        split: The examples, on the model's device.
        attack: For example `PGD(eps=8 / 255, step_size=1 / 255, num_steps=20, stop_early=True)`.
        batch_size: Examples attacked at a time.
        seed: Seed of the attack's random starts.
        save_to: File to keep `x_adv` in.
        progress: Show a progress bar, under this name where it is text.

    Raises:
        InputError: If there is no example; or the attack returned examples outside its budget, or
            changed the images that it was given.
    """
    if len(split) == 0:
        raise InputError("there is no example to evaluate on")
    how: dict[str, Any] = dict(batch_size=batch_size, seed=seed, save_to=save_to, progress=progress)
    found = run_attack(model, split.images, split.labels, attack, **how)
    clean = correct(model, split.images, split.labels, batch_size)
    return Evaluation(
        clean_accuracy=int(clean.sum()) / len(split),
        robust_accuracy=int(found.correct.sum()) / len(split),
        num_examples=len(split),
        largest_perturbation=found.largest_perturbation,
        attack=settings_of(attack),
        x_adv=found.x_adv,
    )


def run_attack(
    model: nn.Module,
    images: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    batch_size: int = 500,
    seed: int = 0,
    save_to: Path | None = None,
    progress: bool | str = False,
) -> Attacked:
    """Attacks every image, in batches; what `accuracy_under` counts, for each example.

    With `save_to`, finished batches of `PGD` and `FGSM` are kept beside it until all are, so that
    the same call goes on after a kill, and ends as one that was left alone.

    Args and errors are those of `accuracy_under`; `images` are `[n, ...]`, uint8 or floats in
    [0, 1], and `y` their `[n]` int64 classes.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    # the repr of these says all that they do; others may hide a model, or code that changed
    folder = save_to.with_suffix(".parts") if save_to and isinstance(attack, PGD | FGSM) else None
    parts = []
    name = progress if isinstance(progress, str) else "attack"
    with tqdm(total=len(y), desc=name, disable=not progress, leave=False) as bar:
        for rows in _rows(len(y), batch_size):
            path, x = None, _pixels(images[rows])
            if folder is not None:
                with eval_mode(model):
                    state = behaviour(model, x) | {"generator": generator.get_state()}
                state |= {"x": x, "y": y[rows]}
                path = folder / f"{digest(repr(attack), model, state)}.pt"
            part = kept(path, "cpu", partial(_attacked, model, attack, x, y[rows], generator))
            generator.set_state(part["generator"])
            parts.append(part["x_adv"])
            bar.update(len(x))
    found = recount(
        model, images, y, attack, torch.cat(parts), batch_size=batch_size, save_to=save_to
    )
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _attacked(
    model: nn.Module, attack: Attack, x: Tensor, y: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    given = x.clone()
    with eval_mode(model):
        x_adv = attack(model, given, y.clone(), generator=generator)
    if not torch.equal(given, x):
        raise InputError(
            f"{type(attack).__name__} changed the images that it was given, in place; let it start "
            "from x.clone()"
        )
    shape = list(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
    if shape != list(x.shape):
        raise InputError(f"{attack} returned shape {shape} for {list(x.shape)}")
    return {"x_adv": x_adv.detach().cpu(), "generator": generator.get_state()}


def recount(
    model: nn.Module,
    images: Tensor,
    y: Tensor,
    attack: Attack,
    x_adv: Tensor,
    *,
    claimed: Tensor | None = None,
    batch_size: int = 500,
    save_to: Path | None = None,
) -> Attacked:
    """Judges adversarial examples, on the CPU, by themselves; with `save_to`, as read back from it.

    One outside the budget of `attack` is an `InputError`.
    """
    if save_to is not None:
        if claimed is None:
            claimed = correct(model, x_adv, y, batch_size)
        save_tensors(save_to, {"x_adv": x_adv})
        x_adv = load_tensors(save_to)["x_adv"]
    order, lengths = float("inf") if attack.norm == "linf" else 2, []
    for rows in _rows(len(images), batch_size):
        there = x_adv[rows].to(images.device)
        if not there.isfinite().all() or there.min() < 0 or there.max() > 1:
            raise InputError(
                f"{attack} returned pixels outside [0, 1]; its accuracy would mean nothing"
            )
        delta = (there - _pixels(images[rows])).flatten(1)
        lengths.append(delta.norm(order, dim=1).max().item())
    largest = max(lengths)
    if largest > attack.eps + _ROUNDING:
        raise InputError(f"{attack} left its budget: a perturbation is {largest:.6f} long")
    answered = answers(model, x_adv, y.device, batch_size)
    again = answered == y.cpu()
    return Attacked(again, again if claimed is None else claimed, largest, x_adv, answered)


def correct(model: nn.Module, images: Tensor, y: Tensor, batch_size: int = 500) -> Tensor:
    """Returns which images are classified as `y`, in eval mode: `[n]` booleans on the CPU.

    `images` are `[n, ...]`, uint8 or floats in [0, 1], taken to the device of `y` batch by batch.
    """
    return answers(model, images, y.device, batch_size) == y.cpu()


@torch.no_grad()
def answers(
    model: nn.Module, images: Tensor, device: torch.device, batch_size: int = 500
) -> Tensor:
    """Returns the class that the model answers for each image, -1 where a logit is nan: `[n]`."""
    found = []
    with eval_mode(model):
        for rows in _rows(len(images), batch_size):
            logits = model(_pixels(images[rows].to(device)))
            found.append(logits.argmax(1).masked_fill(logits.isnan().any(1), -1))
    return torch.cat(found).cpu()


# --- what is kept across a kill


def digest(call: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Returns a name for what decides a result: 32 hex digits of a SHA-256.

    Plain attributes of a model may decide what it answers: put its `behaviour` into `tensors`.
    """
    found = hashlib.sha256(call.encode())
    for name, tensor in [*tensors.items(), *model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def behaviour(model: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Returns what a model answers on images and beside them, and a gradient, if there is one.

    A defence may leave clean images alone, and its backward pass may be another than its forward
    pass: clean logits do not tell such models apart.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
    beside = x.detach().lerp(noise, 0.1)
    with torch.no_grad():
        found = {"logits": model(x.clone()), "beside": model(beside.clone())}
    classes = found["beside"].shape[1]
    weights = torch.rand(classes, generator=generator, dtype=torch.float64).to(found["beside"])
    with torch.enable_grad(), suppress(RuntimeError):  # of a model without gradients
        here = beside.requires_grad_()
        (found["gradient"],) = torch.autograd.grad((model(here) @ weights).sum(), here)
    return found


def kept(
    path: Path | None, device: torch.device | str, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Returns what the file `path` holds; where there is none, makes it first."""
    if path is None:
        return make()
    if path.exists():
        return load_tensors(path, device)
    # a kill in the middle of a write leaves its temporary file
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink()
    made = make()
    save_tensors(path, made)
    return made


# --- checkpoints


def load_model(folder: Path, which: str, dataset: Dataset) -> nn.Module:
    """Returns the model of a checkpoint, in eval mode, on the dataset's device.

    Raises:
        InputError: If there is no such checkpoint, it does not fit the run's config, or the dataset
            is another one.
    """
    check_choice("checkpoint", which, CHECKPOINTS)
    config = read_config(folder)
    if dataset.name != config.dataset:
        raise InputError(f"{folder} is a run on {config.dataset}; it was given {dataset.name}")
    check_data(folder, dataset.digest)
    model = build_model(config, dataset)
    path = folder / CHECKPOINTS[which]
    state = load_tensors(path)
    with fits_config(path):
        model.load_state_dict(state["model"])
    return model.to(dataset.test.images.device).eval()


def evaluate_run(
    folder: Path,
    which: str,
    dataset: Dataset,
    *,
    save_to: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluates a checkpoint of a run on the test set, with attack and seed of its config.

    Arguments are those of `load_model` and `accuracy_under`.
    """
    model, config = load_model(folder, which, dataset), read_config(folder)
    return accuracy_under(
        model,
        dataset.test,
        attack_of(config),
        seed=config.seed,
        save_to=save_to,
        progress=progress and f"attack on the {which} checkpoint",
    )


def _rows(count: int, batch_size: int) -> list[slice]:
    check_count("batch_size", batch_size)
    return [slice(start, start + batch_size) for start in range(0, count, batch_size)]


def _pixels(images: Tensor) -> Tensor:
    # always a copy: neither a model nor an attack gets hold of the caller's images
    return images.clone() if images.is_floating_point() else to_float(images)
