"""What an outer step costs: time and peak memory of ENGM and of other libraries' ways to its step.

Every number is also a ratio to plain MSGD, measured in the same run. Two steps are measured: the
outer step alone, and, for the kit's own optimizers, the whole AT step, whose attack comes first.
The rows of ENGM are named after its `norms`: "exact", and "exact-first" for a step that checks the
model, as the first one does; "input" and "both" with a line that is fitted in one step of twenty;
"input-only" and "output" without a line.

Time: the methods take turns (A B C A B C ...), so that a slow moment of the machine meets all of
them, and a ratio is that of two times of one round; what is reported is the median over the rounds
and the quartiles, see `engm.bench.measuring.seconds`. A line needs exact norms in one step of
twenty: both kinds of step are measured, and the time is a twentieth of the one and nineteen
twentieths of the other.

Memory: the most that the step held at one time above what it found when it began (weights and
momentum), see `engm.bench.measuring.peak_bytes`.

All methods have a copy of the same model, which the learning rate 0 leaves as it is, and the same
images. Before anything is timed, each method's gradient is compared with what autograd gives for
the losses, weighted by the exact norms; estimates, and "loop" with BatchNorm, whose norms are
meant to differ, with the losses weighted by their own.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from engm import methods, models
from engm.bench.measuring import able_ones, command_line, peak_bytes, ratios, seconds
from engm.bench.peers import PEERS, PeerSGD
from engm.config import RunConfig
from engm.device import Precision, pick_device
from engm.errors import InputError, check_choice, check_count
from engm.norms.watch import Checked
from engm.optim import ENGM, MSGD, Norms
from engm.runs import environment

# ENGM's `norms`, and whether a line is fitted to them
WAYS: dict[str, tuple[Norms, bool]] = {
    "exact": ("exact", False),
    "exact-first": ("exact", False),
    "input": ("input", True),
    "input-only": ("input", False),
    "output": ("output", False),
    "both": ("both", True),
    "loop": ("loop", False),
}
METHODS = ("msgd", *WAYS, *PEERS)
# The attack is the same for all; the peers and the loop are slow without it.
WHOLE = ("msgd", *(name for name in WAYS if name != "loop"))
STEPS = ("outer", "at")
REFRESH_EVERY = 20
_NEVER = 10**9
# What part of a method's steps is of a kind.
_FRACTIONS = {"step": 1.0, "refresh": 1 / REFRESH_EVERY, "plain": 1 - 1 / REFRESH_EVERY}
LARGEST_LOOP = 16
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
Optimizer = MSGD | ENGM | PeerSGD
_SETTINGS = (
    *("model", "width", "model_norm", "batch_size", "num_steps", "precision", "channels_last"),
    "seed",
)


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
        whether its gradient `agrees`, with the relative `error`.

    Raises:
        InputError: If a name is unknown or a number is out of range.
    """
    config = config.resolved()
    for name in names:
        check_choice("method", name, METHODS)
    check_count("image_size", image_size)
    check_count("repeats", repeats)
    names = [name for name in METHODS if name in names or name == "msgd"]
    target = pick_device(device)
    with (
        torch.random.fork_rng(devices=[target] if target.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # how peers speak of hooks, and "input" of its fit
        batch = _Batch(config, image_size, target)
        able, results = able_ones(names, partial(_build_warm, batch))
        for name, method in able.items():
            agrees = method.error <= TOLERANCES[config.precision]
            results[name] = {"agrees": agrees, "error": method.error}
        for step in STEPS:
            chosen = {n: m for n, m in able.items() if step == "outer" or n in WHOLE}
            for name, costs in _measure(batch, chosen, step == "at", repeats).items():
                results[name][step] = costs
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings |= {"image_size": image_size, "repeats": repeats, "methods": ",".join(names)}
    return {
        "command": command_line(settings, target),
        "settings": settings,
        "environment": environment(target) | {"peers": _versions()},
        "methods": {name: results[name] for name in names},
    }


class _Batch:
    """What every method is given: the model's weights, random images and labels.

    Attributes:
        x_adv: Images within eps of `x`, for the outer step alone.
        weights: w_i of the exact norms, `[n]`.
    """

    def __init__(self, config: RunConfig, image_size: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.precision = config, Precision.of(config)
        self.method = methods.build(config)
        layout = self.precision.memory_format
        model = models.build(config.model or "", width=config.width, norm=config.model_norm)
        self.model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        assert config.batch_size and config.eps
        x = torch.rand(config.batch_size, 3, image_size, image_size)
        y = torch.randint(10, (config.batch_size,))
        self.x, self.y = x.to(device, memory_format=layout), y.to(device)
        self.x_adv = (self.x + config.eps * torch.randn_like(self.x).sign()).clamp(0, 1)
        exact = _build(self, "exact")
        self.take_step(exact.model, exact.optimizers["step"])
        self.weights = _weights(exact.optimizers["step"])

    def autocast(self) -> torch.autocast:
        return self.precision.autocast(self.x.device)

    def losses(self, model: nn.Module, images: Tensor) -> Tensor:
        with self.autocast():
            return cross_entropy(model(images), self.y, reduction="none")

    def take_step(
        self, model: nn.Module, optimizer: Any, *, whole: bool = False, first: bool = False
    ) -> None:
        """Takes an outer step, or a whole AT step, whose attack comes first."""
        images = self.x_adv
        if first:
            optimizer.measure._checked = Checked()
            optimizer._started = False
        if whole:
            torch.manual_seed(self.config.seed)  # the same random starts for all
            with self.autocast():
                images = self.method.attack(model, self.x, self.y)
        optimizer.zero_grad()
        optimizer.step(lambda: self.losses(model, images), inputs=images)

    def error(self, model: nn.Module, weights: Tensor) -> float:
        """Returns how far the gradients of `model` are from that of the weighted mean loss."""
        loss = (weights * self.losses(self.model, self.x_adv)).mean()
        expected = _flat(torch.autograd.grad(loss, list(self.model.parameters())))
        actual = _flat([p.grad for p in model.parameters() if p.grad is not None])
        return float((actual - expected).norm() / expected.norm())


@dataclass
class _Method:
    """A way to the step: its copy of the model, and an optimizer for each kind of its steps."""

    model: nn.Module
    optimizers: dict[str, Optimizer]
    error: float = 0.0  # of its gradient, relative
    first: bool = False  # each step is as the first


def _build(batch: _Batch, name: str) -> _Method:
    config, model = batch.config, copy.deepcopy(batch.model)
    sgd: dict[str, Any] = dict(momentum=config.momentum, weight_decay=config.weight_decay)
    optimizers: dict[str, Optimizer]
    if name == "loop" and len(batch.y) > LARGEST_LOOP:
        raise InputError(
            f"it takes {len(batch.y)} backward passes, and is measured up to batch size "
            f"{LARGEST_LOOP}"
        )
    if name == "msgd":
        optimizers = {"step": MSGD(model.parameters(), 0.0, **sgd)}
    elif name in WAYS:
        norms, line = WAYS[name]
        engm = partial(ENGM, model, 0.0, **sgd, floor=config.floor, norms=norms)
        kinds = {"refresh": 1, "plain": _NEVER} if line else {"step": None}
        optimizers = {kind: engm(refresh_every=every) for kind, every in kinds.items()}
    else:
        measure = PEERS[name](model, batch.y, batch.autocast)
        optimizers = {"step": PeerSGD(model, measure, config.floor, **sgd)}
    return _Method(model, optimizers, first=name == "exact-first")


def _build_warm(batch: _Batch, name: str) -> _Method:
    """Builds a method, takes steps of every kind, and compares its gradient."""
    method = _build(batch, name)
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in method.model.modules())
    for kind, optimizer in method.optimizers.items():
        batch.take_step(method.model, optimizer)
        weights = batch.weights
        if name == "msgd":
            weights = torch.ones_like(weights)
        elif kind == "plain":
            _trust(optimizer)
            batch.take_step(method.model, optimizer)
            weights = _weights(optimizer)
        elif name in ("input-only", "output") or (name == "loop" and batch_norm):
            weights = _weights(optimizer)
        error = batch.error(method.model, weights)
        if not math.isfinite(error):
            raise InputError("its gradient is inf or nan")
        method.error = max(method.error, error)
    return method


def _measure(
    batch: _Batch, able: Mapping[str, _Method], whole: bool, repeats: int
) -> dict[str, dict[str, Any]]:
    """Returns what a step of each method costs, msgd first."""
    device = batch.x.device
    works = {
        (name, kind): partial(
            batch.take_step, method.model, optimizer, whole=whole, first=method.first
        )
        for name, method in able.items()
        for kind, optimizer in method.optimizers.items()
    }
    peaks = dict.fromkeys(able, 0)
    for (name, kind), work in works.items():
        work()  # from now on there is a momentum
        able[name].optimizers[kind].zero_grad()
        peaks[name] = max(peaks[name], peak_bytes(work, device))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for _ in tqdm(range(repeats), "AT step" if whole else "outer step"):
        for key, work in works.items():
            times[key].append(seconds(work, device))
    costs: dict[str, dict[str, Any]] = {}
    for name, method in able.items():
        by_kind = {kind: times[name, kind] for kind in method.optimizers}
        parts = [_FRACTIONS[kind] * np.array(rounds) for kind, rounds in by_kind.items()]
        by_round = np.sum(parts, axis=0)
        costs[name] = {
            "seconds": by_kind,
            "median_seconds": float(np.median(by_round)),
            **ratios(by_round, times["msgd", "step"]),
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks["msgd"],
        }
    return costs


def _trust(optimizer: Any) -> None:
    # On random images the line may explain too little; what a step costs that trusts it does not
    # depend on whether it should.
    fits = optimizer.measure.estimate.fits
    fits[-1:] = [replace(fit, r_squared=1.0) for fit in fits[-1:]]


def _weights(optimizer: Any) -> Tensor:
    """Returns the w_i of the last step of an ENGM."""
    weights: Tensor = optimizer.last.weights
    return weights


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.detach().float().flatten() for gradient in gradients])


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("opacus", "backpack-for-pytorch"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
