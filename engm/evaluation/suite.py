"""How robust a model is, under many attacks, and whether the number can be believed.

report = engm.evaluate(model, (x, y), eps=8 / 255)
print(report)
report.flags
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from engm.attacks import FGSM, PGD, Model, eval_mode
from engm.config import parse_number
from engm.data import Dataset, Split, stratified_order, to_float
from engm.errors import InputError, check_count
from engm.evaluation import checks
from engm.evaluation.accuracy import (
    Attack,
    Attacked,
    correct,
    digest,
    load_model,
    recount,
    run_attack,
)
from engm.evaluation.attacks import (
    RandomSearch,
    StraightThrough,
    TargetedPGD,
    Transfer,
    as_module,
    on_margin,
)
from engm.evaluation.autoattack import AutoAttack
from engm.evaluation.checks import Check
from engm.report.statistics import Interval, wilson
from engm.report.tables import markdown
from engm.runs import (
    CHECKPOINTS,
    environment,
    load_tensors,
    read_config,
    read_json,
    write_bytes,
    write_json,
)

# --- its report


@dataclass(frozen=True)
class Accuracy:
    """How many of `n` examples are classified rightly: `count`."""

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

    def cells(self) -> tuple[str, str]:
        """Returns the accuracy and its interval in percent."""
        interval = self.interval
        return f"{self.fraction:.1%}", f"{interval.low:.1%} to {interval.high:.1%}"


@dataclass(frozen=True)
class AttackResult:
    """What one attack, called `name` in the table, left.

    `largest_perturbation` is in pixel units; `file` has the adversarial examples that were counted.
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
            examples of the minimum over all attacks, those of the curve up to eps among them, and
            the clean image. The number to quote.
        curve: Accuracy under the attack `along` at several eps, from 0 to where any image may
            become any other.
        along: The attack of the curve: PGD on the margin, or without gradients the random search.
        checks: What was looked at; `flags` has those that did not pass.
        skipped: Attacks that could not run, with the reason.
        autoattack: What AutoAttack says of itself, where it ran: counts, warnings, versions.
        seed: Seed of all attacks.
        environment: Versions, commit, hardware.
        remark: What else a reader should know, such as where the report was written.
    """

    eps: float
    norm: str
    clean: Accuracy
    attacks: tuple[AttackResult, ...]
    worst: Accuracy
    curve: dict[float, Accuracy]
    along: str
    checks: tuple[Check, ...]
    skipped: dict[str, str]
    autoattack: dict[str, Any] | None
    seed: int
    environment: dict[str, Any]
    remark: str = ""

    @property
    def flags(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def gradient_masking(self) -> tuple[str, ...]:
        """The flags that say that gradients are hidden, or mislead the attacks."""
        return tuple(check.name for check in self.flags if check.name in checks.MASKING)

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
            "curve_attack": self.along,
            "curve": [{"eps": eps, **found.to_dict()} for eps, found in self.curve.items()],
            "checks": [dict(vars(check)) for check in self.checks],
            "gradient_masking": list(self.gradient_masking),
            "skipped": self.skipped,
            "autoattack": self.autoattack,
            "environment": self.environment,
        }

    def to_markdown(self) -> str:
        """Returns the tables that a person reads: accuracies, curve, checks."""
        last = "each example under the attack worst for it"
        rows = [
            ("clean", *self.clean.cells(), ""),
            *((r.name, *r.accuracy.cells(), r.settings) for r in self.attacks),
            *((name, "not run", "", reason) for name, reason in self.skipped.items()),
            ("**worst case**", *self.worst.cells(), last),
        ]
        head = ("attack", "accuracy", "95% interval", "settings")
        curve = "; ".join(f"{eps:.4g}: {a.fraction:.1%}" for eps, a in self.curve.items())
        flagged_first = sorted(self.checks, key=lambda check: check.passed)
        marks = [
            f"- {'pass' if c.passed else 'FLAG'} **{c.name}**: {c.meaning}" for c in flagged_first
        ]
        verdict = f"{len(self.flags)} of {len(self.checks)} checks raise a flag"
        masking = (
            f"Gradient masking ({', '.join(self.gradient_masking)}): gradients are hidden, or lead "
            "astray. What attacks leave is then no robustness, but an upper bound of it."
        )
        return "\n".join(
            [
                f"{self.clean.n} examples, {self.norm} eps {self.eps:.6g}, seed {self.seed}",
                "",
                markdown(head, rows),
                f"Accuracy over eps ({self.along}): {curve}",
                "",
                f"{verdict}:" if self.flags else f"All {len(self.checks)} checks pass:",
                "",
                *marks,
                *(["", masking] if self.gradient_masking else []),
                *(["", self.remark] if self.remark else []),
            ]
        )

    __str__ = to_markdown


def in_words(attack: Attack) -> str:
    """Says what an attack does, for the table."""
    if isinstance(attack, FGSM):
        return f"one step of {attack.eps:.4g}"
    if isinstance(attack, PGD):
        starts = f"{attack.restarts} random start" + "s" * (attack.restarts > 1)
        size = f"{attack.step_size:.4g}"
        length = f"from {size} down to 0" if attack.decay else f"of {size}"
        return f"{attack.num_steps} steps {length}, {starts if attack.random_start else 'from x'}"
    if isinstance(attack, RandomSearch):
        return f"{attack.num_queries} queries, no gradient"
    if isinstance(attack, TargetedPGD):
        return f"{attack.num_steps} steps towards each of {attack.targets} likely classes"
    if isinstance(attack, Transfer):
        return f"{in_words(attack.attack)}, on another model"
    plain = type(attack).__repr__ is object.__repr__
    return type(attack).__name__ if plain else repr(attack)


# --- the suite

_AUTOATTACK, _BLACK_BOX, _EOT = "AutoAttack", "random search", "PGD-20 margin, mean of draws"
_STEPS, _DRAWS = 20, 10


def standard_attacks(eps: float, norm: str = "linf", num_steps: int = _STEPS) -> dict[str, Attack]:
    """Returns the attacks that a model is evaluated with, under the names of the table.

    FGSM; PGD on three losses; the margin again from five random starts, and towards likely
    classes; and one attack that sees no gradient. Steps shrink from 2 eps to 0 (this kit): on small
    networks that finds as much as APGD at equal steps, and up to 3 points more than the constant
    2.5 eps / num_steps with which a run is watched and its `result.json` written.
    """
    eps = _budget(eps)
    pgd, margin = f"PGD-{num_steps}", on_margin(eps, norm, num_steps)
    return {
        "FGSM": FGSM(eps=eps, norm=norm),
        f"{pgd} cross-entropy": replace(margin, loss="ce"),
        f"{pgd} margin": margin,
        f"{pgd} DLR": replace(margin, loss="dlr"),
        f"{pgd} margin, 5 starts": replace(margin, restarts=5),
        f"{pgd} targeted": TargetedPGD(eps=eps, norm=norm, num_steps=num_steps),
        _BLACK_BOX: RandomSearch(eps=eps, norm=norm),
    }


_P = ParamSpec("_P")


def _one_pair(evaluate: Callable[_P, RobustnessReport]) -> Callable[_P, RobustnessReport]:
    # the y of evaluate(model, x, y) would end in a TypeError that names no way out
    @wraps(evaluate)
    def call(*given: _P.args, **options: _P.kwargs) -> RobustnessReport:
        if len(given) > 2:
            raise InputError(
                "images and classes are one argument, and all others have names: "
                "evaluate(model, (x, y), eps=8 / 255)"
            )
        model = options.get("model", given[0] if given else None)
        with _flags_kept(model) if isinstance(model, nn.Module) else nullcontext():
            return evaluate(*given, **options)

    return call


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    # whatever attacks do to the gradients of parameters
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in kept:
            parameter.requires_grad = flag
            parameter.grad = gradient


@_one_pair
@torch.inference_mode(False)
def evaluate(
    model: Model,
    data: Split | tuple[Any, Any],
    *,
    eps: float,
    norm: str = "linf",
    attacks: Mapping[str, Attack] | None = None,
    surrogate: Model | None = None,
    autoattack: bool = False,
    seed: int = 0,
    batch_size: int = 500,
    save_to: Path | str | None = None,
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

    PGD on the margin at eps always counts, whatever `attacks` are. A model that draws random
    numbers is also attacked by the mean of many draws; one without gradients by answers alone.

    Args:
        model: From `[n, ...]` pixels in [0, 1] to `[n, K]` logits; evaluated in eval mode, and left
            as it was. A plain function is taken as it is.
        data: A `Split`, or a pair of `[n, ...]` images (floats in [0, 1], or uint8) and `[n]`
            classes: tensors on the model's device, arrays, or lists.
        eps: Budget in pixel units, such as `8 / 255`.
        norm: "linf" or "l2".
        attacks: Attacks under the names of the table; by default `standard_attacks`.
        surrogate: A stand-in for a model without useful gradients, such as the model without its
            quantisation; attacks take its gradients at the model's own answers (BPDA).
        autoattack: Also run AutoAttack (`pip install 'engm[autoattack]'`), first, as it takes long;
            of its four attacks those that can run on such a model and such images.
        seed: Seed of all attacks.
        batch_size: Examples attacked at a time.
        save_to: Folder to keep the adversarial examples in, a file an attack; the accuracies are
            recomputed from what the files hold. Those of an earlier call are replaced;
            AutoAttack goes on there where it was killed.
        progress: Show progress bars.

    Returns:
        The report; `print` shows its tables.

    Raises:
        InputError: Before any long work, if model and data do not fit (pixels outside [0, 1],
            labels out of range, other devices, ...); after it, if an attack returned examples
            outside its budget, or changed the model or the images that it was given.
    """
    eps, seed = _budget(eps), check_count("seed", seed, 0)
    save_to = None if save_to is None else Path(save_to)
    x, y = _tensors(data, model)
    model = as_module(model, x.dtype)
    classes = checks.num_classes(model, x, y)
    source = model
    if surrogate is not None:
        stand_in = as_module(surrogate, x.dtype)
        try:
            others = checks.num_classes(stand_in, x, y)
        except InputError as error:
            raise InputError(f"surrogate does not fit: {error}") from None
        if others != classes:
            raise InputError(f"surrogate gives {others} logits, and the model {classes}")
        source = StraightThrough(model, stand_in)
    blind = checks.missing_gradient(source, x)
    suite, skipped = _suite(attacks, eps, norm, classes, blind)
    clean = correct(model, x, y, batch_size)
    judged = checks.before_attacks(model, source, x, y, clean, batch_size)
    judged.append(checks.unit_of(eps, norm))
    counted = dict(suite)

    def standard(radius: float) -> Attack:
        return RandomSearch(eps=radius, norm=norm) if blind else on_margin(radius, norm, _STEPS)

    if standard(eps) not in suite.values():
        counted[f"{_BLACK_BOX if blind else f'PGD-{_STEPS} margin'} (always)"] = standard(eps)
    if not blind and any(c.name == "randomness" and not c.passed for c in judged):
        # the gradient over many draws (EOT): Athalye et al. 2018, arXiv 1802.00420
        counted[_EOT] = Transfer(
            standard(eps), lambda x: torch.stack([source(x) for _ in range(_DRAWS)]).mean(0)
        )
    files = {} if save_to is None else _file_names([_AUTOATTACK, *counted])
    paths = {name: save_to / file for name, file in files.items()} if save_to else {}
    settings = {name: in_words(attack) for name, attack in counted.items()}
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    steady = not {check.name for check in judged if not check.passed} & _MOVES
    guard = _Guard(model, x[:batch_size], steady=steady)
    strongest = broken = None
    if autoattack:
        attack = AutoAttack(eps=eps, norm=norm, seed=seed)
        unfit = attack.unfit(x, classes, blind)
        skipped |= {f"{_AUTOATTACK} {name}": f"cannot run{why}" for name, why in unfit.items()}
        fit = tuple(name for name in attack.attacks if name not in unfit)
        if fit:
            attack = replace(attack, attacks=fit) if unfit else attack
            chunks = None if save_to is None else save_to / "autoattack-chunks"
            strongest = attack.run(source, x, y, save_to=chunks, **how)
            broken = recount(
                *(model, x, y, attack, strongest.x_adv.cpu()),
                claimed=strongest.robust.cpu(),
                batch_size=batch_size,
                save_to=paths.get(_AUTOATTACK),
            )
            settings[_AUTOATTACK] = f"{'a part' if unfit else 'standard'}: {', '.join(fit)}"

    def attacked_by(attack: Attack, path: Path | None = None) -> Attacked:
        if source is not model and not isinstance(attack, RandomSearch | Transfer):
            attack = Transfer(attack, source)
        outcome = run_attack(model, x, y, attack, seed=seed, save_to=path, **how)
        guard.check(attack)
        return outcome

    found = {}
    for name, attack in tqdm(counted.items(), "evaluation", disable=not progress, leave=False):
        outcome = attacked_by(attack, paths.get(name))
        if name == _EOT:
            drawn = [correct(model, outcome.x_adv, y, batch_size) for _ in range(_DRAWS)]
            judged = [checks.over_draws(check, drawn) for check in judged]
        # the images are in their file; in memory those of one attack are enough
        found[name] = replace(outcome, x_adv=outcome.x_adv[:0])
    # no two images are further apart than this
    whole = 1.0 if norm == "linf" else math.sqrt(x[0].numel())
    radii = [k * eps for k in (0.25, 0.5, 1, 2, 4) if k * eps < whole] + [whole]
    curve = {0.0: clean}
    smaller = [clean]
    for radius in tqdm(radii, "evaluation", disable=not progress, leave=False):
        known = [found[name] for name, attack in counted.items() if attack == standard(radius)]
        curve[radius] = (known[0] if known else attacked_by(standard(radius))).correct
        if radius < eps and steady:  # of a model that draws, each attack is one more draw
            smaller.append(curve[radius])
    judged += checks.after_attacks(suite, found, clean, y, curve, eps)
    given = _worst(clean, *(found[name] for name in suite))
    for name in counted:
        if name not in suite and name != _EOT:
            judged.append(checks.attacks_strong(given, name, found[name].correct))
    # what a smaller ball holds, the larger one does
    worst = _worst(clean, *found.values()) & torch.stack(smaller).all(0)
    if strongest is not None and broken is not None:
        judged.append(checks.autoattack_gap(broken.correct, worst))
        judged.append(checks.kept_results({_AUTOATTACK: broken}, eps))
        if strongest.warnings:
            judged.append(Check(checks.WARNINGS, False, "; ".join(strongest.warnings)))
        found[_AUTOATTACK], worst = broken, _worst(worst, broken)
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
        along=_BLACK_BOX if blind else "PGD on the margin",
        checks=tuple(judged),
        skipped=skipped,
        autoattack=None if strongest is None else strongest.to_dict(),
        seed=seed,
        environment=environment(x.device),
    )


