"""The inner maximisation: FGSM and PGD, and the losses that they climb.

    attack = PGD(eps=8 / 255, step_size=2 / 255, num_steps=10)
    x_adv = attack(model, x, y)

Pixels are in [0, 1], `eps` and `step_size` have the same unit, normalisation is inside the model.

An attack leaves the model as it was. It takes gradients w.r.t. the pixels alone, so `p.grad` stays.
It runs the model in eval mode, so the running statistics of BatchNorm stay and dropout is off; that
is the protocol of the published code of TRADES (arXiv 1901.08573) and MART (ICLR 2020). Published
code of others trains in train mode, which `mode` is for; Pang et al. 2021 (arXiv 2010.00467)
compare the two.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engm.device import AttackedModel
from engm.errors import InputError, check_choice, check_count, check_number

Model = Callable[[Tensor], Tensor]

# --- attacks


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient ascent on a loss, in a ball around x and in [0, 1].

    `attack(model, x, y)` returns x_adv. A run gives its last iterate, as in Madry et al. 2018
    (arXiv 1706.06083). Of several runs, each example keeps the first x_adv that fools the model, or
    else the one of highest loss. |x_adv - x| <= eps holds up to 1e-7 a pixel, the rounding of
    float32; half-precision images are moved in float32, and rounded so that they stay in the ball.
    Without `stop_early`, nothing after the check of x and y waits for the device; an
    `engm.device.AttackedModel` spares that check, and more.

    Attributes:
        eps: Radius of the ball in pixels, at most 1 for "linf".
        step_size: Length of a step in pixels.
        num_steps: Steps of a run.
        restarts: Runs, each from its own random start.
        norm: "linf", whose steps follow the sign of the gradient, or "l2", the unit gradient.
        loss: "ce", "margin", "dlr", or "kl": away from the prediction on x, whatever y is.
        random_start: Whether runs start uniformly in the ball, or at x.
        start_noise: Above 0, runs start from x plus normal noise of this deviation in place of the
            uniform one; 0.001 in TRADES.
        decay: Whether the step shrinks to 0, along a quarter of a cosine wave. For evaluation: long
            first steps cross the ball, short last ones settle.
        stop_early: Whether examples leave the batch as soon as they fool the model, and keep that
            x_adv. For evaluation: less work, and robust accuracy is lower or equal.
        mode: "eval", or for training "train": BatchNorm takes the statistics of the batch (of
            `rows`), each pass moves its running ones, and dropout is on; so in the code of Wong et
            al. 2020 (arXiv 2001.03994) and Rice et al. 2020 (arXiv 2002.11569).

    Raises:
        InputError: If a setting is out of range.
    """

    eps: float
    step_size: float
    num_steps: int = 10
    restarts: int = 1
    norm: str = "linf"
    loss: str = "ce"
    random_start: bool = True
    start_noise: float = 0.0
    decay: bool = False
    stop_early: bool = False
    mode: str = "eval"

    def __post_init__(self) -> None:
        """Refuses settings that are out of range, and takes numbers of numpy as Python's."""
        check_choice("norm", self.norm, ("linf", "l2"))
        check_choice("loss", self.loss, _LOSSES)
        check_choice("mode", self.mode, ("eval", "train"))
        for name in ("eps", "step_size", "start_noise"):
            object.__setattr__(self, name, check_pixels(name, getattr(self, name), self.norm))
        for name in ("num_steps", "restarts"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        if self.step_size == 0:
            raise InputError("step_size is 0, so the attack would not move; try eps / 4")
        if self.start_noise and not self.random_start:
            raise InputError("start_noise is a random start; leave random_start at True")
        if self.restarts > 1 and not self.random_start:
            raise InputError("without random_start all runs are the same; leave restarts at 1")
        if self.loss == "kl" and not self.random_start:
            raise InputError(
                "loss='kl' needs random_start=True: at x the divergence is 0, its minimum, and so "
                "is its gradient, so the attack would never leave x"
            )
        if self.mode == "train" and self.stop_early:
            raise InputError(
                "stop_early takes examples out of the batch whose statistics mode='train' is for; "
                "leave one of them out"
            )

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """Attacks a batch.

        Args:
            model: From `[n, ...]` pixels to `[n, K]` logits, a module or a function. It is left as
                it was, but for the running statistics under `mode="train"`.
            x: `[n, ...]` floats in [0, 1].
            y: `[n]` int64 classes, below K.
            generator: What random starts are drawn from, in place of the global generator. One on
                the CPU gives the same starts on every device.
            rows: Attack these examples alone; they get the x_adv that they get with all the others.

        Returns:
            x_adv, with the shape of `x[rows]`, the dtype and the device of x, and no graph.

        Raises:
            InputError: If x, y or the logits are not as above.
        """
        attacked = model if isinstance(model, AttackedModel) else None
        check_tensors(x, y)
        highest = check_values(x, y) if attacked is None or attacked.begin(x) else 0
        chosen = slice(None) if rows is None else rows
        if self.eps == 0 or len(x) == 0:
            return x[chosen].detach().clone()
        if isinstance(model, nn.Module) and any(p.is_inference() for p in model.parameters()):
            raise InputError(
                "the model was made in inference mode, so autograd refuses it for good; attack "
                "copy.deepcopy(model) instead"
            )
        logits_of = partial(checked_logits, model, highest)
        # autograd refuses tensors that the caller made in inference mode, but not their copies
        training = self.mode == "train"
        with in_mode(model, training), torch.inference_mode(False), torch.enable_grad():
            whole = x.detach().clone()
            x, y = whole[chosen], y[chosen]
            target = logits_of(x).detach() if self.loss == "kl" else y
            best, best_loss = x.clone(), torch.full((len(x),), -math.inf, device=x.device)
            standing = torch.arange(len(x), device=x.device)
            for _ in range(self.restarts):
                # drawn for the whole batch: the same starts with and without stop_early
                start = self._start(whole, generator)[chosen][standing]
                left = x[standing], target[standing]
                if self.stop_early:
                    x_adv = self._run_until_fooled(logits_of, start, *left, y[standing])
                elif attacked is not None:
                    loss = partial(self._mean_loss, logits_of, *left)
                    x_adv = attacked.run(self, partial(self._run, logits_of), loss, start, *left)
                else:
                    x_adv = self._run(logits_of, start, *left)
                if self.restarts == 1:
                    return x_adv
                logits = logits_of(x_adv).detach()
                losses = _LOSSES[self.loss](logits, target[standing]).float()
                # inf, so that nothing replaces the first x_adv that fools the model
                losses = losses.masked_fill(fooled(logits, y[standing]), math.inf)
                better = losses > best_loss[standing]
                best[standing] = torch.where(_per_example(better, x), x_adv, best[standing])
                best_loss[standing] = torch.where(better, losses, best_loss[standing])
                if self.stop_early:
                    standing = standing[best_loss[standing] < math.inf]
                    if len(standing) == 0:
                        break
            return best

    def _run(self, logits_of: Model, x_adv: Tensor, x: Tensor, target: Tensor) -> Tensor:
        for step in range(self.num_steps):
            x_adv, _ = self._step(logits_of, step, x_adv, x, target)
        return self._stored(x_adv, x)

    def _run_until_fooled(
        self, logits_of: Model, x_adv: Tensor, x: Tensor, target: Tensor, y: Tensor
    ) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        for step in range(self.num_steps):
            there, logits = self._step(logits_of, step, x_adv[rows], x[rows], target[rows])
            standing = ~fooled(logits, y[rows])
            rows = rows[standing]
            if len(rows) == 0:
                break
            x_adv[rows] = there[standing]
        return self._stored(x_adv, x)

    def _step(
        self, logits_of: Model, step: int, x_adv: Tensor, x: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        here = self._stored(x_adv, x).detach().requires_grad_()
        logits = logits_of(here)
        losses, gradient = _LOSSES[self.loss](logits, target), None
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), here, allow_unused=True)
        if gradient is None:
            raise InputError(
                "no gradient flows from the logits to the images; take detach, argmax and no_grad "
                "out of the model's forward"
            )
        # a nan points nowhere: such a pixel stays where it is
        gradient = gradient.nan_to_num().to(x_adv.dtype)
        direction = gradient.sign() if self.norm == "linf" else _unit(gradient)
        shrunk = math.cos(math.pi / 2 * step / self.num_steps) if self.decay else 1
        return self._project(x_adv + self.step_size * shrunk * direction, x), logits

    def _mean_loss(self, logits_of: Model, x: Tensor, target: Tensor, x_adv: Tensor) -> Tensor:
        return _LOSSES[self.loss](logits_of(self._stored(x_adv, x)), target).mean()

    def _start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if not self.random_start:
            return x.to(dtype, copy=True)
        device = x.device if generator is None else generator.device
        uniform = partial(torch.rand, dtype=dtype, device=device, generator=generator)
        normal = partial(torch.randn, dtype=dtype, device=device, generator=generator)
        if self.start_noise:
            noise = normal(x.shape) * (self.start_noise / self.eps)
        elif self.norm == "linf":
            noise = 2 * uniform(x.shape) - 1
        else:
            # volume grows as radius^d: the radius of a uniform draw is u^(1/d)
            radius = uniform(len(x)) ** (1 / x[0].numel())
            noise = _unit(normal(x.shape)) * _per_example(radius, x)
        return self._project(x + self.eps * noise.to(x.device), x)

    def _project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            length = delta.flatten(1).norm(dim=1)
            delta = delta * _per_example((self.eps / length).clamp(max=1), x)
        # x is in [0, 1], so this moves every pixel towards x: x_adv stays in the ball
        return (x + delta).clamp(0, 1)

    def _stored(self, x_adv: Tensor, x: Tensor) -> Tensor:
        # in the dtype of x; pixels that rounding takes out of the ball go to the next number inside
        if x_adv.dtype == x.dtype:
            return x_adv
        near = x_adv.to(x.dtype)
        moved = (near.to(x_adv.dtype) - x).abs()
        outside = moved > self.eps
        if self.norm == "l2":
            outside = _per_example(moved.flatten(1).norm(dim=1) > self.eps, x)
        outside = outside & (moved > (x_adv - x).abs())
        # the bits of halves from 0 on are ordered as the numbers are
        bits = near.view(torch.int16)
        bits = torch.where(outside, torch.where(x > near, bits + 1, bits - 1), bits)
        return bits.view(x.dtype)


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """The fast gradient sign method: `PGD` with one step of length `eps`, by default from x.

    Source: Goodfellow et al. 2015, arXiv 1412.6572. The variant for training by Wong et al. 2020
    (arXiv 2001.03994) is `PGD(eps=eps, step_size=1.25 * eps, num_steps=1)`.

    The attributes and errors are those of `PGD`; `eps` is the length of the step, too.
    """

    eps: float
    norm: str = "linf"
    loss: str = "ce"
    random_start: bool = False

    def __post_init__(self) -> None:
        """Refuses settings that are out of range."""
        object.__setattr__(self, "eps", self._one_step().eps)

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """Attacks a batch, as `PGD.__call__` does."""
        return self._one_step()(model, x, y, generator=generator, rows=rows)

    def _one_step(self) -> PGD:
        # its fields are fields of PGD; with eps 0 there is no step, but PGD wants its length
        return PGD(**vars(self), step_size=self.eps or 1.0, num_steps=1)


