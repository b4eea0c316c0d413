"""Checks of what the attacks did: whether a robust accuracy can be believed.

A check passes where nothing is wrong. A flag does not say that a model is not robust; it says that
this evaluation does not show that it is. Thresholds are this kit's, and wide of what sound models
show (naturally and adversarially trained ones, whose attacks differ by some points).
Sources for what to look at: Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018, arXiv
1802.00420; the flags of AutoAttack, arXiv 2003.01690.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn

from engm.attacks import FGSM, PGD, check_batch, checked_logits, cross_entropy, eval_mode, margin
from engm.errors import InputError
from engm.evaluation.accuracy import Attack, Attacked, correct
from engm.evaluation.attacks import RandomSearch, Transfer
from engm.report.statistics import wilson

# what hides or misleads gradients shows in these
MASKING = (
    "no gradient", "zero gradients", "gradient direction", "saturation", "randomness",
    "batch statistics", "test-time training", "success rises with eps", "large eps",
    "black box below white box", "AutoAttack near PGD",
)  # fmt: skip
WARNINGS = "warnings of AutoAttack"

# --- checks of results: `standing` are the `[n]` booleans of what an attack leaves right


@dataclass(frozen=True)
class Check:
    """What a check found; not `passed` is a flag.

    `meaning` is one sentence, with the numbers: what was seen, and what to do about it.
    """

    name: str
    passed: bool
    meaning: str


def _judged(name: str, passed: bool, seen: str, wrong: str = "", n: int = 100) -> Check:
    # counts of `n` examples are compared: of few, `clearly_more` sees large differences alone
    few = f", with {n} examples, of which only differences of {min(10 / n, 1):.0%} can be seen"
    meaning = seen + few * (n < 100) if passed else f"{seen}; {wrong}"
    return Check(name, passed, meaning + "." * (meaning[-1] != "?"))


def clearly_more(more: Tensor, fewer: Tensor, points: float = 0.01, deviations: float = 3) -> bool:
    """Whether `more` holds for more examples than `fewer`, beyond noise: paired, `[n]` booleans.

    Only examples on which the two differ say something; under chance their difference has the
    standard deviation of the root of their number (McNemar 1947). More than so many `deviations`,
    and `points`.
    """
    gained, lost = int((more & ~fewer).sum()), int((fewer & ~more).sum())
    return gained - lost > max(points * len(more), deviations * math.sqrt(gained + lost))


def kept_results(found: Mapping[str, Attacked], eps: float) -> Check:
    """Checks that what was kept gives the accuracies that the attacks gave.

    Norms and range were checked before, when the accuracies were recomputed.
    """
    changed = {name: int((a.correct != a.claimed).sum()) for name, a in found.items()}
    worst = max(changed, key=lambda name: changed[name])
    if changed[worst]:
        seen = f"{changed[worst]} answers of {worst} differ when they are recomputed from the "
        seen += "adversarial examples that were kept"
        wrong = "the model is random, or the file was changed"
        return _judged("recomputed", False, seen, wrong)
    largest = max(attacked.largest_perturbation for attacked in found.values())
    of = "Accuracies are" if len(found) > 1 else f"The accuracy under {worst} is"
    seen = f"{of} recomputed from the adversarial examples; perturbations are at most "
    seen += f"{largest:.6g} long (eps {eps:.6g}), pixels in [0, 1], none nan"
    return _judged("recomputed", True, seen)


def more_steps(attacks: Mapping[str, Attack], standing: Mapping[str, Tensor]) -> Check:
    """Checks that no `PGD` or `FGSM` is weaker than one with the same loss and fewer steps."""
    kinds = {
        name: (a.loss, 1 if isinstance(a, FGSM) else a.num_steps * a.restarts)
        for name, a in attacks.items()
        if isinstance(a, PGD | FGSM)
    }
    pairs = [
        (f, m) for f in kinds for m in kinds if kinds[f][0] == kinds[m][0] and kinds[f] < kinds[m]
    ]
    if not pairs:
        return _judged("more steps", True, "No two attacks differ in the number of steps alone")
    for few, many in pairs:
        if clearly_more(standing[many], standing[few]):
            seen = f"{many} leaves {_share(standing[many])} standing, {few} only "
            wrong = "more steps must not be weaker: look at the step size and at the gradients"
            return _judged("more steps", False, seen + _share(standing[few]), wrong)
    seen = f"Attacks with more steps are not clearly weaker ({len(pairs)} compared)"
    return _judged("more steps", True, seen, n=len(standing[pairs[0][0]]))


def success_rises(curve: Mapping[float, Tensor]) -> Check:
    """Checks that no larger eps leaves clearly more standing, of a `curve` from small to large."""
    name = "success rises with eps"
    for (small, fewer), (large, more) in combinations(curve.items(), 2):
        if clearly_more(more, fewer):
            seen = f"At eps {large:.4g} {_share(more)} stand, at {small:.4g} only {_share(fewer)}"
            wrong = "the larger ball holds the smaller one, so the attack fails"
            return _judged(name, False, seen, wrong)
    n = len(next(iter(curve.values())))
    return _judged(
        name, True, f"Accuracy does not clearly rise over {len(curve)} values of eps", n=n
    )


def full_range(eps: float, standing: Tensor) -> Check:
    """Checks that almost nothing stands where every image may become any other, at most 5%."""
    seen = f"At eps {eps:.4g}, enough for any image, {_share(standing)} stand"
    wrong = "it should be about none, so the attack does not find what is there"
    few_stand = int(standing.sum()) <= 0.05 * len(standing)
    return _judged("large eps", few_stand, seen, wrong, len(standing))


def black_box(name: str, found: Tensor, white: Mapping[str, Tensor]) -> Check:
    """Checks that an attack without gradients finds next to nothing that the `white` ones miss."""
    together = torch.stack(list(white.values())).all(0)
    alone = int((together & ~found).sum())
    return _judged(
        "black box below white box",
        alone <= max(2, 0.01 * len(found)),
        f"{name} alone fools {alone} of {len(found)} examples",
        "attacks with gradients should find these, so the gradients mislead them",
        len(found),
    )


def losses_agree(attacks: Mapping[str, Attack], standing: Mapping[str, Tensor]) -> Check | None:
    """Checks that PGD is on no loss 10 points behind PGD on another, of as many steps and starts.

    Returns nothing where there are no such two.
    """
    pgd = {name: a for name, a in attacks.items() if isinstance(a, PGD)}
    pairs = [
        (weak, strong)
        for weak, a in pgd.items()
        for strong, b in pgd.items()
        if a.loss != b.loss and (a.num_steps, a.restarts) == (b.num_steps, b.restarts)
    ]
    if not pairs:
        return None
    counts = {name: int(standing[name].sum()) for name in pgd}
    weak, strong = max(pairs, key=lambda pair: counts[pair[0]] - counts[pair[1]])
    return _judged(
        "losses agree",
        not clearly_more(standing[weak], standing[strong], points=0.1),
        f"{weak} leaves {_share(standing[weak])}, {strong} {_share(standing[strong])}",
        "quote the worst case. Outputs that training made flat, as TRADES and MART do, show this, "
        "and outputs that hide a part of their gradient: AutoAttack tells",
        len(standing[weak]),
    )


def autoattack_gap(standing: Tensor, rest: Tensor) -> Check:
    """Checks that AutoAttack is at most 5 points ahead of all other attacks together, `rest`."""
    return _judged(
        "AutoAttack near PGD",
        not clearly_more(rest, standing, points=0.05),
        f"AutoAttack leaves {_share(standing)}, the other attacks together {_share(rest)}",
        "so large a gap says that plain PGD fails here: quote AutoAttack, and find out why",
        len(rest),
    )


def budget_used(found: Mapping[str, Attacked], eps: float) -> Check:
    """Checks that no attack that leaves examples standing stays far inside of eps."""
    for name, attacked in found.items():
        length = attacked.largest_perturbation
        if length < eps / 4 and attacked.correct.any():
            seen = f"{name} moves images by {length:.2g} at most, of eps {eps:.4g}, and leaves "
            wrong = "are its steps too short, or is its eps in another unit?"
            return _judged("budget used", False, seen + _share(attacked.correct), wrong)
    return _judged("budget used", True, "Every attack uses its eps, or fools all")


def attacks_strong(given: Tensor, name: str, standard: Tensor) -> Check:
    """Checks that the attacks given are not clearly weaker than the standard one, called `name`."""
    return _judged(
        "attacks strong",
        not clearly_more(given, standard, points=0.05),
        f"The attacks given leave {_share(given)}, {name} {_share(standard)}",
        "they are weak: quote the worst case",
        len(given),
    )


def over_draws(check: Check, draws: Sequence[Tensor]) -> Check:
    """Adds to the check of randomness what stands, draw by draw, under attacks of the mean."""
    if check.name != "randomness":
        return check
    shares, k = [int(standing.sum()) / len(standing) for standing in draws], len(draws)
    number = f"{sum(shares) / k:.1%} ({min(shares):.1%} to {max(shares):.1%})"
    meaning = (
        f"{check.meaning} Over {k} draws, PGD on the mean of {k} leaves {number}. The worst case "
        "counts an image that falls in any one draw, so that it is low without any attack."
    )
    return replace(check, meaning=meaning)


def detector(found: Mapping[str, Attacked], clean: Tensor, y: Tensor) -> Check | None:
    """Flags a class that no image has, and that most of the fooled ones are taken for."""
    for name, attacked in found.items():
        fooled = attacked.answers[clean & ~attacked.correct & (attacked.answers >= 0)]
        strange = fooled[~torch.isin(fooled, y.cpu())]
        if len(fooled) >= 10 and 2 * len(strange) > len(fooled):
            seen = (
                f"{len(strange)} of {len(fooled)} images that {name} fools are taken for a class "
                f"that no image has ({int(strange.mode().values)})"
            )
            wrong = (
                "if that is how a detector rejects, rejections count as errors here: attack so as "
                "to pass it, and report the rejected apart"
            )
            return _judged("detector", False, seen, wrong)
    return None


def after_attacks(
    attacks: Mapping[str, Attack],
    found: Mapping[str, Attacked],
    clean: Tensor,
    y: Tensor,
    curve: Mapping[float, Tensor],
    eps: float,
) -> list[Check]:
    """Returns all checks of what `attacks`, all of that eps, left, and of the `curve` over eps."""
    standing = {name: attacked.correct for name, attacked in found.items()}
    blind = {
        name for name, attack in attacks.items() if isinstance(attack, RandomSearch | Transfer)
    }
    white = {name: mask for name, mask in standing.items() if name in set(attacks) - blind}
    largest, weakest = max(curve), max(standing, key=lambda name: int(standing[name].sum()))
    made = [
        kept_results(found, eps),
        _judged(
            "below clean",
            # next to no image becomes right under an attack that works
            not clearly_more(standing[weakest], clean, deviations=1.5),
            f"{weakest}, the weakest attack, leaves {_share(standing[weakest])}; clean "
            f"{_share(clean)}",
            "does it go down the loss, or towards y?",
            len(clean),
        ),
        # where eps is so large that images have no room for it, half of all there is
        budget_used(found, min(eps, largest / 2)),
        more_steps(attacks, standing),
        success_rises(curve),
        full_range(largest, curve[largest]),
    ]
    if white:
        made += [black_box(name, standing[name], white) for name in sorted(blind)]
    more = [losses_agree(attacks, standing), detector(found, clean, y)]
    return made + [check for check in more if check is not None]


def _share(standing: Tensor) -> str:
    return f"{int(standing.sum()) / len(standing):.1%}"


# --- checks before attacks


def num_classes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Returns the number of classes; refuses a model and examples that no attack can be made on."""
    highest = check_batch(x, y)
    if len(y) == 0:
        raise InputError("there is no example to evaluate on")
    devices = sorted({str(t.device) for t in (*model.parameters(), *model.buffers(), x)})
    if len(devices) > 1:
        raise InputError(f"model and x are on {' and '.join(devices)}; move them to one device")
    few = x[:2].clone()
    try:
        with torch.no_grad(), eval_mode(model):
            classes = checked_logits(model, highest, few).shape[1]
    except InputError:
        raise
    except Exception as error:  # whatever a foreign model says of images that do not fit
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        channels = "; x[:, None] gives grey images their channel" if few.ndim == 3 else ""
        raise InputError(
            f"the model does not take {few.dtype} images of shape {list(few.shape)}{channels}: "
            f"{reason}"
        ) from error
    _refuse_in_place(model, few, x[:2])
    return classes


