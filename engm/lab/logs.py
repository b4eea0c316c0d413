"""What notebooks show of other runs: the logs that come with the kit, the verdicts of others."""

from collections.abc import Collection, Iterable
from pathlib import Path

from engm.lab.batch import RESULT_TYPE, kit
from engm.lab.parameters import shown
from engm.report.records import Record, collect
from engm.runs import read_json


def committed(*names: str) -> list[Record]:
    """Reads the finished runs of `results/NAME`, with ENGM's default scale and floor.

    A folder that is not there (a kit without its repository) has none.
    """
    folders = [f for f in (kit("results") / name for name in names) if f.is_dir()]
    records = [record for folder in folders for record in collect(folder)[0]]
    return [r for r in records if (r.config.scale, r.config.floor) == ("mean", 0.05)]


def method_of(record: Record) -> str:
    """Returns the method of a run as figures name it: "PGD-AT", "TRADES", "AWP"."""
    if record.config.awp:
        return "AWP"
    return record.config.method.replace("_", "-").upper()


def end_of_grid(chosen: float, tried: Collection[float]) -> str:
    """Says which end of the values that were tried the chosen one is; nothing where it is neither.

    At an end the search is unfinished: a better value may lie beyond.
    """
    ends = [("smallest", min(tried)), ("largest", max(tried))]
    return " and ".join(f"the {name} that was tried" for name, end in ends if end == chosen)


def verdict_of(name: str, places: Iterable[Path]) -> tuple[str, str]:
    """Returns what a notebook found about its claim, and the file where that was read.

    The first of `places` with the `NAME.result.json` that `engm run` leaves counts; without any,
    the notebook itself, "as saved". Where that has none, "not run yet" and the command to run it.
    """
    for place in places:
        if (path := place / f"{name}.result.json").exists():
            return read_json(path).get("verdict", "no verdict"), path.name
    saved = kit("notebooks") / f"{name}.ipynb"
    results = shown(read_json(saved), RESULT_TYPE) if saved.exists() else []
    if not results:
        return "not run yet", f"engm run {name}"
    return results[-1].get("verdict", "no verdict"), "as saved"