def _per_example(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


def _unit(vectors: Tensor) -> Tensor:
    # by the largest entry first, so that no square vanishes or overflows; zeros stay zeros
    largest = vectors.flatten(1).abs().amax(1).clamp(min=torch.finfo(vectors.dtype).tiny)
    vectors = vectors / _per_example(largest, vectors)
    # the largest entry is 1 now, so only the length of zeros is below 1
    return vectors / _per_example(vectors.flatten(1).norm(dim=1).clamp(min=1), vectors)


# --- the losses that they climb


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example, from `[n, K]` logits and `[n]` classes to `[n]`."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the true one, `[n]`: above 0 where the model is wrong.

    Source: Carlini and Wagner 2017, arXiv 1608.04644, without the confidence term.
    """
    others = logits.scatter(1, y[:, None], -math.inf)
    return others.amax(1) - logits.gather(1, y[:, None])[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, `[n]`: the margin over (largest minus third largest logit).

    Scaling or shifting all logits does not change it, so large logits cannot flatten its gradient
    as they flatten that of the cross-entropy. Source: Croce and Hein 2020, arXiv 2003.01690.

    Raises:
        InputError: If there are fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise InputError(f"loss 'dlr' needs 3 classes, here are {logits.shape[1]}; use 'margin'")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def kl(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL divergence from the prediction on x to that on x_adv, `[n]`, both from `[n, K]` logits.

    Source: TRADES, arXiv 1901.08573.
    """
    log_q, log_p = logits.log_softmax(1), clean_logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


_LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "kl": kl}