def _refuse_in_place(model: nn.Module, given: Tensor, x: Tensor) -> None:
    if not torch.equal(given, x):
        raise InputError(
            f"the model ({type(model).__name__}) changes its images in place, so attacks would not "
            "see their own; write x = x - mean, not x -= mean"
        )


def missing_gradient(model: nn.Module, x: Tensor) -> str | None:
    """Returns why no gradient flows from the logits to images, or nothing where one does."""
    gradient, reason = None, ""
    with eval_mode(model), torch.enable_grad():
        here = x[:2].detach().clone().requires_grad_()
        try:
            logits = model(here)
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(logits.sum(), here, allow_unused=True)
        except RuntimeError as error:  # such as "call numpy() on a tensor that requires grad"
            if any(lack in str(error) for lack in ("out of memory", "allocate memory")):
                raise
            reason = f" ({str(error).splitlines()[0]})"
    if gradient is not None:
        return None
    return (
        f"no gradient flows from the logits to the images{reason}; take detach, argmax and no_grad "
        "out of the model's forward, or give a differentiable stand-in as surrogate="
    )


def before_attacks(
    model: nn.Module, source: nn.Module, x: Tensor, y: Tensor, standing: Tensor, batch_size: int
) -> list[Check]:
    """Returns all checks of a model and its examples, of which `standing` are classified rightly.

    `source` is what gradients are taken of: the model, or a stand-in.
    """
    given = x.clone()
    with torch.no_grad(), eval_mode(model):
        logits = torch.cat([model(part) for part in given.split(batch_size)])
        state = model_state(model, logits)
    _refuse_in_place(model, given, x)
    right = standing.to(y.device).nonzero()[:batch_size, 0]
    repeats, outputs = repeatable(model, x[:batch_size]), logits_not_probabilities(logits)
    made = [
        state,
        outputs,
        clean_accuracy(standing, y, logits.shape[1]),
        pixel_scale(model, x, y, standing, batch_size),
        repeats,
    ]
    if blind := missing_gradient(source, x):
        meaning = f"{blind[0].upper()}{blind[1:]}. Only attacks by answers alone were run: what "
        meaning += "they leave is an upper bound, and a loose one."
        return [*made, Check("no gradient", False, meaning)]
    found = gradients(source, x[right], y[right], own=source is model)
    # what noise, or the bend of a softmax, does to a single step says nothing
    sound = repeats.passed and outputs.passed
    return made + [check for check in found if sound or check.name != "gradient direction"]