# checks whose flag says that a model answers otherwise by itself
_MOVES = {"randomness", "batch statistics", "test-time training"}


class _Guard:
    """Sees to it that attacks leave a model as it is, of which the next ones are made.

    `steady` is whether it answers alike in two passes.
    """

    def __init__(self, model: nn.Module, x: Tensor, *, steady: bool) -> None:
        self._model, self._x, self._steady = model, x, steady
        self._state = {name: t.clone() for name, t in self._tensors().items()}
        self._answers = self._now()

    def _tensors(self) -> dict[str, Tensor]:
        values = self._model.state_dict().items()
        return {name: t for name, t in values if isinstance(t, Tensor)}

    def _now(self) -> Tensor:
        with torch.no_grad(), eval_mode(self._model):
            return self._model(self._x.clone())

    def check(self, attack: Attack) -> None:
        """Refuses an attack after which weights, buffers or answers are others."""
        if not self._steady:
            return
        now = self._tensors()
        # whole numbers may count calls
        floats = [name for name, t in self._state.items() if t.is_floating_point()]
        changed = [name for name in floats if not checks.same(self._state[name], now[name])]
        if changed:
            self._model.load_state_dict(self._state, strict=False)
            raise InputError(
                f"{in_words(attack)} changed the model ({changed[0]}); its weights and buffers are "
                "put back. Let it work in eval mode, or on a copy of the model"
            )
        if not checks.alike(self._answers, self._now()):
            raise InputError(
                f"after {in_words(attack)} the model answers clean images otherwise than before: "
                "the attack changed it, or it changes by itself, as by counting its calls"
            )


