"""Clean and robust accuracy, recomputed from the adversarial examples themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from engm import models
from engm.attacks import FGSM, PGD, eval_mode, fooled
from engm.config import RunConfig
from engm.data import Dataset, Split, batches
from engm.errors import InputError
from engm.run_directory import CHECKPOINTS, fits_config, load_tensors, read_config, save_tensors

# float32 rounds x + perturbation: |x_adv - x| may exceed eps by some 1e-7
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Evaluation:
    """What an attack left of a model's accuracy.

    Attributes:
        clean_accuracy: Fraction of the examples that are classified rightly.
        robust_accuracy: Fraction that still is under the attack.
        num_examples: n, the number of examples.
        largest_perturbation: The largest norm of `x_adv - x`, in pixel units, at most eps.
        attack: What was tried, in words.
        x_adv: The adversarial examples, `[n, c, h, w]`, on the CPU.
    """

    clean_accuracy: float
    robust_accuracy: float
    num_examples: int
    largest_perturbation: float
    attack: str
    x_adv: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Returns all but `x_adv`, as plain JSON values."""
        return {k: v for k, v in vars(self).items() if k != "x_adv"}


def attack_of(config: RunConfig, *, num_steps: int | None = None) -> PGD:
    """Returns the PGD that a run is evaluated with; one that stops at broken examples.

    Args:
        config: The run.
        num_steps: PGD steps; `eval_steps` of the config where left out.

    Raises:
        InputError: If `num_steps` is not a whole number, 1 or more.
    """
    config = config.resolved()
    if num_steps is not None:
        config = replace(config, eval_steps=num_steps)
    assert config.eps
    steps = config.eval_steps
    step_size = 2.5 * config.eps / steps
    return PGD(
        eps=config.eps, step_size=step_size, num_steps=steps, norm=config.norm, stop_early=True
    )


def evaluate(
    model: nn.Module,
    split: Split,
    attack: PGD | FGSM,
    *,
    batch_size: int = 500,
    seed: int = 0,
    save_to: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Attacks every example of `split` and counts what is still classified rightly.

    Robust accuracy is recomputed from the adversarial examples as they were kept (read back from
    `save_to`, where given), after their norms and range were checked.

    Args:
        model: Takes pixels in [0, 1] and returns logits; evaluated in eval mode, left as it was.
        split: The examples, on the model's device.
        attack: For example `PGD(eps=8 / 255, step_size=1 / 255, num_steps=20, stop_early=True)`.
        batch_size: Examples attacked at a time.
        seed: Seed of the attack's random starts.
        save_to: File to keep `x_adv` in.
        progress: Show a progress bar.

    Returns:
        Accuracies as fractions, and the adversarial examples.

    Raises:
        InputError: If there is no example, or the attack returned examples outside its budget.
    """
    if len(split) == 0:
        raise InputError("there is no example to evaluate on")
    device = split.images.device
    generator = torch.Generator(device).manual_seed(seed)

    def examples() -> Iterator[tuple[Tensor, Tensor]]:
        return batches(split, batch_size, seed=seed, epoch=0, shuffle=False)

    with eval_mode(model):
        bar = tqdm(total=len(split), desc="attack", disable=not progress, leave=False)
        found = []
        for x, y in examples():
            found.append(attack(model, x, y, generator=generator).cpu())
            bar.update(len(x))
        bar.close()
        x_adv = torch.cat(found)
        if save_to is not None:
            save_tensors(save_to, {"x_adv": x_adv})
            x_adv = load_tensors(save_to)["x_adv"]
        clean = robust = 0
        largest = 0.0
        for (x, y), kept in zip(examples(), x_adv.split(batch_size), strict=True):
            largest = max(largest, _check(attack, x, kept.to(device)))
            clean += _count_correct(model, x, y)
            robust += _count_correct(model, kept.to(device), y)
    n = len(split)
    return Evaluation(clean / n, robust / n, n, largest, repr(attack), x_adv)


def build_model(config: RunConfig, dataset: Dataset) -> nn.Module:
    """Makes the untrained model of a run, for the classes and the channels of its dataset."""
    config = config.resolved()
    assert config.model is not None
    return models.build(
        config.model,
        num_classes=dataset.num_classes,
        width=config.width,
        norm=config.model_norm,
        in_channels=dataset.image_shape[0],
        mean=dataset.mean,
        std=dataset.std,
    )


def load_model(folder: Path, which: str, dataset: Dataset) -> nn.Module:
    """Returns the model of a checkpoint, in eval mode, on the dataset's device.

    Args:
        folder: A run directory.
        which: "best" or "last".
        dataset: The dataset of the run; it gives the number of classes and the shape of images.

    Raises:
        InputError: If there is no such checkpoint, it does not fit the run's config, or the dataset
            is another one.
    """
    if which not in CHECKPOINTS:
        raise InputError(f"unknown checkpoint {which!r}; choose one of {', '.join(CHECKPOINTS)}")
    config = read_config(folder)
    if dataset.name != config.dataset:
        raise InputError(f"{folder} is a run on {config.dataset}; it was given {dataset.name}")
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
    num_steps: int | None = None,
    save_to: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluates a checkpoint of a run on the test set, with the attack of its config.

    Args:
        folder: A run directory.
        which: "best" or "last".
        dataset: The dataset of the run.
        num_steps: PGD steps; `eval_steps` of the config where left out.
        save_to: File to keep the adversarial examples in.
        progress: Show a progress bar.
    """
    model, config = load_model(folder, which, dataset), read_config(folder)
    attack = attack_of(config, num_steps=num_steps)
    return evaluate(
        model, dataset.test, attack, seed=config.seed, save_to=save_to, progress=progress
    )


def _check(attack: PGD | FGSM, x: Tensor, x_adv: Tensor) -> float:
    if x_adv.shape != x.shape:
        raise InputError(f"{attack} returned shape {list(x_adv.shape)} for {list(x.shape)}")
    if not x_adv.isfinite().all() or x_adv.min() < 0 or x_adv.max() > 1:
        raise InputError(
            f"{attack} returned pixels outside [0, 1]; its accuracy would mean nothing"
        )
    order = float("inf") if attack.norm == "linf" else 2
    largest = (x_adv - x).flatten(1).norm(order, dim=1).max().item()
    if largest > attack.eps + _ROUNDING:
        raise InputError(f"{attack} left its budget: a perturbation is {largest:.6f} long")
    return largest


@torch.no_grad()
def _count_correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    return len(y) - int(fooled(model(x), y).sum())