def unit_of(eps: float, norm: str) -> Check:
    """Checks that eps is half a grey level at least, and under l2 no usual one of linf."""
    name, seen = "unit of eps", f"eps is {255 * eps:.3g} grey levels of 255"
    if norm == "l2" and eps < _LEAST_L2:
        wrong = "under l2 all pixels share that: was it meant for linf?"
        return _judged(name, False, seen, wrong)
    wrong = "no image of 8 bits has that; was it divided by 255 twice?"
    return _judged(name, 255 * eps >= 0.5, seen, wrong)


_LEAST_L2 = 0.04  # l2 budgets of the literature begin at 0.05, linf ones are mostly 8/255 or less


def model_state(model: nn.Module, logits: Tensor) -> Check:
    """Checks that no part of the model, put into eval mode, is in train mode, and float32."""
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    fine = logits.dtype in (torch.float32, torch.float64)
    seen, wrong = f"Logits are {logits.dtype}", "rounding hides small gradients: use float32"
    if training:
        seen = f"{training[0]} goes back to train mode in its forward"
        wrong = "answers depend on dropout or on the batch: leave the mode alone there"
    return _judged("model state", fine and not training, seen, wrong)


def logits_not_probabilities(logits: Tensor) -> Check:
    """Checks that the model gives finite logits, not probabilities."""
    if not logits.isfinite().all():
        rows = int((~logits.isfinite()).any(1).sum())
        seen = f"{rows} of {len(logits)} clean images give logits that are nan or inf"
        return _judged("logits", False, seen, "mend the model first; nan counts as fooled")
    low, high, sums = logits.min().item(), logits.max().item(), logits.double().sum(1)
    if low == high:
        wrong = "the network has collapsed in training, or its last layer is zero"
        return _judged("logits", False, f"All outputs are {low:.3g}", wrong)
    alike = (sums.max() - sums.min()).item() <= 1e-3 * abs(sums.mean().item())
    if low >= 0 and (high <= 1 + 1e-4 or alike):
        scaled = f", and add up to {sums.mean().item():.4g} for each image" * alike
        seen = f"All outputs are from {low:.3g} to {high:.3g}{scaled}, so they seem to be "
        wrong = "a second softmax flattens the gradient: return logits"
        return _judged("logits", False, f"{seen}probabilities", wrong)
    return _judged("logits", True, f"Outputs go from {low:.3g} to {high:.3g}: no probabilities")


