"""Attacks that evaluations alone use, and the models that attacks may be made on."""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engm.attacks import (
    PGD,
    Model,
    check_batch,
    check_pixels,
    checked_logits,
    eval_mode,
    fooled,
    margin,
)
from engm.errors import InputError, check_choice, check_count
from engm.evaluation.accuracy import Attack


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Random patches of one colour; each is kept where it raises the margin loss.

    It needs no gradient, and is much weaker than PGD where gradients are sound: what it alone
    fools, PGD should have. Source: this kit, after the Square Attack of Andriushchenko et al. 2020
    (arXiv 1912.00049), of which AutoAttack runs the full version.

    Attributes:
        eps: Radius of the ball in pixels, at most 1 for "linf".
        num_queries: How often the model is asked about an example.
        norm: "linf" or "l2".

    Raises:
        InputError: If a setting is out of range.
    """

    eps: float
    num_queries: int = 200
    norm: str = "linf"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("linf", "l2"))
        check_pixels("eps", self.eps, self.norm)
        check_count("num_queries", self.num_queries)

    @torch.no_grad()
    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Attacks a batch, with the arguments and the result of `PGD.__call__`."""
        highest = check_batch(x, y)
        best = x.detach().clone()
        if self.eps == 0 or len(x) == 0:
            return best
        with eval_mode(model):
            logits = checked_logits(model, highest, best)
            best_loss = margin(logits, y)
            rows = (~fooled(logits, y)).nonzero()[:, 0]
            for query in range(self.num_queries):
                if len(rows) == 0:
                    break
                # from patches over all of the image to patches of 1/50 of it
                share = 0.02 ** (query / self.num_queries)
                patch = _patches(x[rows], share, generator)
                there = self._project(best[rows], patch, x[rows])
                logits = checked_logits(model, highest, there)
                loss = margin(logits, y[rows])
                broken = fooled(logits, y[rows])
                better = broken | (loss > best_loss[rows])
                best[rows[better]] = there[better]
                best_loss[rows[better]] = loss[better]
                rows = rows[~broken]
        return best

    def _project(self, x_adv: Tensor, patch: Tensor, x: Tensor) -> Tensor:
        # halves are moved in float32, and rounded so that they stay in the ball
        wide = torch.promote_types(x.dtype, torch.float32)
        delta, patch = x_adv.to(wide) - x, patch.to(wide)
        if self.norm == "linf":
            delta = torch.where(patch == 0, delta, self.eps * patch)
        else:
            # a patch over all of the image has length eps, a smaller one less
            delta = delta + self.eps * patch / math.sqrt(patch[0].numel())
            lengths = delta.flatten(1).norm(dim=1).clamp(min=torch.finfo(wide).tiny)
            delta = self.eps * delta / lengths.view(-1, *[1] * (delta.ndim - 1))
        stored = PGD(eps=self.eps, norm=self.norm, step_size=1.0)._stored
        return stored((x + delta).clamp(0, 1), x)