def _worst(standing: Tensor, *found: Attacked) -> Tensor:
    return torch.stack([standing, *(outcome.correct for outcome in found)]).all(0)


def _budget(eps: Any) -> float:
    with suppress(TypeError, ValueError):
        number = parse_number(eps) if isinstance(eps, str) else float(eps)
        if number > 0 and eps is not True:
            return eps if type(eps) is int else number
    raise InputError(f"eps must be above 0, got {eps!r}; it is in pixel units, as in 8/255")


def _tensors(data: Any, model: Any) -> tuple[Tensor, Tensor]:
    # arrays and lists become tensors on the model's device, half precision becomes float32
    if isinstance(data, Split):
        data = data.images, data.labels
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise InputError(
            f"data must be a Split or a pair (x, y), not {type(data).__name__}; a TensorDataset "
            "has them as data.tensors, a DataLoader gives them by "
            "x, y = (torch.cat(part) for part in zip(*loader))"
        )
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    device = tensors[0].device if tensors else "cpu"
    try:
        x, y = (
            part.detach().clone()
            if isinstance(part, Tensor)
            else torch.tensor(np.asarray(part)).to(device)
            for part in data
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"data must be a Split or a pair (x, y) of numbers: {error}") from None
    if x.dtype == torch.uint8:
        x = to_float(x)
    foreign = not isinstance(data[0], Tensor) and x.dtype == torch.float64
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if foreign or half else x, y.long() if whole else y


