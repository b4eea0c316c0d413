"""How robust a model is, under many attacks, and whether the number can be believed.

report = engm.evaluate(model, (x, y), eps=8 / 255)
print(report)
report.flags
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from engm.attacks import FGSM, PGD
from engm.data import Dataset, Split, stratified_order, to_float
from engm.errors import InputError
from engm.evaluation import checks
from engm.evaluation.accuracy import (
    Attack,
    correct,
    load_model,
    recount,
    run_attack,
)
from engm.evaluation.autoattack import AutoAttack
from engm.evaluation.checks import Check
from engm.evaluation.search import RandomSearch
from engm.report.statistics import Interval, wilson
from engm.report.tables import to_markdown
from engm.runs import (
    CHECKPOINTS,
    atomic_path,
    environment,
    load_tensors,
    read_config,
    write_json,
)

# --- its report


@dataclass(frozen=True)
class Accuracy:
    """How many of n examples are classified rightly; only those may be quoted with an interval.

    Attributes:
        count: Right ones.
        n: All.
    """

    count: int
    n: int

    @classmethod
    def of(cls, standing: Tensor) -> "Accuracy":
        """Counts `[n]` booleans."""
        return cls(int(standing.sum()), len(standing))

    @property
    def fraction(self) -> float:
        """The accuracy."""
        return self.count / self.n

    @property
    def interval(self) -> Interval:
        """Wilson's 95% interval: what n examples say about all others of their kind."""
        return wilson(self.count, self.n)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        ends = [self.interval.low, self.interval.high]
        return {"accuracy": self.fraction, "count": self.count, "interval": ends}

    def __str__(self) -> str:
        interval = self.interval
        return f"{self.fraction:.1%} | {interval.low:.1%} to {interval.high:.1%}"


@dataclass(frozen=True)
class AttackResult:
    """What one attack left.

    Attributes:
        name: Its name in the table.
        accuracy: Recomputed from the adversarial examples.
        settings: What it did, in words.
        largest_perturbation: In pixel units, at most eps.
        file: Where its adversarial examples are, in the folder that was asked for.
    """

    name: str
    accuracy: Accuracy
    settings: str
    largest_perturbation: float
    file: str | None