_FEW = 30  # images, of which an interval is wide


def clean_accuracy(standing: Tensor, y: Tensor, classes: int) -> Check:
    """Checks that the model classifies clean images better than one that always says the same."""
    count, n = int(standing.sum()), len(standing)
    constant = y.bincount(minlength=classes).max().item() / n
    return _judged(
        "clean accuracy",
        wilson(count, n).low > constant,
        f"{count / n:.1%} of the clean images are classified rightly; always to answer the "
        f"commonest class would get {constant:.1%}",
        "are the pixels scaled and the classes numbered as in training?"
        if n >= _FEW or count / n <= constant
        else f"{n} images are too few to tell the two apart",
    )


def pixel_scale(
    model: nn.Module, images: Tensor, y: Tensor, standing: Tensor, batch_size: int
) -> Check:
    """Checks that the model does not do better on pixels that are scaled or ordered otherwise."""
    name = "pixel scale"
    span = images.max().item() - images.min().item()
    if span < 0.1:
        seen = f"The pixels span {span:.4f} of [0, 1], as if divided by 255 twice"
        return _judged(name, False, seen, "eps would be huge")
    others = [dim for dim in range(images.ndim) if dim != 1]
    std, mean = torch.std_mean(images, others, keepdim=True)
    std, put = std.clamp(min=1e-6), "put that into the model, if it was trained so"
    twice = "is the model's own normalisation there twice?"
    changed = {
        "multiplied by 255": (images * 255, put),
        "divided by 255": (images / 255, "does the model multiply them by 255 once too often?"),
        "normalised by mean and standard deviation": ((images - mean) / std, put),
        "moved to [-1, 1]": (images * 2 - 1, put),
        "moved back by mean and standard deviation": (images * std + mean, twice),
        "moved back from [-1, 1]": (images / 2 + 0.5, twice),
    }
    if images.ndim == 4 and images.shape[1] == 3:
        changed["with their channels in reverse order"] = (images.flip(1), "RGB, or BGR?")
        for whose, constants in _USUAL.items():
            mean, std = (torch.tensor(c).to(images).view(3, 1, 1) for c in constants)
            changed[f"normalised by the constants of {whose}"] = ((images - mean) / std, put)
            changed[f"moved back by the constants of {whose}"] = (images * std + mean, twice)
    best, found = standing, None
    for how, (x, remedy) in changed.items():
        better = correct(model, x, y, batch_size)
        # a network that is hardly trained, or with one-step attacks, may do a little better on
        # wider pixels, and one whose classes are numbered otherwise on any: half of the errors go
        fewer = 2 * int((~better).sum()) <= int((~standing).sum())
        if fewer and clearly_more(better, standing, points=0.02) and better.sum() > best.sum():
            best, found = better, (how, remedy)
    if found:
        how, remedy = found
        seen = f"The model is right on {_share(best)} of the images when pixels are {how}, on "
        return _judged(name, False, f"{seen}{_share(standing)} as they are", remedy)
    seen = "No other usual scale of the pixels gives a better clean accuracy"
    return _judged(name, True, seen, n=len(standing))


