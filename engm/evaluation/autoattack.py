"""AutoAttack, the ensemble that robust accuracies are published with, made safe to use.

    result = AutoAttack(eps=8 / 255).run(model, x, y)
    result.accuracy, result.counts, result.x_adv

The attacks are those of `pyautoattack`, an extra: `pip install "engm[autoattack]"`. What is here
decides which examples an attack gets, judges what it returns, and puts back what the package
changes: random states, trace function, training flags, gradients. Sources: Croce and Hein 2020,
arXiv 2003.01690 (APGD, AutoAttack) and 1907.02044 (FAB); Andriushchenko et al. 2020, arXiv
1912.00049 (Square).
"""

import glob
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from engm.attacks import (
    check_batch,
    check_choice,
    check_count,
    check_pixels,
    checked_logits,
    eval_mode,
    fooled,
)
from engm.errors import InputError
from engm.runs import load_tensors, save_tensors

# --- AutoAttack

_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
_NORMS = {"linf": "Linf", "l2": "L2"}
_PROGRESS = ("x_adv", "robust", "standing", "batches", "counts", "warnings")


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack left of a model's accuracy.

    Attributes:
        x_adv: `[n, ...]` with the dtype and device of x; x itself where no attack succeeded.
        robust: `[n]` booleans, whether the model still answers y on `x_adv`. Recomputed from it.
        counts: Examples classified rightly, by "clean", and after each attack in their order.
        seed: The seed of every attack and batch.
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
    `attack(model, x, y)` is the call that every attack of the kit has. With the same batches, both
    give what pyautoattack gives, bit for bit. On the CPU the same call gives the same result.

    Attributes:
        eps: Radius of the ball in pixels, at most 1 for "linf".
        norm: "linf" or "l2".
        seed: Seed of every attack and batch.
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
        """Refuses settings that are out of range."""
        check_choice("norm", self.norm, tuple(_NORMS))
        check_pixels("eps", self.eps, self.norm)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a whole number, 0 or more; got {self.seed!r}")
        names = self.attacks
        if not isinstance(names, tuple) or not names or len(set(names)) < len(names):
            raise InputError(
                f"attacks must be a tuple as in ('square',), none twice; got {names!r}"
            )
        for name in names:
            check_choice("attack", name, _ATTACKS)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns `x_adv` of a `run` in one batch.

        `generator` is ignored, and there so that all attacks are called alike: `seed` decides.
        """
        return self.run(model, x, y, batch_size=max(len(x), 1)).x_adv

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int = 250,
        resume: Path | str | None = None,
        progress: bool = False,
    ) -> AutoAttackResult:
        """Attacks every example until an attack breaks it or none is left.

        Args:
            model: From `[n, ...]` pixels to `[n, K]` logits, evaluated in eval mode. It is left as
                it was, and so are the states of the random generators.
            x: `[n, ...]` floats in [0, 1]; attacked in float32. For "square" `[n, c, h, w]`.
            y: `[n]` classes, below K.
            batch_size: Examples attacked at a time.
            resume: File that keeps what is done after every batch. The same call, made again after
                the process was killed, goes on from there and ends with bitwise the same result.
                It stays when all is done; then the call only reads it.
            progress: Show a progress bar over the batches.

        Returns:
            `x_adv`, and what was found on the way. |x_adv - x| <= eps holds up to rounding.

        Raises:
            InputError: If pyautoattack is not installed; x, y or the logits are not as above; an
                attack cannot run on them; or `resume` is a file of another call.
        """
        check_count("batch_size", batch_size)
        y = y.long() if y.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else y
        check_batch(x, y)
        if len(x) == 0:
            raise InputError("there is no example to attack")
        homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if homes and x.device not in homes:
            raise InputError(f"x is on {x.device} and the model on {homes.pop()}; move one of them")
        # autograd refuses tensors that the caller made in inference mode, but not their copies
        with torch.inference_mode(False), left_as_found(model), torch.no_grad():
            run = _Run(self, model, x.detach().clone(), y.clone(), batch_size)
            return run.finish(None if resume is None else Path(resume), progress)


class _Run:
    """One attack on one model and its examples, and how far it is."""

    def __init__(
        self, attack: AutoAttack, model: nn.Module, x: Tensor, y: Tensor, batch_size: int
    ) -> None:
        self.attack, self.model, self.x, self.y = attack, model, x, y
        self.batch_size, self.highest, self.package = batch_size, int(y.max()), library()
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(floats, torch.float32)
        self.num_classes = self._refuse()
        self.versions = {name: metadata.version(name) for name in ("engm", "pyautoattack")}
        self.versions["torch"] = torch.__version__
        # the progress, which `_save` keeps
        self.x_adv, self.robust = x.clone(), self._right(x)
        self.standing = self.robust.clone()  # when the current attack began
        self.batches = 0  # that the current attack has done
        self.counts = {"clean": int(self.robust.sum())}
        self.warnings: list[str] = []

    def finish(self, path: Path | None, progress: bool) -> AutoAttackResult:
        names, call = self.attack.attacks, self._call() if path else {}
        if not (path and self._load(path, call)):
            self._check_model()
        perturb = self._attacks()
        with tqdm(disable=not progress, unit="batch", leave=False) as bar:
            for name in names[len(self.counts) - 1 :]:
                rows = self.standing.nonzero()[:, 0]
                batches = rows.split(self.batch_size) if self.attack.eps > 0 and len(rows) else ()
                left = len(names) - len(self.counts) + 1
                bar.total = bar.n + left * len(batches) - self.batches
                bar.set_description(name)
                for batch in batches[self.batches :]:
                    if path:
                        self._save(path, call)
                    self._step(perturb[name], batch)
                    self.batches += 1
                    bar.update()
                    bar.set_postfix(robust=int(self.robust.sum()))
                self.counts[name] = int(self.robust.sum())
                self.standing, self.batches = self.robust.clone(), 0
        if path:
            self._save(path, call)
        return self._result()

    def warning(self, text: str) -> None:
        # the package takes a run for its logger
        self.warnings.append(text)

    def _forward(self, images: Tensor) -> Tensor:
        return checked_logits(self.model, self.highest, images.to(self.dtype)).float()

    def _right(self, images: Tensor) -> Tensor:
        right = []
        for part, y in zip(*(t.split(self.batch_size) for t in (images, self.y)), strict=True):
            torch.manual_seed(self.attack.seed)  # for models that draw
            right.append(~fooled(self._forward(part), y))
        return torch.cat(right)

    def _refuse(self) -> int:
        with torch.enable_grad():
            here = self.x[: self.batch_size].float().requires_grad_()
            logits, gradient = self._forward(here), None
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(logits.sum(), here, allow_unused=True)
        attacks, classes, shape = self.attack.attacks, logits.shape[1], list(self.x.shape)
        if gradient is None and attacks != ("square",):
            raise InputError(
                "no gradient flows from the logits to the images; take detach, argmax and no_grad "
                "out of the model's forward, or choose attacks=('square',)"
            )
        if "apgd-t" in attacks and classes < 4:
            raise InputError(
                f"'apgd-t' cannot run: its loss needs 4 classes, and the model gives {classes} "
                "logits; choose attacks=('apgd-ce', 'fab-t', 'square')"
            )
        l2 = self.attack.norm == "l2"
        if "square" in attacks and (len(shape) != 4 or (l2 and not tiles_fit(*shape[2:]))):
            raise InputError(
                f"'square' cannot run on x of shape {shape}: it needs images [n, c, h, w], and "
                "does not fit all sizes under l2; leave it out of attacks, or resize in the model"
            )
        return classes

    def _check_model(self) -> None:
        checks, x = self.package.checks, self.x[: self.batch_size]
        trace, calls = sys.gettrace(), dict(checks.funcs)
        torch.manual_seed(self.attack.seed)
        try:
            checks.check_randomized(self._forward, x, self.y[: self.batch_size], logger=self)
            checks.check_range_output(self._forward, x, logger=self)
            # counts calls in a variable of its module, and ends any other tracing
            checks.funcs.update(dict.fromkeys(calls, 0))
            checks.check_dynamic(self._forward, x, logger=self)
        finally:
            checks.funcs.update(calls)
            sys.settrace(trace)

    def _attacks(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        eps, norm, seed = float(self.attack.eps), _NORMS[self.attack.norm], self.attack.seed
        standard = self.package.AutoAttack(
            self._forward, eps=eps, norm=norm, seed=seed, device=self.x.device
        )
        apgd, targeted, fab = standard.apgd, standard.apgd_targeted, standard.fab
        targeted.logger, fab.targeted = self, True
        targeted.n_target_classes = fab.n_target_classes = min(9, self.num_classes - 1)
        every = (apgd.perturb, targeted.perturb, fab.perturb, standard.square.perturb)
        return dict(zip(_ATTACKS, every, strict=True))

    def _step(self, perturb: Callable[[Tensor, Tensor], Tensor], batch: Tensor) -> None:
        x, y = self.x[batch], self.y[batch]
        torch.manual_seed(self.attack.seed)  # for models that draw; attacks seed again
        found = perturb(x.float(), y).to(x.dtype)
        broken, inside = fooled(self._forward(found), y), self._inside(found, x)
        if outside := int((broken & ~inside).sum()):
            self.warning(f"{outside} images of an attack, outside [0, 1] or the ball, do not count")
        rows = batch[broken & inside]
        self.x_adv[rows] = found[broken & inside]
        self.robust[rows] = False

    def _inside(self, x_adv: Tensor, x: Tensor) -> Tensor:
        order = math.inf if self.attack.norm == "linf" else 2
        length = (x_adv.float() - x.float()).flatten(1).norm(order, dim=1)
        # in the dtype of x a pixel is rounded by a quarter of its eps, at most
        slack = max(1e-5, torch.finfo(x.dtype).eps / 4 * x[0].numel() ** (1 / order))
        return (length <= self.attack.eps + slack) & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)

    def _result(self) -> AutoAttackResult:
        accuracies = {name: count / len(self.x) for name, count in self.counts.items()}
        self.package.checks.check_square_sr(accuracies, logger=self)
        robust = self._right(self.x_adv)
        if differ := int((robust != self.robust).sum()):
            reason = "the model draws random numbers, or they lie on the boundary"
            self.warning(f"{differ} examples are answered otherwise now than in attacks: {reason}")
        warnings, seed = largest_of_each(self.warnings), self.attack.seed
        return AutoAttackResult(self.x_adv, robust, self.counts, seed, self.versions, warnings)

    def _call(self) -> dict[str, str]:
        weights = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {
            "attack": repr(self.attack),
            "batch_size": str(self.batch_size),
            "x": digest({"": self.x}),
            "y": digest({"": self.y}),
            "model": digest(weights),
            "device": self.x.device.type,
            "versions": repr(self.versions),
        }

    def _save(self, path: Path, call: dict[str, str]) -> None:
        progress = {name: getattr(self, name) for name in _PROGRESS}
        progress["x_adv"] = self.x_adv[~self.robust]  # elsewhere it is x
        save_progress(path, call, progress)

    def _load(self, path: Path, call: dict[str, str]) -> bool:
        progress = load_progress(path, call, self.x.device)
        if progress:
            if set(progress) != set(_PROGRESS):
                raise InputError(f"{path} is damaged; delete it or choose another path")
            self.x_adv[~progress["robust"]] = progress.pop("x_adv")
            vars(self).update(progress)
        return bool(progress)


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


# --- progress


def digest(tensors: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and bytes of `tensors`."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_progress(path: Path, call: dict[str, str], progress: dict[str, Any]) -> None:
    """Writes the progress of a call to `path`, atomically.

    Args:
        path: The file.
        call: What tells this call from others: the name of each part, and its value or digest.
        progress: Tensors and plain values.
    """
    save_tensors(path, {"call": call, "progress": progress})


def load_progress(
    path: Path, call: dict[str, str], device: torch.device | str = "cpu"
) -> dict[str, Any] | None:
    """Reads what `save_progress` wrote for the same call, or returns None where there is no file.

    Raises:
        InputError: If the file is damaged or another one, or of a call that differs in some part.
    """
    # a kill in the middle of a write leaves its temporary file
    for leftover in path.parent.glob(glob.escape(f".{path.name}.") + "*.tmp"):
        leftover.unlink()
    if not path.exists():
        return None
    try:
        kept = load_tensors(path, device)
        theirs, progress = dict(kept["call"]), dict(kept["progress"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not a resume file, or is damaged; delete it or choose another path"
        ) from None
    if differ := [name for name in call if theirs.get(name) != call[name]]:
        raise InputError(
            f"{path} was made by another call (not the same: {', '.join(differ)}); delete it or "
            "choose another path"
        )
    return progress