def _suite(
    attacks: Mapping[str, Attack] | None, eps: float, norm: str, classes: int, blind: str | None
) -> tuple[dict[str, Attack], dict[str, str]]:
    # what can run, and why the rest cannot
    if attacks is not None and not isinstance(attacks, Mapping):
        raise InputError('attacks must be a mapping of names, as in {"PGD": PGD(...)}')
    suite = dict(standard_attacks(eps, norm) if attacks is None else attacks)
    if not suite:
        raise InputError("there is no attack to run")
    skipped = {}
    for name, attack in list(suite.items()):
        if not callable(attack) or not hasattr(attack, "eps") or not hasattr(attack, "norm"):
            raise InputError(
                f"{name} must have eps and norm, and be called as attack(model, x, y, "
                "generator=...); a class of three lines does it"
            )
        if not math.isclose(attack.eps, eps, rel_tol=1e-6) or attack.norm != norm:
            raise InputError(f"{name} has {attack.norm} eps {attack.eps}, not {norm} eps {eps}")
        if classes < 3 and isinstance(attack, PGD | FGSM) and attack.loss == "dlr":
            skipped[name] = f"DLR needs 3 classes, here are {classes}"
        elif blind and isinstance(attack, PGD | FGSM | TargetedPGD):
            skipped[name] = "no gradient flows from the logits to the images"
        if name in skipped:
            del suite[name]
    return suite, skipped


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
    `evaluation-WHICH/`. Where there is an evaluation of the same epoch that has more in anything
    (images, an attack), or another budget, that one stays, and WHICH is followed by a number.

    Args:
        folder: A run directory.
        which: "best" or "last".
        dataset: The dataset of the run, on the device to use.
        eps: Budget; by default, as `num_steps` of PGD, that of the run.
        num_steps: See there.
        images: How many test images, evenly over the classes and always the same; by default all.
        autoattack: Also run AutoAttack; it goes on where an earlier call was cut off.
        progress: Show progress bars.

    Raises:
        InputError: If there is no such checkpoint, or an option is out of range.
    """
    config, test = read_config(folder).resolved(), dataset.test
    model = load_model(folder, which, dataset)
    if images is not None:
        check_count("images", images, 1, len(test))
        test = test.take(stratified_order(test.labels.cpu().numpy(), 0)[:images])
    eps = config.eps if eps is None else eps
    num_steps = config.eval_steps if num_steps is None else num_steps
    assert eps is not None
    attacks = standard_attacks(eps, config.norm, num_steps)
    how: dict[str, Any] = dict(eps=eps, norm=config.norm, attacks=attacks, autoattack=autoattack)
    what = {
        "checkpoint": which,
        "epoch": load_tensors(folder / CHECKPOINTS[which])["epoch"],
        "weights_sha256": digest("", model, {}),
        "data_sha256": dataset.digest,
    }
    name, number = which, 1
    while _has_more(folder / f"evaluation-{name}.json", what, len(test), **how):
        number += 1
        name = f"{which}-{number}"
    how |= dict(seed=config.seed, progress=progress, save_to=folder / f"evaluation-{name}")
    report = evaluate(model, test, **how)
    write_json(folder / f"evaluation-{name}.json", what | report.to_dict())
    from engm.plots import robustness_curve, to_png

    write_bytes(folder / f"robustness-{name}.png", to_png(robustness_curve(report)))
    if name == which:
        return report
    remark = (
        f"evaluation-{which}.json has what this evaluation has not (images, attacks, or another "
        f"eps): it stays, and `engm report` reads it; this one is evaluation-{name}.json."
    )
    return replace(report, remark=remark)


def _has_more(path: Path, what: Mapping[str, Any], images: int, **how: Any) -> bool:
    if not path.exists():
        return False
    try:
        old = read_json(path)
        weights = old.get("weights_sha256", what["weights_sha256"])  # earlier ones have none
        if (old["epoch"], weights) != (what["epoch"], what["weights_sha256"]):
            return False  # of other weights
        budget = old["eps"], old["norm"]
        settings = {found["settings"] for n, found in old["attacks"].items() if n != _AUTOATTACK}
        more = old["num_examples"] > images or bool(old["autoattack"]) > how["autoattack"]
    except (InputError, KeyError, TypeError, AttributeError):
        return False  # no evaluation
    attacks = [*how["attacks"].values(), on_margin(how["eps"], how["norm"], _STEPS)]
    new = {in_words(attack) for attack in attacks}
    return more or budget != (how["eps"], how["norm"]) or not settings <= new


def _file_names(names: list[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name in names:
        words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        while f"{words}.pt" in files.values():
            words += "-again"  # names that differ in signs alone
        files[name] = f"{words}.pt"
    return files