# mean and standard deviation of the pixels of a channel
_USUAL = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@torch.no_grad()
def repeatable(model: nn.Module, x: Tensor) -> Check:
    """Checks that the logits of an image are its own: alike in another pass, beside other images.

    The check is called after what it finds: "randomness", "batch statistics", or "test-time
    training", where the model changes its weights or takes gradients while it answers.
    """
    unpacked = []  # by backward passes; with gradients off, the model's own

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tensor.shape)
        return tensor

    before = {k: t.clone() for k, t in model.state_dict().items() if t.is_floating_point()}
    with eval_mode(model):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            once = model(x.clone())
        now = {k: t for k, t in model.state_dict().items() if k in before}
        moved = [k for k, t in now.items() if not same(t, before[k])]
        again = model(x.clone())
        half = (len(x) + 1) // 2
        apart = torch.cat([model(part.clone()) for part in x.flip(0).split(half)]).flip(0)
    spread = once.float().nan_to_num(0, 0, 0).std().item()
    allowed = _rounding(once.dtype) * spread
    moves = [_difference(once, other) for other in (again, apart)]
    if moved or unpacked:
        what = f"changes {moved[0]}" if moved else "takes gradients"
        wrong = "attacks do not see what they will meet: take that out, or attack through all of it"
        return _judged("test-time training", False, f"The model {what} while it answers", wrong)
    if max(moves) <= allowed:
        return _judged("randomness", True, "Two passes, in other batches, give the same logits")
    seen = f"Logits move by up to {max(moves):.3g} (their spread is {spread:.3g}) between two "
    seen += "passes of the same images"
    if moves[0] <= allowed:
        wrong = "as BatchNorm in train mode has it, or noise from a fixed seed, no image has an "
        wrong += "answer of its own: take that out (of a model within a function: call its eval())"
        return _judged("batch statistics", False, f"{seen} among others", wrong)
    wrong = "the model draws random numbers, and each attack meets others: take them out (of a "
    wrong += "model within a function: call its eval()), or attack the mean over many draws"
    return _judged("randomness", False, seen, wrong)


