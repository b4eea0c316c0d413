"""What an outer step costs: time and peak memory of ENGM and of other libraries' ways to its step.

Every number is also a ratio to plain MSGD, measured in the same run. Two steps are measured: the
outer step alone, and, for the kit's own optimizers, the whole AT step, whose attack comes first.

Time: the methods take turns (A B C A B C ...), so that a slow moment of the machine meets all of
them, and a ratio is that of two times of one round; what is reported is the median over the rounds
and the quartiles, see `engm.bench.costs.seconds`. "input" measures the norms exactly in one step of
twenty: both kinds of step are measured, and its time is a twentieth of the one and nineteen
twentieths of the other.

Memory: the most that the step held at one time above what it found when it began (weights and
momentum), see `engm.bench.costs.peak_bytes`.

All methods have a copy of the same model, which the learning rate 0 leaves as it is, and the same
images. Before anything is timed each method's gradient is compared with that of `Watch`.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from engm import methods, models
from engm.bench.costs import peak_bytes, reason, seconds, summarise
from engm.bench.peers import PEERS
from engm.config import RunConfig
from engm.device import Precision, pick_device
from engm.errors import InputError
from engm.norms.inputs import Fit
from engm.norms.measures import Closure, ExactMeasure
from engm.optim import ENGM, MSGD, example_weights
from engm.runs import environment

METHODS = ("msgd", "exact", "input", "loop", *PEERS)
# The peers' AT step would only add the same attack.
WHOLE = ("msgd", "exact", "input")
STEPS = ("outer", "at")
REFRESH_EVERY = 20
LARGEST_LOOP = 16
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
_SETTINGS = (
    *("model", "width", "model_norm", "batch_size", "num_steps", "precision", "channels_last"),
    "seed",
)


@dataclass(frozen=True)
class _Task:
    """What every method is given."""

    config: RunConfig
    model: nn.Module
    x: Tensor
    x_adv: Tensor
    y: Tensor
    precision: Precision

    def autocast(self) -> torch.autocast:
        return self.precision.autocast(self.x.device)

    def closure(self, model: nn.Module, images: Tensor) -> Closure:
        def losses() -> Tensor:
            with self.autocast():
                return cross_entropy(model(images), self.y, reduction="none")

        return losses

    def attack(self, model: nn.Module) -> Tensor:
        with self.autocast():
            return methods.build(self.config).attack(model, self.x, self.y)


@dataclass(frozen=True)
class _Part:
    """One kind of step of a method; `share` of its steps are of this kind."""

    name: str
    share: float
    optimizer: MSGD | ENGM


def run(
    config: RunConfig,
    *,
    image_size: int = 32,
    repeats: int = 15,
    names: Sequence[str] = METHODS,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures one step of each method, on random images and labels.

    Args:
        config: Model, batch size, attack and precision; of the dataset only channels and classes
            matter, which are those of CIFAR-10.
        image_size: Height and width of the images.
        repeats: Rounds.
        names: Which of `METHODS`; "msgd" is always one.
        device: As for `engm.training.fit`.

    Returns:
        `command`, `settings`, `environment`, and for each of `methods` either a `reason` why it
        could not be measured, or for "outer" and "at": all `seconds`, `median_seconds`, the time
        `ratio` to MSGD with its quartiles `low` and `high`, `peak_bytes` and `peak_ratio`; besides,
        whether its gradient `agrees`, with the relative `errors`.

    Raises:
        InputError: If a name is unknown or a number is out of range.
    """
    config = config.resolved()
    _check(names, image_size=image_size, repeats=repeats)
    names = [name for name in METHODS if name in names or name == "msgd"]
    target = pick_device(device)
    found: dict[str, dict[str, Any]] = {}
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        task = _task(config, image_size, target)
        able: dict[str, tuple[nn.Module, list[_Part]]] = {}
        reference = _Reference(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how peers speak of hooks, and "input" of its fit
            for name in tqdm(names, "warm-up"):
                try:
                    able[name], found[name] = _prepare(task, name, reference)
                except Exception as error:
                    if name == "msgd":
                        raise  # nothing to compare with
                    found[name] = {"reason": reason(error)}
            del reference
            for step in STEPS:
                chosen = {n: able[n] for n in able if step == "outer" or n in WHOLE}
                for name, entry in _measure(task, chosen, step == "at", repeats).items():
                    found[name][step] = entry
    settings = dict(
        **{name: getattr(config, name) for name in _SETTINGS},
        image_size=image_size,
        repeats=repeats,
        methods=",".join(names),
    )
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in settings.items() if k != "channels_last"]
    flags += ["--channels-last"] if config.channels_last else []
    return {
        "command": " ".join(["engm bench", *flags, f"--device {target.type}"]),
        "settings": settings,
        "environment": {**environment(target), "peers": _versions()},
        "methods": found,
    }


class _Reference:
    """Gradients to compare with: that of the sum, by autograd, and the weighted one, by `Watch`."""

    def __init__(self, task: _Task) -> None:
        model = copy.deepcopy(task.model)
        parameters = list(model.parameters())
        losses = task.closure(model, task.x_adv)()
        self.total = _flat(list(torch.autograd.grad(losses.sum(), parameters)))
        _, norms, weighted = ExactMeasure(model)(task.closure(model, task.x_adv), None)
        self.scale = float(norms.mean())
        self.weights = example_weights(norms, self.scale, task.config.floor)
        gradients = weighted(self.weights, None)
        self.weighted = _flat([gradients[p] for p in parameters])


