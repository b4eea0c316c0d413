"""What an outer step costs: time and peak memory of ENGM and of other libraries' ways to its step.

Every number is also a ratio to plain MSGD, measured in the same run. Two steps are measured: the
outer step alone, and, for the kit's own optimizers, the whole AT step, whose attack comes first.
The rows of ENGM are named after its `norms`: "exact", and "exact-first" for a step that checks the
model, as the first one does; "input" and "both" with a line that is fitted in one step of twenty;
"input-only" and "output" without a line. With a line both kinds of steps are measured, and the time
is a twentieth of the one and nineteen twentieths of the other.

All methods have a copy of the same model, which the learning rate 0 leaves as it is, and the same
images. They take turns; a ratio is that of two times of one round, and what is reported is the
median over the rounds and the quartiles. Memory is the most that the step held above what it found
(weights and momentum).

Before anything is timed, each method's gradient is compared with what autograd gives for the
losses, weighted by the exact norms; estimates, and "loop" with BatchNorm, whose norms are meant to
differ, with the losses weighted by their own.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import distributions
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from engm import methods, models
from engm.bench.measuring import described, in_turns, peak_bytes, ratios, seconds, undisturbed
from engm.bench.peers import PEERS
from engm.config import RunConfig
from engm.device import Precision, pick_device
from engm.errors import InputError, check_choice, check_count
from engm.norms.watch import Checked
from engm.optim import ENGM, MSGD, Norms

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
# What part of a method's steps is of a kind.
_FRACTIONS = {"step": 1.0, "refresh": 1 / REFRESH_EVERY, "plain": 1 - 1 / REFRESH_EVERY}
LARGEST_LOOP = 16
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
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
        config: Model, batch size, attack and precision; channels and classes are CIFAR-10's.
        image_size: Height and width of the images.
        repeats: Rounds.
        names: Which of `METHODS`; "msgd" is always one.
        device: As for `engm.training.fit`.

    Returns:
        `command`, `settings`, `environment`, and for each of `methods` either a `reason` why it
        could not be measured, or for "outer" and "at": all `seconds`, `median_seconds`, the time
        `ratio` to MSGD with its quartiles `low` and `high`, `peak_bytes` and `peak_ratio`; besides,
        whether its gradient `agrees`, with the relative `error`.
    """
    config = config.resolved()
    for name in names:
        check_choice("method", name, METHODS)
    check_count("image_size", image_size)
    check_count("repeats", repeats)
    names = [name for name in METHODS if name in names or name == "msgd"]
    target = pick_device(device)
    results: dict[str, dict[str, Any]] = {}
    with undisturbed(target):
        build = partial(_Method, _Batch(config, image_size, target))
        warm = in_turns("warm-up", {name: name for name in names}, build, results)
        able = {name: method for name, (method,) in warm.items()}
        for name, method in able.items():
            agrees = method.error <= TOLERANCES[config.precision]
            results[name] = {"agrees": agrees, "error": method.error}
        for step in STEPS:
            chosen = {n: m for n, m in able.items() if step == "outer" or n in WHOLE}
            for name, costs in _measure(chosen, step == "at", repeats, results).items():
                results[name][step] = costs
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings |= {"image_size": image_size, "repeats": repeats, "methods": ",".join(names)}
    result = described(settings, target)
    versions = {package.name: package.version for package in distributions()}
    peers = [name for name in versions if name in ("opacus", "backpack-for-pytorch")]
    result["environment"]["peers"] = {name: versions[name] for name in peers}
    return {**result, "methods": {name: results[name] for name in names}}


