"""Run directories in, tables with spreads out."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from engm.config import RunConfig
from engm.errors import InputError
from engm.run_directory import CONFIG, RESULT, read_config, read_result

# columns that say what a run is, shown even where all runs agree
_ALWAYS = ("dataset", "method", "optimizer")


@dataclass(frozen=True)
class Record:
    """A finished run as it is on disk: where, which config, what came out."""

    folder: Path
    config: RunConfig
    result: dict[str, Any]


@dataclass(frozen=True)
class Quantity:
    """A number over several seeds.

    Attributes:
        mean: Their mean.
        deviation: Their sample standard deviation; `None` for a single one.
        n: How many they are.
    """

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantity":
        """Makes the quantity of `values`, at least one."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def percent(self) -> str:
        """Returns the mean, and the deviation where there is one, in percent."""
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def collect(root: Path) -> tuple[list[Record], list[Path]]:
    """Finds the runs at or below `root`.

    Returns:
        The finished ones, and the folders of those that are not.

    Raises:
        InputError: If there is no run at all, or a run cannot be read.
    """
    folders = sorted(path.parent for path in Path(root).rglob(CONFIG))
    if not folders:
        raise InputError(f"there is no run in {root}; `engm train --out {root}` makes one")
    done = [folder for folder in folders if (folder / RESULT).exists()]
    records = [Record(f, read_config(f), read_result(f)) for f in done]
    return records, [folder for folder in folders if folder not in done]


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Puts runs that differ in nothing but their seed into one row.

    Args:
        records: Finished runs.

    Returns:
        A row for each config, sorted: the settings in which the runs differ, and the `Quantity` of
        each accuracy. All other settings are the same in every row.

    Raises:
        InputError: If two records are the same run, which would count twice.
    """
    seen: dict[Any, Path] = {}
    for record in records:
        key = (record.config, record.result["data"])
        if key in seen:
            raise InputError(
                f"{seen[key]} and {record.folder} hold the same run; leave one of them out"
            )
        seen[key] = record.folder
    settings = [{**r.config.to_dict(), "dataset": r.result["data"]} for r in records]
    for setting in settings:
        del setting["seed"]
    varying = [
        name
        for name in (settings[0] if settings else {})
        if name in _ALWAYS or len({repr(s[name]) for s in settings}) > 1
    ]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, setting in enumerate(settings):
        groups[repr(setting)].append(index)
    rows = []
    for members in groups.values():
        row = {name: settings[members[0]][name] for name in varying}
        results = [records[index].result for index in members]
        for which in ("best", "last"):
            for kind in ("clean", "robust"):
                values = [result[which][f"{kind}_accuracy"] for result in results]
                row[f"{kind} ({which})"] = Quantity.of(values)
        row["gap"] = Quantity.of([result["robust_overfitting_gap"] for result in results])
        rows.append(row)
    # by kind first: a scale is a number or a word
    return sorted(rows, key=lambda row: [(str(type(row[k])), row[k]) for k in varying])


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the rows of `summarise` as a markdown table, accuracies in percent."""
    if not rows:
        return "no finished run\n"
    names = list(rows[0])
    lines = [[*names, "seeds"], ["---"] * (len(names) + 1)]
    for row in rows:
        lines.append([_cell(row[name]) for name in names] + [str(row["gap"].n)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Quantity):
        return value.percent()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
