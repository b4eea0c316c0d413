"""One optimizer against another: settings chosen on validation images, differences seed by seed."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from engm.config import TYPES
from engm.errors import InputError
from engm.results import (
    ALWAYS,
    PROTOCOL,
    Quantity,
    Record,
    groups_of,
    in_words,
    key_of,
    listed,
    refuse_copies,
    short,
)
from engm.results.statistics import Paired, paired_differences
from engm.run_directory import read_metrics

# settings that one optimizer reads and another does not
OF_OPTIMIZERS = ("optimizer", "scale", "floor", "max_norm")
READ_BY = {
    "msgd": (),
    "msgd-clip": ("max_norm",),
    "engm": ("scale", "floor"),
    "engm-input": ("scale", "floor"),
}


class Difference(Quantity):
    """A quantity that is shown with its sign, in percentage points."""

    def percent(self) -> str:
        """Returns the mean with its sign, and the deviation where there is one."""
        return f"{100 * self.mean:+.1f}{self._spread()}"


@dataclass(frozen=True)
class Comparison:
    """One optimizer against another over the seeds that both have.

    Attributes:
        settings: What the first one's runs are, where runs differ.
        baseline: The other optimizer, and its values of what was chosen.
        quantity: What was compared, such as "robust (best)".
        paired: The differences, and what they say.
    """

    settings: dict[str, Any]
    baseline: str
    quantity: str
    paired: Paired


def choose(records: Sequence[Record], names: Collection[str]) -> tuple[list[Record], list[str]]:
    """Keeps of each optimizer the runs at the settings that the validation images prefer.

    Among runs that differ in `names` and their seed alone, one setting stays: the one with the
    highest robust accuracy on the validation images, best epoch, mean over the seeds. The test
    images have no part in it.

    Args:
        records: Finished runs with their metrics.
        names: Settings to choose, such as `["lr"]`.

    Returns:
        The runs that stay, and remarks: what lacks a seed that others have (it cannot be chosen),
        and whether some had more settings to choose from than others.

    Raises:
        InputError: If a name cannot be chosen, nothing has all seeds, or a run has no metrics.
    """
    refuse_copies(records)
    fixed = {*ALWAYS, *PROTOCOL, "seed"}
    known = [name for name in TYPES if name not in fixed]
    if wrong := [name for name in names if name not in known]:
        raise InputError(f"cannot choose {', '.join(wrong)}; choose of {', '.join(known)}")
    kept, remarks, budgets = [], [], Counter[str]()
    for _, members in groups_of(records, without=names):
        seeds = {member.config.seed for member in members}
        scores: dict[tuple[float, int], list[Record]] = {}
        for settings, candidates in groups_of(members):
            what = in_words(settings, ("optimizer", *names))
            if missing := seeds - {candidate.config.seed for candidate in candidates}:
                remarks.append(f"not chosen from: {what} lacks seed {listed(sorted(missing))}")
            else:
                scores[mean(map(_validation, candidates)), -len(scores)] = candidates
        if not scores:
            raise InputError(
                f"no setting of {listed(names)} has all of the seeds {listed(sorted(seeds))}; "
                "finish the runs"
            )
        kept += scores[max(scores)]
        budgets[f"{members[0].config.optimizer} from {len(scores)}"] += 1
    if len({budget.split()[-1] for budget in budgets}) > 1:
        remarks.append(f"unequal search: settings were chosen for {listed(sorted(budgets))}")
    return kept, remarks


def compare(
    records: Sequence[Record], baseline: str, *, chosen: Collection[str] = ()
) -> tuple[list[Comparison], list[str]]:
    """Compares every optimizer with one of them, seed by seed, where all else is the same.

    Args:
        records: Finished runs.
        baseline: The optimizer to compare with.
        chosen: Settings that each optimizer has its own value of, from `choose`.

    Returns:
        Robust accuracy (best, then last) of each optimizer and setting minus the baseline's; and
        what has no run of the baseline to be compared with, in words.

    Raises:
        InputError: If there is no run of the baseline, or two that differ where they should not.
    """
    refuse_copies(records)
    if baseline not in (there := sorted({r.config.optimizer for r in records})):
        raise InputError(
            f"no run has optimizer {baseline!r} to compare with; there is {listed(there)}"
        )
    apart = {*OF_OPTIMIZERS, *chosen}
    own = [name for name in chosen if name not in OF_OPTIMIZERS]
    matters = (*own, *READ_BY[baseline])
    shown = [name for name in own if len({repr(getattr(r.config, name)) for r in records}) > 1]
    bases: dict[str, list[Record]] = defaultdict(list)
    for record in (r for r in records if r.config.optimizer == baseline):
        bases[key_of(record, apart)].append(record)
    for base in bases.values():
        for name in matters:
            if len(values := {repr(v): v for v in (getattr(r.config, name) for r in base)}) > 1:
                raise InputError(
                    f"{baseline} was run with {name} {listed(values.values())}; which is the "
                    f"baseline? --choose {name} takes the one that the validation images prefer"
                )
    found, alone = [], []
    for settings, members in groups_of(records):
        if members[0].config.optimizer == baseline:
            continue
        base = bases.get(key_of(members[0], apart), [])
        if not {r.config.seed for r in base} & {r.config.seed for r in members}:
            alone.append(f"{in_words(settings)}: no run of {baseline} to pair with")
            continue
        words = ", ".join([baseline, *(f"{n} {short(getattr(base[0].config, n))}" for n in shown)])
        for which in ("best", "last"):
            first, second = (
                {r.config.seed: r.result[which]["robust_accuracy"] for r in runs}
                for runs in (members, base)
            )
            paired = paired_differences(first, second)
            found.append(Comparison(settings, words, f"robust ({which})", paired))
    return found, alone


def difference_rows(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Returns the rows of a table of comparisons, differences in percentage points."""
    return [
        {
            **comparison.settings,
            "against": comparison.baseline,
            "of": comparison.quantity,
            "difference": Difference.of(comparison.paired.differences),
            "Student 95%": comparison.paired.student or "",
            "bootstrap 95%": comparison.paired.bootstrap or "",
            "sign flip": comparison.paired.test,
            "pairs": len(comparison.paired.seeds),
            "outcome": comparison.paired.outcome,
        }
        for comparison in comparisons
    ]


def _validation(record: Record) -> float:
    metrics = read_metrics(record.folder)
    if not metrics:
        raise InputError(f"{record.folder} has no metrics to choose by; leave it out")
    return max(line["validation_robust_accuracy"] for line in metrics)