def _prepare(
    task: _Task, name: str, reference: _Reference
) -> tuple[tuple[nn.Module, list[_Part]], dict[str, Any]]:
    model = copy.deepcopy(task.model)
    parts = _parts(task, name, model)
    optimizer = parts[-1].optimizer
    errors = {}
    if isinstance(optimizer, ENGM):
        errors = _errors(task, name, model, optimizer, reference)
        if not all(map(math.isfinite, errors.values())):
            raise InputError("its gradient is inf or nan")
    for part in parts:
        _step(task, model, part.optimizer, whole=False)
    tolerance = TOLERANCES[task.config.precision]
    agrees = all(error <= tolerance for error in errors.values())
    return (model, parts), {"agrees": agrees, "errors": errors}


def _parts(task: _Task, name: str, model: nn.Module) -> list[_Part]:
    config = task.config
    if name == "msgd":
        sgd = dict(momentum=config.momentum, weight_decay=config.weight_decay)
        return [_Part("step", 1.0, MSGD(model.parameters(), lr=0.0, **sgd))]
    if name == "loop" and len(task.x) > LARGEST_LOOP:
        raise InputError(
            f"it takes {len(task.x)} backward passes, and is measured up to batch size "
            f"{LARGEST_LOOP}"
        )

    def engm(norms: Any, refresh_every: int = 1) -> ENGM:
        found = ENGM(
            model, 0.0, config.momentum, config.weight_decay,
            norms=norms, refresh_every=refresh_every,
        )  # fmt: skip
        if name in PEERS:
            found.measure = PEERS[name](model, task.y, task.autocast)  # type: ignore[assignment]
        return found

    if name == "input":
        share = 1 / REFRESH_EVERY
        never_again = engm("input", 10**9)
        return [_Part("refresh", share, engm("input")), _Part("plain", 1 - share, never_again)]
    return [_Part("step", 1.0, engm(name if name in ("exact", "loop") else "exact"))]


def _errors(
    task: _Task, name: str, model: nn.Module, optimizer: ENGM, reference: _Reference
) -> dict[str, float]:
    parameters = list(model.parameters())
    closure = task.closure(model, task.x_adv)
    _, norms, weighted = optimizer.measure(closure, task.x_adv)
    gradients = weighted(torch.ones_like(norms), None)
    errors = {"sum": _distance([gradients[p] for p in parameters], reference.total)}
    if name == "input":
        # On random images the line may explain too little; what a step costs that trusts it does
        # not depend on whether it should.
        optimizer.measure.estimate.fits.append(Fit(1, 1.0, 1.0, 1.0, 1.0))  # type: ignore[union-attr]
    _, norms, weighted = optimizer.measure(closure, task.x_adv)
    weights = example_weights(norms, reference.scale, task.config.floor)
    # estimates are not meant to be equal, nor are shares and gradients of single losses
    batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    given = name == "input" or (name == "loop" and batch_norm)
    gradients = weighted(reference.weights if given else weights, None)
    errors["weighted"] = _distance([gradients[p] for p in parameters], reference.weighted)
    return errors


def _measure(
    task: _Task, able: Mapping[str, tuple[nn.Module, list[_Part]]], whole: bool, repeats: int
) -> dict[str, dict[str, Any]]:
    device = task.x.device
    peaks: dict[str, int] = {}
    works: dict[str, dict[str, Callable[[], None]]] = {}
    for name, (model, parts) in able.items():
        works[name] = {
            part.name: lambda m=model, o=part.optimizer: _step(task, m, o, whole)  # type: ignore[misc]
            for part in parts
        }
        for part in parts:
            works[name][part.name]()  # from now on there is a momentum
        peaks[name] = 0
        for part in parts:
            part.optimizer.zero_grad()
            peaks[name] = max(peaks[name], peak_bytes(works[name][part.name], device))
    raw: dict[str, dict[str, list[float]]] = {n: {p: [] for p in works[n]} for n in works}
    for _ in tqdm(range(repeats), "AT step" if whole else "outer step"):
        for name in works:
            for kind, work in works[name].items():
                torch.manual_seed(task.config.seed)  # the same random starts of the attack
                raw[name][kind].append(seconds(work, device))
    shares = {name: {part.name: part.share for part in parts} for name, (_, parts) in able.items()}
    amortised = {
        name: [sum(shares[name][kind] * times[kind][k] for kind in times) for k in range(repeats)]
        for name, times in raw.items()
    }
    summary = summarise(amortised, peaks)
    return {name: {"seconds": raw[name], **summary[name]} for name in summary}


def _step(task: _Task, model: nn.Module, optimizer: MSGD | ENGM, whole: bool) -> None:
    images = task.attack(model) if whole else task.x_adv
    optimizer.zero_grad()
    optimizer.step(task.closure(model, images), inputs=images)


def _task(config: RunConfig, image_size: int, device: torch.device) -> _Task:
    torch.manual_seed(config.seed)
    precision = Precision.of(config)
    layout = precision.memory_format
    model = models.build(config.model or "", width=config.width, norm=config.model_norm)
    model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
    assert config.batch_size and config.eps
    x = torch.rand(config.batch_size, 3, image_size, image_size)
    y = torch.randint(10, (config.batch_size,))
    x, y = x.to(device, memory_format=layout), y.to(device)
    x_adv = (x + config.eps * torch.randn_like(x).sign()).clamp(0, 1)
    return _Task(config, model, x, x_adv, y, precision)


def _check(names: Sequence[str], **counts: int) -> None:
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise InputError(f"unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number, 1 or more; got {value!r}")


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.detach().float().flatten() for gradient in gradients])


def _distance(gradients: Sequence[Tensor], expected: Tensor) -> float:
    return float((_flat(gradients) - expected).norm() / expected.norm())


def _versions() -> dict[str, str]:
    found = {}
    for name in ("opacus", "backpack-for-pytorch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
