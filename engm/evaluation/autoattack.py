"""AutoAttack, the ensemble that robust accuracies are published with, made safe to use.

    result = AutoAttack(eps=8 / 255).run(model, x, y)
    result.accuracy, result.counts, result.x_adv

The attacks are those of `pyautoattack`, an extra: `pip install "engm[autoattack]"`. The images are
cut into chunks, and each gets what the package's standard run gives it, bit for bit. What is here
judges the images that the attacks return, keeps finished chunks, and puts back what the package
changes: random states, trace function, training flags, gradients. Sources: Croce and Hein 2020,
arXiv 2003.01690 (APGD, AutoAttack) and 1907.02044 (FAB); Andriushchenko et al. 2020, arXiv
1912.00049 (Square).
"""

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from engm.attacks import Model, check_pixels, checked_logits, eval_mode, fooled
from engm.errors import InputError, check_choice, check_count
from engm.evaluation.accuracy import behaviour, digest, kept
from engm.evaluation.attacks import as_module
from engm.evaluation.checks import missing_gradient, num_classes

_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
_NORMS = {"linf": "Linf", "l2": "L2"}
_Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack left of a model's accuracy.

    Attributes:
        x_adv: `[n, ...]` with the dtype and device of x; x itself where no attack succeeded.
        robust: `[n]` booleans, whether the model still answers y on `x_adv`. Recomputed from it.
        counts: Examples classified rightly, by "clean", and after each attack in their order.
        seed: The seed of every attack and chunk.
        versions: Of engm, torch and pyautoattack.
        warnings: What speaks against the number: signs of a random or dynamic model, of
            probabilities in place of logits, of zero gradients, of Square beating the others.
    """

    x_adv: Tensor
    robust: Tensor
    counts: dict[str, int]
    seed: int
    versions: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Robust accuracy, the fraction of examples that are robust."""
        return int(self.robust.sum()) / len(self.robust)

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the tensors, as plain JSON values."""
        found = {"accuracy": self.accuracy, "num_examples": len(self.robust)} | vars(self)
        del found["x_adv"], found["robust"]
        return found | {"warnings": list(self.warnings)}


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """The standard version of AutoAttack: four attacks without settings, one after the other.

    Each gets the examples that the ones before it did not break. `run` gives all there is to know;
    `attack(model, x, y)` is the call that every attack of the kit has. On the CPU the same call
    gives the same result.

    Attributes:
        eps: Radius of the ball in pixels, at most 1 for "linf".
        norm: "linf" or "l2".
        seed: Seed of every attack and chunk.
        attacks: Which to run, in this order; by default all. APGD on the cross-entropy; APGD and
            FAB, each towards the 9 most likely other classes (or as many as there are); Square,
            which sees no gradient. "apgd-t" needs 4 classes, the others 2.

    Raises:
        InputError: If a setting is out of range.
    """

    eps: float
    norm: str = "linf"
    seed: int = 0
    attacks: tuple[str, ...] = _ATTACKS

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, tuple(_NORMS))
        check_pixels("eps", self.eps, self.norm)
        check_count("seed", self.seed, 0, 2**63 - 1)
        names = self.attacks
        if not isinstance(names, tuple) or not names or len(set(names)) < len(names):
            raise InputError(
                f"attacks must be a tuple as in ('square',), none twice; got {names!r}"
            )
        for name in names:
            check_choice("attack", name, _ATTACKS)

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns `x_adv` of a `run` in one chunk.

        `generator` is ignored, and there so that all attacks are called alike: `seed` decides.
        """
        return self.run(model, x, y, batch_size=max(len(x), 1)).x_adv

    @torch.inference_mode(False)
    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int = 250,
        save_to: Path | str | None = None,
        progress: bool = False,
    ) -> AutoAttackResult:
        """Attacks every example until an attack breaks it or none is left.

        Args:
            model: As for `PGD`, in eval mode; it is left as it was, as are random generators.
            x: As for `PGD`; attacked in float32. For "square" `[n, c, h, w]`.
            y: `[n]` classes.
            batch_size: Examples of a chunk.
            save_to: Folder that gets a file for each finished chunk, named after a digest of all
                that decides it: weights, logits, a gradient, images, classes, settings, versions.
                The same call, made again after a kill, reads what is there and attacks the rest.
            progress: Show a progress bar over the chunks, and count passes of the model within one.

        Raises:
            InputError: If pyautoattack is not installed; x, y or the logits are not as above; an
                attack cannot run on them; or a file in `save_to` is damaged.
        """
        check_count("batch_size", batch_size)
        y = y.long() if y.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else y
        model = as_module(model, x.dtype)
        classes = num_classes(model, x, y)
        if unfit := self.unfit(x, classes, missing_gradient(model, x)):
            fit = tuple(name for name in self.attacks if name not in unfit)
            raise InputError(
                "; ".join(f"{name!r} cannot run{reason}" for name, reason in unfit.items())
                + (f"; choose attacks={fit}" if fit else "; RandomSearch needs none of this")
            )
        package = library()
        versions = {name: metadata.version(name) for name in ("engm", "pyautoattack")}
        versions["torch"] = torch.__version__
        call = repr((self, versions, x.device.type))
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(floats, torch.float32)

        def forward(images: Tensor) -> Tensor:
            return checked_logits(model, classes - 1, images.to(dtype)).float()

        # autograd refuses tensors that the caller made in inference mode, but not their copies
        with left_as_found(model), torch.no_grad():
            x, y = x.detach().clone(), y.clone()
            warnings = self._signs(package, forward, x[:batch_size], y[:batch_size])
            x_adv, robust, differ = x.clone(), torch.empty_like(y, dtype=torch.bool), 0
            counts = dict.fromkeys(("clean", *self.attacks), 0)
            starts = range(0, len(x), batch_size)
            how = dict(disable=not progress, leave=False)
            with (
                tqdm(starts, "AutoAttack", unit="chunk", mininterval=0, **how) as bar,
                tqdm(desc="of the model", unit="pass", **how) as passes,
            ):

                def counted(images: Tensor) -> Tensor:
                    passes.update()
                    return forward(images)

                for start in bar:
                    rows = slice(start, start + batch_size)
                    path = None
                    if save_to is not None:
                        torch.manual_seed(self.seed)  # for models that draw
                        decides = {"x": x[rows], "y": y[rows]} | behaviour(forward, x[rows])
                        path = Path(save_to) / f"{digest(call, model, decides)}.pt"
                    attack = partial(self._chunk, package, counted, classes, x[rows], y[rows])
                    chunk = kept(path, x.device, attack)
                    x_adv[rows][chunk["broken"]] = chunk["x_adv"]
                    robust[rows] = self._right(forward, x_adv[rows], y[rows])
                    differ += int((robust[rows] == chunk["broken"]).sum())
                    counts = {name: count + chunk["counts"][name] for name, count in counts.items()}
                    warnings += chunk["warnings"]
                    bar.set_postfix(robust=int(robust[: rows.stop].sum()))
        accuracies = {name: count / len(x) for name, count in counts.items()}
        package.checks.check_square_sr(accuracies, logger=SimpleNamespace(warning=warnings.append))
        if differ:
            reason = "the model draws random numbers, or they lie on the boundary"
            warnings.append(
                f"{differ} examples are answered otherwise now than in attacks: {reason}"
            )
        return AutoAttackResult(
            x_adv, robust, counts, self.seed, versions, largest_of_each(warnings)
        )

    def unfit(self, x: Tensor, classes: int, blind: str | None) -> dict[str, str]:
        """Returns those of `attacks` that cannot run on x, each with what follows "cannot run".

        `classes` is the number of logits, `blind` why there is no gradient, where there is none.
        """
        found, shape = {}, list(x.shape)
        for name in self.attacks:
            if name != "square" and blind:
                found[name] = f": {blind}"
            elif name == "apgd-t" and classes < 4:
                found[name] = f": its loss needs 4 classes, and the model gives {classes} logits"
            elif name == "square" and not (
                len(shape) == 4 and (self.norm == "linf" or tiles_fit(*shape[2:]))
            ):
                found[name] = (
                    f" on x of shape {shape}: it needs images [n, c, h, w], and does not fit all "
                    "sizes under l2; it could be resized in the model"
                )
        return found

    def _signs(self, package: ModuleType, forward: _Forward, x: Tensor, y: Tensor) -> list[str]:
        # what the package warns of before it attacks
        checks, trace, calls = package.checks, sys.gettrace(), dict(package.checks.funcs)
        said: list[str] = []
        logger = SimpleNamespace(warning=said.append)
        torch.manual_seed(self.seed)
        try:
            checks.check_randomized(forward, x, y, logger=logger)
            checks.check_range_output(forward, x, logger=logger)
            # counts calls in a variable of its module, and ends any other tracing
            checks.funcs.update(dict.fromkeys(calls, 0))
            checks.check_dynamic(forward, x, logger=logger)
        finally:
            checks.funcs.update(calls)
            sys.settrace(trace)
        return said

    def _chunk(
        self, package: ModuleType, forward: _Forward, classes: int, x: Tensor, y: Tensor
    ) -> dict[str, Any]:
        # the standard run of the package, but that wrong images do not count
        said: list[str] = []
        standard = package.AutoAttack(
            forward, eps=float(self.eps), norm=_NORMS[self.norm], seed=self.seed, device=x.device
        )
        apgd, targeted, fab = standard.apgd, standard.apgd_targeted, standard.fab
        targeted.logger, fab.targeted = SimpleNamespace(warning=said.append), True
        targeted.n_target_classes = fab.n_target_classes = min(9, classes - 1)
        perturb = dict(zip(_ATTACKS, (apgd, targeted, fab, standard.square), strict=True))
        x_adv, right = x.clone(), self._right(forward, x, y)
        counts = {"clean": int(right.sum())}
        for name in self.attacks:
            rows = right.nonzero()[:, 0]
            if self.eps > 0 and len(rows):
                torch.manual_seed(self.seed)  # for models that draw; attacks seed again
                found = perturb[name].perturb(x[rows].float(), y[rows]).to(x.dtype)
                broken, inside = fooled(forward(found), y[rows]), self._inside(found, x[rows])
                if outside := int((broken & ~inside).sum()):
                    said.append(
                        f"{outside} images of an attack, outside [0, 1] or the ball, do not count"
                    )
                x_adv[rows[broken & inside]] = found[broken & inside]
                right[rows[broken & inside]] = False
            counts[name] = int(right.sum())
        return {"broken": ~right, "x_adv": x_adv[~right], "counts": counts, "warnings": said}

    def _right(self, forward: _Forward, images: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(self.seed)  # for models that draw
        return ~fooled(forward(images), y)

    def _inside(self, x_adv: Tensor, x: Tensor) -> Tensor:
        order = math.inf if self.norm == "linf" else 2
        length = (x_adv.float() - x.float()).flatten(1).norm(order, dim=1)
        # in the dtype of x a pixel is rounded by a quarter of its eps, at most
        slack = max(1e-5, torch.finfo(x.dtype).eps / 4 * x[0].numel() ** (1 / order))
        return (length <= self.eps + slack) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


# --- pyautoattack


def library() -> ModuleType:
    """Returns the package, or says how to install it."""
    try:
        import pyautoattack
    except ImportError:
        need = 'AutoAttack needs pyautoattack: pip install "engm[autoattack]"'
        raise InputError(need) from None
    return pyautoattack


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Puts random states, training flags and what requires gradients back after the block."""
    # FAB calls backward, which would add to the gradients of parameters
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # torch.manual_seed seeds every GPU
    with eval_mode(model), torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            for parameter in trainable:
                parameter.requires_grad = False
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad = True


def tiles_fit(height: int, width: int) -> bool:
    """Returns whether Square can run on images of that size under l2."""
    # Square starts under l2 from tiles as wide as a fifth of the height, along both sides
    tile = height // 5
    first = (height - 5 * tile) // 2
    return tile == 1 or all(tile and first + n // tile * tile <= n for n in (height, width))


def largest_of_each(warnings: list[str]) -> tuple[str, ...]:
    """Returns one of the warnings that differ in their numbers alone."""
    # batches repeat a warning with other numbers: the one with the largest stands for all
    kinds: dict[str, str] = {}
    for warning in sorted(warnings, key=lambda text: [int(n) for n in re.findall(r"\d+", text)]):
        # the package's words, without its pointers to what is not here
        short = re.split(r" See | Please use version", warning)[0]
        kinds[re.sub(r"\d+", "", short)] = short
    return tuple(kinds.values())