@dataclass(frozen=True, kw_only=True)
class TargetedPGD:
    """PGD towards the most likely other classes, one after the other, until the model is fooled.

    Each run climbs the logit of one class minus that of the true one, where the untargeted margin
    may keep changing its mind. Source: Gowal et al. 2019, arXiv 1910.09338 (MultiTargeted), with
    the classes that are most likely at x.

    Attributes:
        eps: Radius of the ball in pixels, at most 1 for "linf".
        norm: "linf" or "l2".
        num_steps: Steps towards each class; they shrink from 2 eps to 0.
        targets: How many classes are tried, or as many as there are.

    Raises:
        InputError: If a setting is out of range.
    """

    eps: float
    norm: str = "linf"
    num_steps: int = 20
    targets: int = 3

    def __post_init__(self) -> None:
        on_margin(self.eps, self.norm, self.num_steps)
        check_count("targets", self.targets)

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Attacks a batch, with the arguments and the result of `PGD.__call__`."""
        highest = check_batch(x, y)
        pgd = replace(on_margin(self.eps, self.norm, self.num_steps), stop_early=False)
        best = x.detach().clone()
        if self.eps == 0 or len(x) == 0:
            return best
        with torch.no_grad(), eval_mode(model):
            logits = checked_logits(model, highest, best)
            others = logits.scatter(1, y[:, None], -math.inf)
            ranked = others.topk(min(self.targets, logits.shape[1] - 1)).indices
            rows = (~fooled(logits, y)).nonzero()[:, 0]
            for k in range(ranked.shape[1]):
                if len(rows) == 0:
                    break
                pair = torch.stack([y[rows], ranked[rows, k]], 1)
                between = partial(_between, model, pair)
                best[rows] = pgd(between, x[rows], torch.zeros_like(rows), generator=generator)
                rows = rows[~fooled(checked_logits(model, highest, best[rows]), y[rows])]
        return best


def on_margin(eps: float, norm: str, num_steps: int) -> PGD:
    """Returns PGD on the margin that stops at broken examples; its steps shrink from 2 eps to 0."""
    size = min(2 * eps, 1.0) if norm == "linf" else 2 * eps
    pgd = PGD(eps=eps, step_size=size or 1.0, num_steps=num_steps, norm=norm)
    return replace(pgd, loss="margin", decay=True, stop_early=True)


@dataclass(frozen=True)
class Transfer:
    """An attack that is made on another model, and judged on the one that is evaluated.

        from engm.evaluation.suite import standard_attacks
        attacks = standard_attacks(eps) | {"transfer": Transfer(PGD(eps=eps, ...), second_model)}

    What a second model's images fool and the model's own gradients do not find, those gradients
    hide. Source: Papernot et al. 2017, arXiv 1602.02697.

    Attributes:
        attack: What is made.
        source: The model that it is made on.

    Raises:
        InputError: If `attack` is no attack, as where the two are swapped.
    """

    attack: Attack
    source: Model = field(repr=False)

    def __post_init__(self) -> None:
        if not (hasattr(self.attack, "eps") and callable(self.source)):
            raise InputError(
                "Transfer takes the attack first, then the model: Transfer(PGD(...), model)"
            )

    @property
    def eps(self) -> float:
        """That of the attack."""
        return self.attack.eps

    @property
    def norm(self) -> str:
        """That of the attack."""
        return self.attack.norm

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns x_adv for a batch; `model` is not looked at."""
        with eval_mode(self.source):
            return self.attack(self.source, x, y, generator=generator)


class StraightThrough(nn.Module):
    """The answers of a model, with the gradient of a surrogate that can be differentiated.

    Source: Athalye et al. 2018, arXiv 1802.00420 (BPDA).
    """

    def __init__(self, model: nn.Module, surrogate: nn.Module) -> None:
        super().__init__()
        self.model, self.surrogate = model, surrogate

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits, `[n, K]`."""
        with torch.no_grad():
            logits = self.model(x.detach().clone())
        return _Replaced.apply(self.surrogate(x), logits)


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Called(nn.Module):
    def __init__(self, called: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.called, self.dtype = called, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x.to(self.dtype))


def as_module(model: Model, dtype: torch.dtype) -> nn.Module:
    """Returns a module that takes images of `dtype`: the model itself wherever it does.

    A plain function will do, and so will a model with weights of another dtype, or one that was
    made in inference mode (which autograd would not work with, and which is copied).

    Raises:
        InputError: If `model` cannot be called, or is a class.
    """
    if isinstance(model, type) or not callable(model):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)[:60]
        raise InputError(
            f"model must be a module or a function, from images to logits; got {given}"
        )
    if not isinstance(model, nn.Module):
        return _Called(model, dtype)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model)
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    return model if wanted == dtype else _Called(model, wanted)


def _between(model: Model, pair: Tensor, x: Tensor) -> Tensor:
    return model(x).gather(1, pair)


def _patches(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    # 1 or -1 in each channel of a rectangle with `share` of the area, 0 elsewhere
    n, (height, width) = len(x), x.shape[-2:] if x.ndim > 2 else (1, x.shape[-1])
    device = x.device if generator is None else generator.device
    inside = torch.ones(n, 1, 1, 1, dtype=torch.bool, device=x.device)
    for axis, size in ((2, height), (3, width)):
        side = max(1, round(size * math.sqrt(share)))
        corner = torch.randint(size - side + 1, (n, 1), device=device, generator=generator)
        where = torch.arange(size, device=x.device) - corner.to(x.device)
        shape = (n, 1, size, 1) if axis == 2 else (n, 1, 1, size)
        inside = inside & ((where >= 0) & (where < side)).view(shape)
    channels = x[0].numel() // (height * width)
    colours = torch.randint(2, (n, channels, 1, 1), device=device, generator=generator) * 2 - 1
    return (inside * colours.to(x.device)).to(x.dtype).reshape(x.shape)
