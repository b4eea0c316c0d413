"""What `engm.evaluate` returns: accuracies with intervals, checks, tables."""

from dataclasses import dataclass
from typing import Any

from engm.attacks import FGSM, PGD
from engm.evaluation import Attack
from engm.evaluation.checks import Check
from engm.evaluation.random_search import RandomSearch
from engm.results.statistics import Interval, wilson


@dataclass(frozen=True)
class Accuracy:
    """How many of n examples are classified rightly; only those may be quoted with an interval.

    Attributes:
        count: Right ones.
        n: All.
    """

    count: int
    n: int

    @property
    def fraction(self) -> float:
        """The accuracy."""
        return self.count / self.n

    @property
    def interval(self) -> Interval:
        """Wilson's 95% interval: what n examples say about all others of their kind."""
        return wilson(self.count, self.n)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        ends = [self.interval.low, self.interval.high]
        return {"accuracy": self.fraction, "count": self.count, "interval": ends}

    def __str__(self) -> str:
        interval = self.interval
        return f"{self.fraction:.1%} | {interval.low:.1%} to {interval.high:.1%}"


@dataclass(frozen=True)
class AttackResult:
    """What one attack left.

    Attributes:
        name: Its name in the table.
        accuracy: Recomputed from the adversarial examples.
        settings: What it did, in words.
        largest_perturbation: In pixel units, at most eps.
        file: Where its adversarial examples are, in the folder that was asked for.
    """

    name: str
    accuracy: Accuracy
    settings: str
    largest_perturbation: float
    file: str | None


@dataclass(frozen=True)
class RobustnessReport:
    """What many attacks left of a model's accuracy, and what to think of it.

    Attributes:
        eps: Budget, in pixel units.
        norm: "linf" or "l2".
        clean: Accuracy without an attack.
        attacks: One entry an attack.
        worst: Accuracy when each example meets the attack that is worst for it: the mean over
            examples of the minimum over all attacks and the clean image. The number to quote.
        curve: Accuracy under PGD on the margin at several eps, from 0 to where any image may become
            any other.
        checks: What was looked at; `flags` has those that did not pass.
        skipped: Attacks that could not run, with the reason.
        autoattack: What AutoAttack says of itself, where it ran: counts, warnings, versions.
        seed: Seed of all attacks.
        environment: Versions, commit, hardware.
    """

    eps: float
    norm: str
    clean: Accuracy
    attacks: tuple[AttackResult, ...]
    worst: Accuracy
    curve: dict[float, Accuracy]
    checks: tuple[Check, ...]
    skipped: dict[str, str]
    autoattack: dict[str, Any] | None
    seed: int
    environment: dict[str, Any]

    @property
    def flags(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; accuracies are fractions."""
        return {
            **{key: getattr(self, key) for key in ("eps", "norm", "seed")},
            "num_examples": self.clean.n,
            "clean": self.clean.to_dict(),
            "attacks": {
                result.name: result.accuracy.to_dict()
                | {k: v for k, v in vars(result).items() if k not in ("name", "accuracy")}
                for result in self.attacks
            },
            "worst": self.worst.to_dict(),
            "curve": [{"eps": eps, **found.to_dict()} for eps, found in self.curve.items()],
            "checks": [dict(vars(check)) for check in self.checks],
            "skipped": self.skipped,
            "autoattack": self.autoattack,
            "environment": self.environment,
        }

    def to_markdown(self) -> str:
        """Returns the tables that a person reads: accuracies, curve, checks."""
        rows = [f"| {r.name} | {r.accuracy} | {r.settings} |" for r in self.attacks]
        rows += [f"| {name} | not run | | {reason} |" for name, reason in self.skipped.items()]
        curve = "; ".join(f"{eps:.4g}: {a.fraction:.1%}" for eps, a in self.curve.items())
        marks = [
            f"- {'pass' if c.passed else 'FLAG'} **{c.name}**: {c.meaning}" for c in self.checks
        ]
        verdict = f"{len(self.flags)} of {len(self.checks)} checks raise a flag"
        return "\n".join(
            [
                f"{self.clean.n} examples, {self.norm} eps {self.eps:.6g}, seed {self.seed}",
                "",
                "| attack | accuracy | 95% interval | settings |",
                "| --- | --- | --- | --- |",
                f"| clean | {self.clean} | |",
                *rows,
                f"| **worst case** | {self.worst} | each example under the attack worst for it |",
                "",
                f"Accuracy over eps (PGD on the margin): {curve}",
                "",
                f"{verdict}:" if self.flags else f"All {len(self.checks)} checks pass:",
                "",
                *marks,
                *(f"- AutoAttack says: {w}" for w in (self.autoattack or {}).get("warnings", ())),
            ]
        )

    def __str__(self) -> str:
        return self.to_markdown()


def in_words(attack: Attack) -> str:
    """Says what an attack does, for the table."""
    if isinstance(attack, FGSM):
        return f"one step of {attack.eps:.4g}"
    if isinstance(attack, PGD):
        starts = f"{attack.restarts} random start" + "s" * (attack.restarts > 1)
        length = f"of {attack.step_size:.4g}"
        if attack.decay:
            length = f"from {attack.step_size:.4g} down to 0"
        return f"{attack.num_steps} steps {length}, {starts if attack.random_start else 'from x'}"
    if isinstance(attack, RandomSearch):
        return f"{attack.num_queries} queries, no gradient"
    return repr(attack)
