"""The logs of real runs that come with the kit, for notebooks to show beside their rehearsals."""

from collections.abc import Collection
from pathlib import Path

from engm.report.records import Record, collect

RESULTS = Path(__file__).parents[2] / "results"


def committed(*names: str) -> list[Record]:
    """Reads the finished runs of `results/NAME`, with ENGM's default scale and floor.

    Args:
        names: Folders of `results`. One that is not there (a kit without its repository) has none.
    """
    folders = [RESULTS / name for name in names if (RESULTS / name).is_dir()]
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
