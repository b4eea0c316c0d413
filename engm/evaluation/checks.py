"""Checks of what the attacks did: whether a robust accuracy can be believed.

A check passes where nothing is wrong. A flag does not say that a model is not robust; it says that
this evaluation does not show that it is. Thresholds are this kit's, and wide of what sound models
show (naturally and adversarially trained ones, whose attacks differ by some points).
Sources for what to look at: Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018, arXiv
1802.00420; the flags of AutoAttack, arXiv 2003.01690.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engm.attacks import FGSM, PGD, check_batch, checked_logits, cross_entropy, eval_mode, margin
from engm.errors import InputError
from engm.evaluation.accuracy import Attack, Attacked, correct
from engm.evaluation.search import RandomSearch
from engm.report.statistics import wilson

# --- checks of results


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: What was looked at.
        passed: False is a flag.
        meaning: One sentence, with the numbers: what was seen, and what to do about it.
    """

    name: str
    passed: bool
    meaning: str


def clearly_more(more: Tensor, fewer: Tensor, points: float = 0.01) -> bool:
    """Whether `more` holds for more examples than `fewer`, beyond noise: paired, `[n]` booleans.

    Only examples on which the two differ say something; under chance their difference has the
    standard deviation of the root of their number (McNemar 1947). Three of those, and `points`.
    """
    gained, lost = int((more & ~fewer).sum()), int((fewer & ~more).sum())
    return gained - lost > max(points * len(more), 3 * math.sqrt(gained + lost))


def kept_results(found: Mapping[str, Attacked], eps: float) -> Check:
    """Checks that what was kept gives the accuracies that the attacks gave.

    Norms and range were checked before, when the accuracies were recomputed.
    """
    changed = {name: int((a.correct != a.claimed).sum()) for name, a in found.items()}
    worst = max(changed, key=lambda name: changed[name])
    largest = max(attacked.largest_perturbation for attacked in found.values())
    meaning = (
        f"Accuracies are recomputed from the adversarial examples; perturbations are at most "
        f"{largest:.6g} long (eps {eps:.6g}), pixels in [0, 1], none nan."
    )
    if changed[worst] > 0:
        meaning = (
            f"{changed[worst]} answers of {worst} differ when they are recomputed from the "
            "adversarial examples that were kept; the model is random, or the file was changed."
        )
    return Check("recomputed", changed[worst] == 0, meaning)


def more_steps(attacks: Mapping[str, Attack], standing: Mapping[str, Tensor]) -> Check:
    """Checks that no attack is weaker than one with the same loss and fewer steps.

    Args:
        attacks: The attacks; those which are no `PGD` or `FGSM` are left out.
        standing: Which examples stand under each, `[n]` booleans.
    """
    kinds = {
        name: (a.loss, 1 if isinstance(a, FGSM) else a.num_steps * a.restarts)
        for name, a in attacks.items()
        if isinstance(a, PGD | FGSM)
    }
    compared = 0
    for few, (loss, fewer) in kinds.items():
        for many, (other, more) in kinds.items():
            if loss != other or fewer >= more:
                continue
            compared += 1
            if clearly_more(standing[many], standing[few]):
                return Check(
                    "more steps",
                    False,
                    f"{many} leaves {_share(standing[many])} standing, {few} only "
                    f"{_share(standing[few])}; more steps must not be weaker: look at the step "
                    "size and at the gradients.",
                )
    return Check(
        "more steps", True, f"In {compared} pairs, the attack with more steps is no weaker."
    )


def success_rises(curve: Mapping[float, Tensor]) -> Check:
    """Checks that no larger eps leaves clearly more examples standing.

    Args:
        curve: Which examples stand under the same attack at each eps, from small to large.
    """
    items = list(curve.items())
    for i, (small, fewer) in enumerate(items):
        for large, more in items[i + 1 :]:
            if clearly_more(more, fewer):
                return Check(
                    "success rises with eps",
                    False,
                    f"At eps {large:.4g} {_share(more)} stand, at {small:.4g} only "
                    f"{_share(fewer)}; the larger ball holds the smaller one, so the attack fails.",
                )
    return Check(
        "success rises with eps", True, f"Accuracy does not rise over {len(items)} values of eps."
    )