# --- the model and the batch


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Where the model does not answer `y`, `[n]` booleans.

    Logits with a nan are no answer and count as fooled; `argmax` alone would call a row of nans
    right wherever y is 0.
    """
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def eval_mode(model: Model) -> AbstractContextManager[None]:
    """Puts every module of `model` into eval mode, then each back as it was, even on an error."""
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: Model, training: bool) -> Iterator[None]:
    """Does so with train or eval mode; a function has no modes and is run as it is."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def check_batch(x: Tensor, y: Tensor) -> int:
    """Returns the highest class of a batch; refuses one that is not as attacks want it."""
    check_tensors(x, y)
    return check_values(x, y)


def check_tensors(x: Tensor, y: Tensor) -> None:
    """Refuses what is not `[n, ...]` floats and `[n]` int64 on one device; waits for no device."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} is a {type(value).__name__}; give a tensor, as in torch.tensor({name})"
            )
    if not x.is_floating_point() or x.ndim < 2:
        raise InputError(
            f"x is {x.dtype} of shape {list(x.shape)}; give [n, ...] floats in [0, 1], "
            "as in x.float() / 255"
        )
    if y.ndim == 0:
        raise InputError("y is a single class; a single image is a batch of one: x[None], y[None]")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise InputError(
            f"y is {y.dtype} of shape {list(y.shape)}; give one class number for each of the "
            f"{len(x)} images, int64 of shape [{len(x)}]"
        )
    if y.device != x.device:
        raise InputError(f"x is on {x.device} and y on {y.device}; move them to one device")


def check_values(x: Tensor, y: Tensor) -> int:
    """Returns the highest class, 0 of none; refuses pixels outside [0, 1] and classes below 0."""
    if len(x) == 0:
        return 0
    # the one wait for the device
    ends = torch.stack([end.float() for end in (x.min(), x.max(), y.min(), y.max())])
    low, high, lowest, highest = ends.tolist()
    if not (low >= 0 and high <= 1):
        remedy = "normalise inside the model, and clamp what augmentation pushes out"
        if low >= 0 and high in (15, 16):
            remedy = "divide by 16, as scikit-learn's digits need, or by what white is"
        elif low >= 0 and 2 < high <= 255:
            remedy = "divide by 255"
        elif low > -0.01 and high < 1.01:
            remedy = "that is rounding: x.clamp(0, 1)"
        raise InputError(f"x goes from {low:.8g} to {high:.8g}, but pixels are in [0, 1]; {remedy}")
    if lowest < 0:
        raise InputError(f"y has the class {lowest:.0f}; classes count from 0")
    return int(highest)


def checked_logits(model: Model, highest: int, images: Tensor) -> Tensor:
    """Returns logits, at least float32; refuses what is not `[n, K]` with K above `highest`."""
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model gave {got}; it must give logits of shape [{len(images)}, K]")
    if logits.shape[1] <= max(highest, 1):
        raise InputError(
            f"the model gives {logits.shape[1]} logits, but classes go up to {max(highest, 1)}; "
            "build it with one logit for each class, and count classes from 0"
        )
    # in bfloat16 the losses of two restarts would hardly differ
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_pixels(name: str, value: float, norm: str) -> float:
    """Returns a length in pixels, Python's number for numpy's; refuses one that is none.

    Raises:
        InputError: If it is not a number, 0 or more, and at most 1 under linf.
    """
    check_number(name, value, "8 / 255")
    if norm == "linf" and value > 1:
        raise InputError(f"{name} is {value}, but pixels are in [0, 1]: write 8/255, not 8")
    return value if isinstance(value, int) else float(value)
