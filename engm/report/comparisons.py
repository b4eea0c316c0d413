"""One optimizer against another: settings chosen on validation images, differences seed by seed.

Or one value of any setting against its others, such as bfloat16 against float32.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import mean
from typing import Any

from engm.config import OF_OPTIMIZERS, READ_BY, TYPES
from engm.errors import InputError, meant
from engm.report.records import (
    ALWAYS,
    PROTOCOL,
    Quantity,
    Record,
    groups_of,
    in_words,
    key_of,
    listed,
    refuse_copies,
)
from engm.report.statistics import Paired, paired_differences
from engm.report.tables import text
from engm.runs import read_metrics
from engm.values import read

# what has no value of its own, or another default, under another value of the setting named first
_BELONGING = {
    "optimizer": OF_OPTIMIZERS,
    "method": ("beta",),
    "awp": ("awp_warmup",),
    "model": ("width", "model_norm"),
    "num_steps": ("step_size",),
}


class Difference(Quantity):
    """A quantity that is shown with its sign, in percentage points."""

    _format = "+.1f"


@dataclass(frozen=True)
class Comparison:
    """One optimizer, or value of a setting, against a baseline over the seeds that both have.

    `settings` are those of the first one's runs, where runs differ; `baseline` is the other, with
    its values of what was chosen; `quantity` what was compared, such as "robust (best)".
    """

    settings: dict[str, Any]
    baseline: str
    quantity: str
    paired: Paired


def setting_of(baseline: str) -> tuple[str, str]:
    """Reads the setting that runs are compared by and the baseline's value, as text.

    That is `precision=float32`, or `msgd` for `optimizer=msgd`.
    """
    name, equals, value = baseline.partition("=")
    if not equals:
        return "optimizer", baseline
    name = name.strip().replace("-", "_")
    # of other test images or another attack a difference means nothing, and seeds are the pairs
    known = [known for known in TYPES if known not in {"dataset", "seed", *PROTOCOL}]
    if name not in known:
        raise InputError(f"cannot compare by {name!r}; compare by {', '.join(known)}")
    return name, value.strip()


def choose(
    records: Sequence[Record], names: Collection[str], *, compared: str = "optimizer"
) -> tuple[list[Record], list[str]]:
    """Keeps of each optimizer the runs at the settings that the validation images prefer.

    Among runs that differ in `names` and their seed alone, one setting stays: the one with the
    highest robust accuracy on the validation images, best epoch, mean over the seeds. The test
    images have no part in it.

    Args:
        records: Finished runs with their metrics.
        names: Settings to choose, such as `["lr"]`; each value of all others has its own.
        compared: The setting that the runs are to be compared by.

    Returns:
        The runs that stay, and remarks: what lacks a seed that others have (it cannot be chosen),
        where the search was unequal, and what lies at an end of its grid.

    Raises:
        InputError: If a name cannot be chosen, nothing has all seeds, or a run has no metrics.
    """
    refuse_copies(records)
    fixed = {*ALWAYS, *PROTOCOL, "seed", compared}
    known = [name for name in TYPES if name not in fixed]
    if wrong := [name for name in names if name not in known]:
        why = f" ({compared} is what is compared)" if compared in wrong else ""
        hint = meant(wrong[0], known)
        raise InputError(
            f"cannot choose {', '.join(wrong)}{why}; choose of {', '.join(known)}{hint}"
        )
    kept, remarks = [], []
    budgets: dict[str, int] = {}
    searches = groups_of(records, without=names)
    telling = [name for name in TYPES if len({repr(s.get(name)) for s, _ in searches}) > 1]
    for shared, members in searches:
        seeds = {member.config.seed for member in members}
        scores: dict[tuple[float, int], list[Record]] = {}
        incomplete: dict[str, list[str]] = defaultdict(list)
        for settings, candidates in groups_of(members):
            if missing := seeds - {candidate.config.seed for candidate in candidates}:
                incomplete[listed(sorted(missing))].append(in_words(settings, names))
            else:
                scores[mean(map(_validation, candidates)), -len(scores)] = candidates
        idle = {*OF_OPTIMIZERS} - {*READ_BY[shared["optimizer"]]}
        whose = in_words(shared, ["optimizer", *(name for name in telling if name not in idle)])
        for lacking, settings_of in incomplete.items():
            among = "; ".join(settings_of)
            remarks.append(f"not chosen from, of {whose}: {among} (no seed {lacking})")
        if not scores:
            raise InputError(
                f"no setting of {listed(names)} has all of the seeds {listed(sorted(seeds))}; "
                "finish the runs"
            )
        kept += scores[max(scores)]
        config = members[0].config.to_dict()
        whose = in_words({name: config[name] for name in ("optimizer", compared)})
        budgets[f"{whose} from {len(scores)}"] = len(scores)
    if len(set(budgets.values())) > 1:
        remarks.append(f"unequal search: settings were chosen for {listed(sorted(budgets))}")
    for settings, members in groups_of(kept):
        if end := grid_end(records, members, names):
            remarks.append(f"{in_words(settings)}: {end}; what lies beyond was not tried")
    return kept, remarks


def how_chosen(records: Sequence[Record], names: Collection[str]) -> str:
    """Says which of `names` the validation images chose of `records`: where there was a choice."""
    searches = [members for _, members in groups_of(records, without=names)]

    def values(name: str) -> int:
        return max(len({repr(getattr(m.config, name)) for m in members}) for members in searches)

    several = [name for name in names if values(name) > 1]
    single = [name for name in names if name not in several]
    said = []
    if several:
        said.append(f"{listed(several)} chosen on the validation images")
    if single:
        said.append(f"{listed(single)} not chosen (one value in each row)")
    return "; ".join(said)


def grid_end(records: Sequence[Record], chosen: Sequence[Record], names: Collection[str]) -> str:
    """Says which of the settings in `names` lies at an end of the values that were tried.

    Of `records`, the runs `chosen` are those of a row. Empty where none lies at an end.
    """
    key, found = key_of(chosen[0], names), []
    searched = [record.config for record in records if key_of(record, names) == key]
    for name in names:
        tried = {getattr(config, name) for config in searched}
        ordered = len(tried) > 1 and all(type(value) in (int, float) for value in tried)
        if ordered and getattr(chosen[0].config, name) in (min(tried), max(tried)):
            found.append(name)
    return f"{listed(found)} at an end of its grid" if found else ""


def compare(
    records: Sequence[Record], baseline: str, *, chosen: Collection[str] = ()
) -> tuple[list[Comparison], list[str]]:
    """Compares the values of a setting with one of them, seed by seed, where all else is the same.

    `baseline` is as for `setting_of`; each value has its own of the settings in `chosen`.

    Returns:
        Robust accuracy (best, then last) of each optimizer and setting minus the baseline's; and
        what has no run of the baseline to be compared with, in words.

    Raises:
        InputError: If runs cannot be compared by that setting, there is no run of the baseline or
            no other, or two that differ where they should not.
    """
    refuse_copies(records)
    setting, wanted = setting_of(baseline)
    there = {repr(v): v for v in (getattr(r.config, setting) for r in records)}
    value: Any = wanted
    with suppress(ValueError):
        value = read(wanted.lower(), TYPES[setting])
    if value not in there.values():
        other = f" (another setting: {baseline}=VALUE)" if baseline in TYPES else ""
        raise InputError(
            f"no run has {setting} {wanted!r} to compare with; there is "
            f"{', '.join(sorted(map(str, there.values())))}{other}"
        )
    baseline = in_words({setting: value})
    if len(there) == 1:
        raise InputError(
            f"all finished runs have {setting} {wanted}; there is none to compare with them"
        )
    belonging = _BELONGING.get(setting, ())
    apart = {setting, *belonging, *chosen}
    own = [name for name in chosen if name not in belonging]
    matters = (*own, *(READ_BY[value] if setting == "optimizer" else belonging))
    shown = [name for name in own if len({repr(getattr(r.config, name)) for r in records}) > 1]
    bases: dict[str, list[Record]] = defaultdict(list)
    for record in (r for r in records if getattr(r.config, setting) == value):
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
        if getattr(members[0].config, setting) == value:
            continue
        base = bases.get(key_of(members[0], apart), [])
        if not {r.config.seed for r in base} & {r.config.seed for r in members}:
            alone.append(
                f"{in_words(settings)}: no run of {baseline} to pair with, of which a seed and all "
                "other settings are the same"
            )
            continue
        words = ", ".join([baseline, *(f"{n} {text(getattr(base[0].config, n))}" for n in shown)])
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