def same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of floats hold the same values, nan among them."""
    return torch.equal(tensor.nan_to_num(), other.nan_to_num())


def alike(logits: Tensor, others: Tensor) -> bool:
    """Whether two passes give the same logits, but for what kernels round differently."""
    spread = logits.float().nan_to_num(0, 0, 0).std().item()
    return _difference(logits, others) <= _rounding(logits.dtype) * spread


def _difference(logits: Tensor, others: Tensor) -> float:
    same = (logits == others) | (logits.isnan() & others.isnan())
    return (logits - others).masked_fill(same, 0).float().abs().max().item()


def _rounding(dtype: torch.dtype) -> float:
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def gradients(model: nn.Module, x: Tensor, y: Tensor, *, own: bool = True) -> list[Check]:
    """Checks that gradients w.r.t. the pixels are there, and the margin follows its own.

    `x` are images that are classified rightly, as `y`; `own` is whether the gradients are those of
    the model, not of a stand-in.
    """
    if len(y) == 0:
        seen = "No image is classified rightly, so that gradients say nothing"
        return [_judged("gradients not seen", False, seen, "see to the clean accuracy first")]
    with eval_mode(model), torch.enable_grad():
        here = x.detach().clone().requires_grad_()
        logits = model(here).float()
        losses = margin(logits, y)
        (steep,) = torch.autograd.grad(losses.sum(), here, retain_graph=True)
        (entropy,) = torch.autograd.grad(cross_entropy(logits, y).sum(), here)
    flat = [int((g.flatten(1).abs().amax(1) == 0).sum()) for g in (steep, entropy)]
    rose, promised = _rises(model, x, y, steep, _SMALL)
    falls = int((rose < -1e-4 * losses.abs()).sum())
    part = _part(rose, promised)
    # images on a grid, of which a model knows the nearest alone, do not move at the smaller step
    off = own and all(
        abs(p - 1) > _OFF for p in (part, _part(*_rises(model, x, y, steep, 4 * _SMALL)))
    )
    n, alike = len(y), len(y) - len(logits.detach().unique(dim=0))
    gap = -losses.detach().median().item()
    # a softmax that is all 0 and 1 gives the images of a class the very same outputs
    reason = (
        "the outputs of all images are the same, as of a network that has collapsed in training"
        if alike == n - 1 and n > 1
        else f"the outputs of {alike} images are those of another, as after a softmax that "
        "saturates: return the logits before it"
        if alike > n / 2
        else "rounding or a step in the model hides it from PGD: attack without that part, or give "
        "the model without it as surrogate="
    )
    flat_at = f"The margin has no gradient at {flat[0]} of {n} images"
    lowers = f"A step of {_SMALL:g} up the margin's gradient lowers it at {falls} of {n} images"
    if off and falls <= 0.1 * n:
        lowers += f", and raises it by {part:.2g} times what the gradient says (median)"
    backwards = (
        "that is not the gradient of what the model answers: look for a part that is detached, or "
        "whose backward pass is another than its forward pass"
    )
    rounded = (
        f"The cross-entropy alone has no gradient at {flat[1] - flat[0]} of {n} images, where the "
        f"true logit leads by {gap:.3g} (median)"
    )
    large = "logits this large round it to 0: believe the margin and DLR attacks, or divide the "
    return [
        _judged("zero gradients", flat[0] <= 0.01 * n, flat_at, reason),
        _judged("gradient direction", falls <= 0.1 * n and not off, lowers, backwards),
        _judged("saturation", flat[1] - flat[0] <= 0.01 * n, rounded, f"{large}logits"),
    ]


_SMALL = 1e-3  # a quarter of a grey level: there a sound gradient holds
_OFF = 0.2  # of the rise that a gradient promises


@torch.no_grad()
def _rises(
    model: nn.Module, x: Tensor, y: Tensor, steep: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """Returns how much the margin rises along its gradient `steep`, and what that promises."""
    there = (x + size * steep.sign()).clamp(0, 1)
    with eval_mode(model):
        rose = margin(model(there.clone()).float(), y) - margin(model(x.clone()).float(), y)
    return rose, ((there - x) * steep).flatten(1).sum(1)


def _part(rose: Tensor, promised: Tensor) -> float:
    """Returns which part of the promised rise is there: the median of the images that promise."""
    some = promised > 0
    return (rose[some] / promised[some]).median().item() if some.any() else 1.0