def full_range(eps: float, standing: Tensor) -> Check:
    """Checks that almost nothing stands where every image may become any other, at most 5%."""
    name, seen = "large eps", f"At eps {eps:.4g}, enough for any image, {_share(standing)} stand"
    if int(standing.sum()) <= 0.05 * len(standing):
        return Check(name, True, f"{seen}.")
    return Check(
        name, False, f"{seen}; it should be about none, so the attack does not find what is there."
    )


def black_box(name: str, found: Tensor, white: Mapping[str, Tensor]) -> Check:
    """Checks that an attack without gradients finds next to nothing that those with them miss.

    Args:
        name: The attack without gradients.
        found: Which examples stand under it, `[n]` booleans.
        white: The same for the attacks with gradients.
    """
    together = torch.stack(list(white.values())).all(0)
    alone = int((together & ~found).sum())
    passed = alone <= max(2, 0.01 * len(found))
    meaning = f"{name} alone fools {alone} of {len(found)} examples"
    if not passed:
        meaning += "; attacks with gradients should find these, so the gradients mislead them"
    return Check("black box below white box", passed, f"{meaning}.")


def losses_agree(attacks: Mapping[str, Attack], standing: Mapping[str, Tensor]) -> Check | None:
    """Checks that PGD on the cross-entropy is at most 10 points behind PGD on margin or DLR.

    Args:
        attacks: The attacks; FGSM is left out.
        standing: Which examples stand under each, `[n]` booleans.

    Returns:
        Nothing where one of the two kinds is missing.
    """
    pgd = {name: a for name, a in attacks.items() if isinstance(a, PGD)}
    first = [standing[name] for name, a in pgd.items() if a.loss == "ce"]
    second = {name: standing[name] for name, a in pgd.items() if a.loss in ("margin", "dlr")}
    if not first or not second:
        return None
    entropy = torch.stack(first).all(0)
    best = min(second, key=lambda name: int(second[name].sum()))
    seen = f"PGD on the cross-entropy leaves {_share(entropy)}, {best} {_share(second[best])}"
    if clearly_more(entropy, second[best], points=0.1):
        seen += "; the cross-entropy misleads its attack, as logits that are very large, or "
        seen += "hardly differ, do: quote the worst case"
        return Check("losses agree", False, f"{seen}.")
    return Check("losses agree", True, f"{seen}.")


def autoattack_gap(standing: Tensor, rest: Tensor) -> Check:
    """Checks that AutoAttack is at most 5 points ahead of all other attacks together.

    Args:
        standing: Which examples stand under AutoAttack, `[n]` booleans.
        rest: Which stand under all others.
    """
    seen = f"AutoAttack leaves {_share(standing)}, the other attacks together {_share(rest)}"
    if clearly_more(rest, standing, points=0.05):
        seen += (
            "; so large a gap says that plain PGD fails here: quote AutoAttack, and find out why"
        )
        return Check("AutoAttack near PGD", False, f"{seen}.")
    return Check("AutoAttack near PGD", True, f"{seen}.")


def after_attacks(
    attacks: Mapping[str, Attack],
    found: Mapping[str, Attacked],
    eps: float,
    curve: Mapping[float, Tensor],
) -> list[Check]:
    """Returns all checks of what `attacks` left, and of the `curve` over eps."""
    standing = {name: attacked.correct for name, attacked in found.items()}
    blind = {name for name, attack in attacks.items() if isinstance(attack, RandomSearch)}
    white = {name: mask for name, mask in standing.items() if name not in blind}
    largest = max(curve)
    made = [
        kept_results(found, eps),
        more_steps(attacks, standing),
        success_rises(curve),
        full_range(largest, curve[largest]),
    ]
    if white:
        made += [black_box(name, standing[name], white) for name in sorted(blind)]
    agree = losses_agree(attacks, standing)
    return made if agree is None else [*made, agree]


def _share(standing: Tensor) -> str:
    return f"{int(standing.sum()) / len(standing):.1%}"


# --- checks before attacks