def _measure(
    able: "dict[str, _Method]", whole: bool, repeats: int, results: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns what a step of each method costs; of those that fail, `results` gets the reason."""
    title = "AT step" if whole else "outer step"
    peaks = in_turns(f"{title}, memory", able, lambda method: method.peak(whole), results)
    rounds = in_turns(title, able, lambda method: method.seconds(whole), results, repeats)
    base = [times["step"] for times in rounds["msgd"]]
    costs: dict[str, dict[str, Any]] = {}
    for name, times in rounds.items():
        by_kind = {kind: [one[kind] for one in times] for kind in times[0]}
        by_round = sum(_FRACTIONS[kind] * np.array(column) for kind, column in by_kind.items())
        costs[name] = {
            "seconds": by_kind,
            "median_seconds": float(np.median(by_round)),
            **ratios(by_round, base),
            "peak_bytes": peaks[name][0],
            "peak_ratio": peaks[name][0] / peaks["msgd"][0],
        }
    return costs


class _Batch:
    """What every method is given: the model's weights, random images and labels.

    `x_adv`, within eps of `x`, are for the outer step alone; `weights` are those of exact norms.
    """

    def __init__(self, config: RunConfig, image_size: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.precision = config, Precision.of(config)
        layout = self.precision.memory_format
        model = models.build(config.model or "", width=config.width, norm=config.model_norm)
        self.model = model.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        assert config.batch_size and config.eps
        x = torch.rand(config.batch_size, 3, image_size, image_size)
        y = torch.randint(10, (config.batch_size,))
        self.x, self.y = x.to(device, memory_format=layout), y.to(device)
        self.x_adv = (self.x + config.eps * torch.randn_like(self.x).sign()).clamp(0, 1)
        copied = copy.deepcopy(self.model)
        exact = ENGM(copied, 0.0, floor=config.floor)
        exact.step(lambda: self.losses(copied, self.x_adv))
        assert exact.last
        self.weights = exact.last.weights

    def autocast(self) -> torch.autocast:
        return self.precision.autocast(self.x.device)

    def losses(self, model: nn.Module, images: Tensor) -> Tensor:
        with self.autocast():
            return cross_entropy(model(images), self.y, reduction="none")


class _AlwaysFirst(ENGM):
    """ENGM that checks the model in each step as in its first."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.measure._checked, self._started = Checked(), False
        return super().step(*args, **kwargs)


class _Method:
    """A way to the step, warm: with a copy of the model, and an optimizer for each kind of step."""

    def __init__(self, batch: _Batch, name: str) -> None:
        self.name, self.batch, self.device = name, batch, batch.x.device
        self.attack = methods.build(batch.config).attack
        self.model = copy.deepcopy(batch.model)
        self.optimizers = self._made()
        self.error = max(self._tried(kind) for kind in self.optimizers)

    def _made(self) -> dict[str, Any]:
        config, count = self.batch.config, len(self.batch.y)
        sgd: dict[str, Any]
        sgd = dict(lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
        if self.name == "msgd":
            return {"step": MSGD(self.model.parameters(), **sgd)}
        if self.name == "loop" and count > LARGEST_LOOP:
            raise InputError(
                f"it takes {count} backward passes, and is measured up to batch size {LARGEST_LOOP}"
            )
        norms, line = WAYS.get(self.name, ("exact", False))
        kind = _AlwaysFirst if self.name == "exact-first" else ENGM
        engm = partial(kind, self.model, **sgd, floor=config.floor, norms=norms)
        if line:
            return {"refresh": engm(refresh_every=1), "plain": engm(refresh_every=10**9)}  # never
        optimizer: Any = engm(refresh_every=None)
        if self.name in PEERS:
            optimizer.measure = PEERS[self.name](self.model, self.batch.y, self.batch.autocast)
        return {"step": optimizer}

    def _tried(self, kind: str) -> float:
        """Takes steps of a kind; returns how far the gradient is from the weighted mean loss's."""
        batch, optimizer = self.batch, self.optimizers[kind]
        self.step(kind)
        if kind == "plain":
            # On random images the line may explain too little; what a step costs that trusts it
            # does not depend on whether it should.
            fits = optimizer.measure.estimate.fits
            fits[-1] = replace(fits[-1], r_squared=1.0)
            self.step(kind)
        batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())
        own = kind == "plain" or self.name in ("input-only", "output")
        if self.name == "msgd":
            weights = torch.ones_like(batch.weights)
        elif own or (self.name == "loop" and batch_norm):
            weights = optimizer.last.weights
        else:
            weights = batch.weights
        loss = (weights * batch.losses(batch.model, batch.x_adv)).mean()
        expected = torch.autograd.grad(loss, list(batch.model.parameters()))
        pairs = zip(self.model.parameters(), expected, strict=True)
        error = get_total_norm([p.grad - gradient for p, gradient in pairs])
        if not error.isfinite():
            raise InputError("its gradient is inf or nan")
        return float(error / get_total_norm(expected))

    def step(self, kind: str, whole: bool = False) -> None:
        """Takes an outer step, or a whole AT step, whose attack comes first."""
        batch, optimizer, images = self.batch, self.optimizers[kind], self.batch.x_adv
        if whole:
            torch.manual_seed(batch.config.seed)  # the same random starts for all
            with batch.autocast():
                images = self.attack(self.model, batch.x, batch.y)
        optimizer.zero_grad()
        optimizer.step(lambda: batch.losses(self.model, images), inputs=images)

    def seconds(self, whole: bool) -> dict[str, float]:
        """Returns what a step of each kind takes."""
        return {k: seconds(partial(self.step, k, whole), self.device) for k in self.optimizers}

    def peak(self, whole: bool) -> int:
        """Returns the most bytes that a step of any kind holds."""
        peaks = []
        for kind, optimizer in self.optimizers.items():
            self.step(kind, whole)  # from now on there is a momentum
            optimizer.zero_grad()
            peaks.append(peak_bytes(partial(self.step, kind, whole), self.device))
        return max(peaks)