@dataclass(frozen=True)
class RobustnessReport:
    """What many attacks left of a model's accuracy, and what to think of it.

    Attributes:
        eps: Budget, in pixel units.
        norm: "linf" or "l2".
        clean: Accuracy without an attack.
        attacks: One entry an attack.
        worst: Accuracy when each example meets the attack that is worst for it: the mean over
            examples of the minimum over all attacks and the clean image. The number to quote.
        curve: Accuracy under PGD on the margin at several eps, from 0 to where any image may become
            any other.
        checks: What was looked at; `flags` has those that did not pass.
        skipped: Attacks that could not run, with the reason.
        autoattack: What AutoAttack says of itself, where it ran: counts, warnings, versions.
        seed: Seed of all attacks.
        environment: Versions, commit, hardware.
    """

    eps: float
    norm: str
    clean: Accuracy
    attacks: tuple[AttackResult, ...]
    worst: Accuracy
    curve: dict[float, Accuracy]
    checks: tuple[Check, ...]
    skipped: dict[str, str]
    autoattack: dict[str, Any] | None
    seed: int
    environment: dict[str, Any]

    @property
    def flags(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; accuracies are fractions."""
        return {
            **{key: getattr(self, key) for key in ("eps", "norm", "seed")},
            "num_examples": self.clean.n,
            "clean": self.clean.to_dict(),
            "attacks": {
                result.name: result.accuracy.to_dict()
                | {k: v for k, v in vars(result).items() if k not in ("name", "accuracy")}
                for result in self.attacks
            },
            "worst": self.worst.to_dict(),
            "curve": [{"eps": eps, **found.to_dict()} for eps, found in self.curve.items()],
            "checks": [dict(vars(check)) for check in self.checks],
            "skipped": self.skipped,
            "autoattack": self.autoattack,
            "environment": self.environment,
        }

    def to_markdown(self) -> str:
        """Returns the tables that a person reads: accuracies, curve, checks."""
        found = [("clean", str(self.clean), "")]
        found += [(r.name, str(r.accuracy), r.settings) for r in self.attacks]
        found += [(name, "not run | ", reason) for name, reason in self.skipped.items()]
        worst = "each example under the attack worst for it"
        rows = []
        for name, accuracy, settings in [*found, ("**worst case**", str(self.worst), worst)]:
            right, interval = accuracy.split(" | ")
            row = {"attack": name, "accuracy": right, "95% interval": interval}
            rows.append(row | {"settings": settings})
        curve = "; ".join(f"{eps:.4g}: {a.fraction:.1%}" for eps, a in self.curve.items())
        marks = [
            f"- {'pass' if c.passed else 'FLAG'} **{c.name}**: {c.meaning}" for c in self.checks
        ]
        verdict = f"{len(self.flags)} of {len(self.checks)} checks raise a flag"
        return "\n".join(
            [
                f"{self.clean.n} examples, {self.norm} eps {self.eps:.6g}, seed {self.seed}",
                "",
                to_markdown(rows),
                f"Accuracy over eps (PGD on the margin): {curve}",
                "",
                f"{verdict}:" if self.flags else f"All {len(self.checks)} checks pass:",
                "",
                *marks,
                *(f"- AutoAttack says: {w}" for w in (self.autoattack or {}).get("warnings", ())),
            ]
        )

    def __str__(self) -> str:
        return self.to_markdown()


def in_words(attack: Attack) -> str:
    """Says what an attack does, for the table."""
    if isinstance(attack, FGSM):
        return f"one step of {attack.eps:.4g}"
    if isinstance(attack, PGD):
        starts = f"{attack.restarts} random start" + "s" * (attack.restarts > 1)
        length = f"of {attack.step_size:.4g}"
        if attack.decay:
            length = f"from {attack.step_size:.4g} down to 0"
        return f"{attack.num_steps} steps {length}, {starts if attack.random_start else 'from x'}"
    if isinstance(attack, RandomSearch):
        return f"{attack.num_queries} queries, no gradient"
    return repr(attack)


# --- the suite

_AUTOATTACK, _BLACK_BOX = "AutoAttack", "random search"
_STEPS = 20


def standard_attacks(eps: float, norm: str = "linf", num_steps: int = _STEPS) -> dict[str, Attack]:
    """Returns the attacks that a model is evaluated with, under the names of the table.

    FGSM; PGD on three losses; the margin again from five random starts; and one attack that sees
    no gradient. Steps shrink from 2 eps to 0 (this kit): on small networks that finds as much as
    APGD at equal steps, and up to 3 points more than the constant 2.5 eps / num_steps with which a
    run is watched and its `result.json` written.
    """
    _check_eps(eps)
    pgd, margin = f"PGD-{num_steps}", _pgd_on_margin(eps, norm, num_steps)
    return {
        "FGSM": FGSM(eps=eps, norm=norm),
        f"{pgd} cross-entropy": replace(margin, loss="ce"),
        f"{pgd} margin": margin,
        f"{pgd} DLR": replace(margin, loss="dlr"),
        f"{pgd} margin, 5 starts": replace(margin, restarts=5),
        _BLACK_BOX: RandomSearch(eps=eps, norm=norm),
    }


def evaluate(
    model: nn.Module,
    data: Split | tuple[Tensor, Tensor],
    *,
    eps: float,
    norm: str = "linf",
    attacks: Mapping[str, Attack] | None = None,
    autoattack: bool = False,
    seed: int = 0,
    batch_size: int = 500,
    save_to: Path | None = None,
    progress: bool = False,
) -> RobustnessReport:
    """Attacks a model in many ways, and checks whether the outcome can be believed.

    Any module will do that takes pixels in [0, 1] and returns logits, trained here or not. One that
    wants other pixels gets a first layer:

        class Pixels(nn.Module):
            def forward(self, x):
                return (x - 0.5) / 0.25

        report = engm.evaluate(nn.Sequential(Pixels(), theirs), (x, y), eps=8 / 255)
        print(report)

    Args:
        model: From `[n, ...]` pixels in [0, 1] to `[n, K]` logits; evaluated in eval mode, and left
            as it was.
        data: A `Split`, or a pair of `[n, ...]` images (floats in [0, 1], or uint8) and `[n]` int64
            classes, on the model's device.
        eps: Budget in pixel units, such as `8 / 255`.
        norm: "linf" or "l2".
        attacks: Attacks under the names of the table; by default `standard_attacks`.
        autoattack: Also run AutoAttack (`pip install 'engm[autoattack]'`), first, as it takes long.
        seed: Seed of all attacks.
        batch_size: Examples attacked at a time.
        save_to: Folder to keep the adversarial examples in, a file an attack; the accuracies are
            recomputed from what the files hold. AutoAttack goes on there where it was killed.
        progress: Show progress bars.

    Returns:
        The report; `print` shows its tables.

    Raises:
        InputError: Before any long work, if model and data do not fit (pixels outside [0, 1],
            labels out of range, other devices, no gradients, ...); after it, if an attack returned
            examples outside its budget.
    """
    if isinstance(data, Split):
        data = data.images, data.labels
    if len(data) != 2 or not all(isinstance(tensor, Tensor) for tensor in data):
        given = " and ".join(type(part).__name__ for part in data[:5])
        raise InputError(f"data must be a Split or a pair of tensors (x, y), not {given}")
    images, y = data
    _check_eps(eps)
    x = to_float(images) if images.dtype == torch.uint8 else images
    classes = checks.num_classes(model, x, y)
    suite = dict(standard_attacks(eps, norm) if attacks is None else attacks)
    skipped = {}
    for name, attack in list(suite.items()):
        if attack.eps != eps or attack.norm != norm:
            raise InputError(f"{name} has {attack.norm} eps {attack.eps}, not {norm} eps {eps}")
        if classes < 3 and isinstance(attack, PGD | FGSM) and attack.loss == "dlr":
            skipped[name] = f"DLR needs 3 classes, here are {classes}"
            del suite[name]
    if not suite:
        raise InputError("there is no attack to run")
    settings = {name: in_words(attack) for name, attack in suite.items()}
    files: dict[str, str] = {}
    paths: dict[str, Path] = {}
    if save_to is not None:
        files = _file_names([_AUTOATTACK, *suite])
        paths = {name: save_to / file for name, file in files.items()}
    clean = correct(model, x, y, batch_size)
    judged = checks.before_attacks(model, x, y, clean, batch_size)
    strongest = None
    if autoattack:
        attack = AutoAttack(eps=eps, norm=norm, seed=seed)
        strongest = attack.run(
            model,
            x,
            y,
            batch_size=batch_size,
            save_to=None if save_to is None else save_to / "autoattack-chunks",
            progress=progress,
        )
        broken = recount(
            model,
            x,
            y,
            attack,
            strongest.x_adv.cpu(),
            claimed=strongest.robust.cpu(),
            batch_size=batch_size,
            save_to=paths.get(_AUTOATTACK),
        )
    attacked_by = partial(run_attack, model, x, y, batch_size=batch_size, seed=seed)
    found = {}
    for name, attack in tqdm(suite.items(), "evaluation", disable=not progress, leave=False):
        outcome = attacked_by(attack, save_to=paths.get(name), progress=progress)
        # the images are in their file; in memory those of one attack are enough
        found[name] = replace(outcome, x_adv=outcome.x_adv[:0])
    # no two images are further apart than this
    whole = 1.0 if norm == "linf" else math.sqrt(x[0].numel())
    radii = [k * eps for k in (0.25, 0.5, 1, 2, 4) if k * eps < whole] + [whole]
    curve = {0.0: clean}
    for radius in tqdm(radii, "evaluation", disable=not progress, leave=False):
        margin = _pgd_on_margin(radius, norm, _STEPS)
        known = [found[name] for name, attack in suite.items() if attack == margin]
        curve[radius] = (known[0] if known else attacked_by(margin)).correct
    judged += checks.after_attacks(suite, found, eps, curve)
    worst = torch.stack([clean, *(outcome.correct for outcome in found.values())]).all(0)
    if strongest is not None:
        judged.append(checks.autoattack_gap(broken.correct, worst))
        judged.append(checks.kept_results({_AUTOATTACK: broken}, eps))
        names = ", ".join(name for name in strongest.counts if name != "clean")
        settings[_AUTOATTACK] = f"standard: {names}"
        found[_AUTOATTACK], worst = broken, worst & broken.correct
    return RobustnessReport(
        eps=eps,
        norm=norm,
        clean=Accuracy.of(clean),
        attacks=tuple(
            AttackResult(
                name,
                Accuracy.of(outcome.correct),
                settings[name],
                outcome.largest_perturbation,
                files.get(name),
            )
            for name, outcome in found.items()
        ),
        worst=Accuracy.of(worst),
        curve={radius: Accuracy.of(standing) for radius, standing in curve.items()},
        checks=tuple(judged),
        skipped=skipped,
        autoattack=None if strongest is None else strongest.to_dict(),
        seed=seed,
        environment=environment(x.device),
    )


def evaluate_checkpoint(
    folder: Path,
    which: str,
    dataset: Dataset,
    *,
    eps: float | None = None,
    num_steps: int | None = None,
    images: int | None = None,
    autoattack: bool = False,
    progress: bool = False,
) -> RobustnessReport:
    """Evaluates a checkpoint of a run on the test set, and writes what was found beside it.

    The folder gets `evaluation-WHICH.json`, `robustness-WHICH.png`, and the adversarial examples in
    `evaluation-WHICH/`.

    Args:
        folder: A run directory.
        which: "best" or "last".
        dataset: The dataset of the run, on the device to use.
        eps: Budget; by default, as `num_steps`, that of the run.
        num_steps: PGD steps.
        images: How many test images, evenly over the classes and always the same; by default all.
        autoattack: Also run AutoAttack; it goes on where an earlier call was cut off.
        progress: Show progress bars.

    Raises:
        InputError: If there is no such checkpoint, or an option is out of range.
    """
    config, test = read_config(folder).resolved(), dataset.test
    model = load_model(folder, which, dataset)
    if images is not None:
        if images > len(test):
            raise InputError(f"there are {len(test)} test images, not {images}")
        test = test.take(stratified_order(test.labels.cpu().numpy(), 0)[:images])
    eps = config.eps if eps is None else eps
    num_steps = config.eval_steps if num_steps is None else num_steps
    assert eps is not None
    report = evaluate(
        model,
        test,
        eps=eps,
        norm=config.norm,
        attacks=standard_attacks(eps, config.norm, num_steps),
        autoattack=autoattack,
        seed=config.seed,
        save_to=folder / f"evaluation-{which}",
        progress=progress,
    )
    epoch = load_tensors(folder / CHECKPOINTS[which])["epoch"]
    what = {"checkpoint": which, "epoch": epoch, "data_sha256": dataset.digest}
    write_json(folder / f"evaluation-{which}.json", what | report.to_dict())
    from engm.plots import robustness_curve, to_png

    with atomic_path(folder / f"robustness-{which}.png") as path:
        path.write_bytes(to_png(robustness_curve(report)))
    return report


def _file_names(names: list[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name in names:
        words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        while f"{words}.pt" in files.values():
            words += "-again"  # names that differ in signs alone
        files[name] = f"{words}.pt"
    return files


def _check_eps(eps: float) -> None:
    if not eps > 0:
        raise InputError(f"eps must be above 0, got {eps!r}; it is in pixel units, as in 8/255")


def _pgd_on_margin(eps: float, norm: str, num_steps: int) -> PGD:
    return PGD(
        eps=eps,
        step_size=min(2 * eps, 1.0) if norm == "linf" else 2 * eps,
        num_steps=num_steps,
        norm=norm,
        loss="margin",
        decay=True,
        stop_early=True,
    )
