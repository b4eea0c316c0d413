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
from torch import Tensor

from engm.attacks import FGSM, PGD
from engm.evaluation import Attack, Attacked


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
    if changed[worst] > 0:
        return Check(
            "recomputed",
            False,
            f"{changed[worst]} answers of {worst} differ when they are recomputed from the "
            "adversarial examples that were kept; the model is random, or the file was changed.",
        )
    largest = max(attacked.largest_perturbation for attacked in found.values())
    return Check(
        "recomputed",
        True,
        f"Accuracies are recomputed from the adversarial examples; perturbations are at most "
        f"{largest:.6g} long (eps {eps:.6g}), pixels in [0, 1], none nan.",
    )


def more_steps(attacks: Mapping[str, Attack], standing: Mapping[str, Tensor]) -> Check:
    """Checks that no attack is weaker than one with the same loss and fewer steps.

    Args:
        attacks: The attacks; those which are no `PGD` or `FGSM` are left out.
        standing: Which examples stand under each, `[n]` booleans.
    """
    steps = {
        name: 1 if isinstance(a, FGSM) else a.num_steps * a.restarts
        for name, a in attacks.items()
        if isinstance(a, PGD | FGSM)
    }
    compared = 0
    for few, a in ((name, attacks[name]) for name in steps):
        for many, b in ((name, attacks[name]) for name in steps):
            same = isinstance(a, PGD | FGSM) and isinstance(b, PGD | FGSM) and a.loss == b.loss
            if not same or steps[few] >= steps[many]:
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


def _share(standing: Tensor) -> str:
    return f"{int(standing.sum()) / len(standing):.1%}"