def check_examples(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Returns the highest class; refuses examples that no attack can be made on.

    Args:
        model: The model to attack.
        x: `[n, ...]` floats in [0, 1], on the model's device.
        y: `[n]` int64 classes.

    Raises:
        InputError: With the reason.
    """
    highest = check_batch(x, y)
    if len(y) == 0:
        raise InputError("there is no example to evaluate on")
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers(), x)}
    if len(devices) > 1:
        raise InputError(
            f"model and x are on {' and '.join(sorted(devices))}; move them to one device"
        )
    return highest


def num_classes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Returns the number of classes; refuses a model and examples that do not fit each other.

    Args:
        model: From `[n, ...]` pixels in [0, 1] to `[n, K]` logits.
        x: As for `check_examples`.
        y: Classes, below K.

    Raises:
        InputError: With the reason.
    """
    highest, few = check_examples(model, x, y), x[:2]
    try:
        with torch.no_grad(), eval_mode(model):
            return checked_logits(model, highest, few).shape[1]
    except InputError:
        raise
    except Exception as error:  # whatever a foreign model says of images that do not fit
        reason = str(error).split("\n")[0]
        raise InputError(
            f"the model does not take {few.dtype} images of shape {list(few.shape)}: {reason}"
        ) from error


def before_attacks(
    model: nn.Module, x: Tensor, y: Tensor, standing: Tensor, batch_size: int
) -> list[Check]:
    """Returns all checks of a model and its examples; `standing` are those classified rightly."""
    with torch.no_grad(), eval_mode(model):
        logits = torch.cat([model(part) for part in x.split(batch_size)])
        state = model_state(model, logits)
    right = standing.to(y.device).nonzero()[:batch_size, 0]
    return [
        state,
        logits_not_probabilities(logits),
        clean_accuracy(standing, y, logits.shape[1]),
        pixel_scale(model, x, y, standing, batch_size),
        repeatable(model, x[:batch_size]),
        *gradients(model, x[right], y[right]),
    ]


def model_state(model: nn.Module, logits: Tensor) -> Check:
    """Checks that no part of the model, put into eval mode, is in train mode, and float32."""
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        meaning = (
            f"{training[0]} goes back to train mode in its forward, so answers depend on dropout "
            "or on the batch; leave the mode alone there."
        )
    elif logits.dtype not in (torch.float32, torch.float64):
        meaning = (
            f"The logits are {logits.dtype}, whose rounding hides small gradients; evaluate in "
            "float32."
        )
    else:
        return Check("model state", True, f"Eval mode throughout; logits are {logits.dtype}.")
    return Check("model state", False, meaning)


def logits_not_probabilities(logits: Tensor) -> Check:
    """Checks that the model gives finite logits, not probabilities."""
    name = "logits"
    if not logits.isfinite().all():
        rows = int((~logits.isfinite()).any(1).sum())
        meaning = f"{rows} of {len(logits)} clean images give logits that are nan or inf."
        return Check(name, False, f"{meaning} They count as fooled; mend the model first.")
    low, high = logits.min().item(), logits.max().item()
    if low >= 0 and high <= 1 + 1e-4:
        return Check(
            name,
            False,
            f"All outputs are from {low:.3g} to {high:.3g}, so they seem to be probabilities; a "
            "second softmax flattens the gradient: return logits.",
        )
    return Check(name, True, f"Outputs go from {low:.3g} to {high:.3g}: no probabilities.")


def clean_accuracy(standing: Tensor, y: Tensor, classes: int) -> Check:
    """Checks that the model classifies clean images better than one that always says the same."""
    count, n = int(standing.sum()), len(standing)
    constant = y.bincount(minlength=classes).max().item() / n
    passed = wilson(count, n).low > constant
    meaning = f"{count / n:.1%} of the clean images are classified rightly, "
    if passed:
        meaning += f"{constant:.1%} by always the same answer."
    else:
        meaning += (
            f"no more than by always the same answer ({constant:.1%}); are the pixels scaled "
        )
        meaning += "and the classes numbered as in training?"
    return Check("clean accuracy", passed, meaning)


def pixel_scale(
    model: nn.Module, images: Tensor, y: Tensor, standing: Tensor, batch_size: int
) -> Check:
    """Checks that the model does not do better on pixels that are scaled as other models want them.

    Args:
        model: The model.
        images: `[n, ...]` floats in [0, 1].
        y: `[n]` classes.
        standing: Which of them are classified rightly as they are.
        batch_size: Images a pass.
    """
    name, n = "pixel scale", len(y)
    span = images.max().item() - images.min().item()
    if span < 0.1:
        return Check(
            name,
            False,
            f"The pixels span {span:.4f} of [0, 1], as if divided by 255 twice; eps would be huge.",
        )
    others = [dim for dim in range(images.ndim) if dim != 1]
    std, mean = torch.std_mean(images, others, keepdim=True)
    scaled = {
        "multiplied by 255": images * 255,
        "normalised by mean and standard deviation": (images - mean) / std.clamp(min=1e-6),
        "moved to [-1, 1]": images * 2 - 1,
    }
    for how, x in scaled.items():
        better = correct(model, x, y, batch_size)
        # a network that is hardly trained may do a little better: a third of the errors must go
        fewer = 3 * int((~better).sum()) <= 2 * int((~standing).sum())
        if fewer and clearly_more(better, standing, points=0.02):
            return Check(
                name,
                False,
                f"The model is right on {int(better.sum()) / n:.1%} of the images when pixels are "
                f"{how}, on {int(standing.sum()) / n:.1%} as they are; put that into the model.",
            )
    return Check(name, True, "No other usual scale of the pixels gives a better clean accuracy.")


@torch.no_grad()
def repeatable(model: nn.Module, x: Tensor) -> Check:
    """Checks that the logits of an image are the same in another pass, beside other images."""
    with eval_mode(model):
        once = model(x)
        half = (len(x) + 1) // 2
        again = torch.cat([model(part) for part in x.flip(0).split(half)]).flip(0)
    spread = once.float().std().item()
    change = (once - again).float().abs().max().item()
    # what kernels for other batch sizes round differently
    allowed = max(1e-3, 16 * torch.finfo(once.dtype).eps) * spread
    if change <= allowed:
        return Check("randomness", True, "Two passes, in other batches, give the same logits.")
    return Check(
        "randomness",
        False,
        f"Logits move by up to {change:.3g} (their spread is {spread:.3g}) between two passes of "
        "the same images; noise, or a batch that shares statistics, misleads every attack here: "
        "take it out, or average the gradient over many draws.",
    )


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Check]:
    """Checks that gradients w.r.t. the pixels are not zero: of the margin, of the cross-entropy.

    Args:
        model: The model.
        x: `[n, ...]` floats in [0, 1] that are classified rightly.
        y: `[n]` classes.
    """
    if len(y) == 0:
        return []
    zero = {}
    with eval_mode(model), torch.enable_grad():
        here = x.detach().clone().requires_grad_()
        logits = model(here).float()
        for name, loss in (("margin", margin), ("cross-entropy", cross_entropy)):
            gradient = None
            if logits.requires_grad:
                (gradient,) = torch.autograd.grad(
                    loss(logits, y).sum(), here, retain_graph=True, allow_unused=True
                )
            if gradient is None:
                raise InputError(
                    "no gradient flows from the logits to the images; take detach, argmax and "
                    "no_grad out of the model's forward"
                )
            zero[name] = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    n, checks = len(y), []
    gap = -margin(logits.detach(), y).median().item()
    hidden = zero["margin"] > 0.01 * n
    checks.append(
        Check(
            "zero gradients",
            not hidden,
            f"The margin has no gradient at {zero['margin']} of {n} images"
            + ("; rounding or a step in the model hides it from PGD: attack without that part, "
               "or with its gradient replaced by that of the identity." if hidden else "."),
        )
    )  # fmt: skip
    saturated = zero["cross-entropy"] - zero["margin"] > 0.01 * n
    checks.append(
        Check(
            "saturation",
            not saturated,
            f"The cross-entropy alone has no gradient at {zero['cross-entropy'] - zero['margin']} "
            f"of {n} images, where the true logit leads by {gap:.3g} (median)"
            + ("; logits this large round it to 0: believe the margin and DLR attacks, or divide "
               "the logits." if saturated else "."),
        )
    )  # fmt: skip
    return checks
