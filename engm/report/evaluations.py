"""What `engm evaluate` left beside runs: accuracies under stronger attacks, as columns of a table.

A column is of one checkpoint, one attack, one number of images and one budget, and its name says
so. What was measured in another way gets a column of its own, so no mean is of two things.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engm.errors import InputError
from engm.report.records import CHECKPOINTS, Quantity, Record, groups_of, in_words, listed
from engm.runs import read_json

NONE = "-"  # in the cell of a row that was not measured so
_AUTOATTACK = "AutoAttack"


def file_name(which: str) -> str:
    """Returns how the evaluation of the checkpoint "best" or "last" is called in a run."""
    return f"evaluation-{which}.json"


@dataclass(frozen=True, order=True)
class Column:
    """What an accuracy was measured of; columns are sorted by their fields.

    Attributes:
        which: "best" or "last".
        place: Among the columns of its checkpoint.
        attack: Its name, such as "PGD-20 margin".
        images: Number of test images.
        other: What was not as the run's own config says, such as ", linf eps 0.1".
    """

    which: str
    place: int
    attack: str
    images: int
    other: str

    def __str__(self) -> str:
        """The head of the column."""
        return f"{self.attack} ({self.which}, {self.images} images{self.other})"


class Entry(NamedTuple):
    """An accuracy, and the settings of all attacks that it comes from, in words."""

    accuracy: float
    how: str


def measured(record: Record) -> tuple[dict[Column, Entry], Counter[str]]:
    """Reads what `engm evaluate` wrote in a run directory.

    Returns:
        PGD on the margin, AutoAttack where it ran, and the worst case over all attacks, of each
        checkpoint that was evaluated; and the checks that raised a flag, with their number.

    Raises:
        InputError: If a file is not what `engm evaluate` writes.
    """
    found: dict[Column, Entry] = {}
    flags = Counter[str]()
    for which in CHECKPOINTS:
        path = record.folder / file_name(which)
        if not path.exists():
            continue
        facts = read_json(path)
        try:
            found |= _columns(record, which, facts)
            names = [str(check["name"]) for check in facts["checks"] if not check["passed"]]
            if facts["autoattack"] and facts["autoattack"]["warnings"]:
                names.append("warnings of AutoAttack")  # itself a check, in newer files
            flags.update(list(dict.fromkeys(names)))
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            raise InputError(
                f"{path} is not what `engm evaluate` writes; delete it, and evaluate the run again"
            ) from None
    return found, flags


def columns(
    records: Sequence[Record], *, mixed: bool = False
) -> tuple[list[dict[str, Quantity | str]], list[str]]:
    """Returns the further cells of each row of `summarise`, in their order, and remarks on them.

    Args:
        records: Finished runs; those without evaluations have no part in the means.
        mixed: Allow other settings of the attacks in other rows; within a row they never mix.

    Raises:
        InputError: If accuracies of one column are of attacks with different settings.
    """
    groups = groups_of(records)
    found = {id(record): measured(record) for record in records}
    heads = sorted({column for cells, _ in found.values() for column in cells})
    for part in [members for _, members in groups] if mixed else [records]:
        for head in heads:
            _refuse_mixture(head, part, [found[id(record)][0].get(head) for record in part])
    rows: list[dict[str, Quantity | str]] = []
    remarks = [_READING] if heads else []
    for settings, members in groups:
        row: dict[str, Quantity | str] = {}
        lacking: dict[int, list[str]] = {}
        for head in heads:
            cells = [found[id(member)][0].get(head) for member in members]
            values = [cell.accuracy for cell in cells if cell is not None]
            row[str(head)] = Quantity.of(values) if values else NONE
            if 0 < len(values) < len(members):
                lacking.setdefault(len(values), []).append(str(head))
        rows.append(row)
        remarks += [
            f"{in_words(settings)}: {n} of {len(members)} seeds evaluated for {listed(names)}"
            for n, names in lacking.items()
        ]
    flags = sum((flags for _, flags in found.values()), Counter[str]())
    if flags:
        named = listed(f"{name} ({n})" for name, n in flags.items())
        remarks.append(f"evaluations in which a check raised a flag: {named}")
    return rows, remarks


_READING = (
    "worst case: each image under the attack that is worst for it, of those that `engm evaluate` "
    "ran; means over the seeds that were evaluated"
)


def _columns(record: Record, which: str, facts: dict[str, Any]) -> dict[Column, Entry]:
    images, eps, norm, config = facts["num_examples"], facts["eps"], facts["norm"], record.config
    attacks = {name: f"{name}: {found['settings']}" for name, found in facts["attacks"].items()}
    (margin,) = [name for name in attacks if re.fullmatch(r"PGD-\d+ margin", name)]
    where = f"{norm} eps {float(eps)!r}"
    other = "" if (eps, norm) == (config.eps, config.norm) else f", {norm} eps {eps:.4g}"
    # the name of the margin has its steps, that of the worst case has not
    steps = "" if margin == f"PGD-{config.eval_steps} margin" else f", {margin.split()[0]}"

    def accuracy(counts: dict[str, Any]) -> float:
        if not 0 <= counts["count"] <= images or counts["accuracy"] != counts["count"] / images:
            raise ValueError("count and accuracy do not agree")
        return float(counts["accuracy"])

    found = {}
    for place, name in enumerate((margin, _AUTOATTACK)):
        if name in attacks:
            column = Column(which, place, name, images, other)
            found[column] = Entry(accuracy(facts["attacks"][name]), f"{where}; {attacks[name]}")
    name = f"worst case with {_AUTOATTACK}" if _AUTOATTACK in attacks else "worst case"
    how = "; ".join([where, *sorted(attacks.values())])
    found[Column(which, 2, name, images, other + steps)] = Entry(accuracy(facts["worst"]), how)
    return found


def _refuse_mixture(head: Column, records: Sequence[Record], cells: Sequence[Entry | None]) -> None:
    ways: dict[str, Record] = {}
    for record, cell in zip(records, cells, strict=True):
        if cell is not None:
            ways.setdefault(cell.how, record)
    if len(ways) > 1:
        (first, one), (second, other), *_ = ways.items()
        raise InputError(
            f"{one.folder} and {other.folder} were not attacked alike for {head}: {first} against "
            f"{second}. `engm evaluate` one of them again as the other was, or report them apart"
        )
