"""What `engm report` says of a set of runs: tables, remarks, figures, and the files of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engm.config import OF_OPTIMIZERS, READ_BY, TYPES
from engm.errors import InputError
from engm.report import comparisons, tables
from engm.report import records as results
from engm.report.records import EVALUATIONS, Record, refuse_copies
from engm.report.statistics import Paired
from engm.runs import CONFIG, METRICS, RESULT, make_folder, read_metrics, write_bytes, write_text

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_MOST_CURVES = 6  # as many as there are colours
_TITLES = {
    "summary": "Accuracies on the test images",
    "differences": "Differences, seed by seed",
    "costs": "What the runs took",
}


@dataclass(frozen=True)
class RunReport:
    """Runs put side by side.

    Attributes:
        records: The runs.
        summary: A row for each config, with the `Quantity` of each accuracy.
        compared: Each optimizer with the baseline; empty without one.
        remarks: What a reader of the tables has to know.
        costs: For each config time and hardware; empty where they were not asked for.
        notes: For each row of the summary what to beware of, empty for most.
    """

    records: Sequence[Record]
    summary: list[dict[str, Any]]
    compared: list[comparisons.Comparison]
    remarks: list[str]
    costs: Sequence[dict[str, Any]]
    notes: Sequence[str]

    def parts(self, kind: str) -> dict[str, Sequence[dict[str, Any]]]:
        """Returns the rows of "summary", and of "differences" and "costs" where there are any.

        Notes on rows are a column, but in markdown, where remarks say the same. On paper and pages
        what goes along with the data or the method is no column, but a remark.
        """
        summary = self.summary
        if any(self.notes) and kind != "markdown":
            summary = [row | {"note": n} for row, n in zip(summary, self.notes, strict=True)]
        further = {"differences": comparisons.difference_rows(self.compared), "costs": self.costs}
        parts = {"summary": summary} | {name: rows for name, rows in further.items() if rows}
        along = _along(self.summary)[1] if kind in ("latex", "html") else []
        return {
            name: [{n: cell for n, cell in row.items() if n not in along} for row in rows]
            for name, rows in parts.items()
        }

    def all_remarks(self, kind: str) -> list[str]:
        """Returns the remarks, and what `parts` leaves out of tables."""
        tell, along = _along(self.summary) if kind in ("latex", "html") else ([], [])
        said = {results.in_words(r, tell): results.in_words(r, along) for r in self.summary}
        return self.remarks + [f"{which}: {what}" for which, what in said.items() if what]

    def text(self, kind: str) -> str:
        """Returns the tables as "markdown", "csv", "latex" or "html" (a page with figures)."""
        if kind == "html":
            return self._page()
        if kind == "markdown" and not self.summary:
            return "no finished run\n"
        return "\n".join(map(tables.FORMATS[kind][1], self.parts(kind).values()))

    def write(self, out: Path, kind: str | None = None) -> list[Path]:
        """Writes the report to a file, in the format of its extension, or into a folder.

        A CSV file holds one table: the others go beside it, as `NAME-differences.csv`. In a
        folder the files are called `report.md`, `report.csv` and so on, every format unless one is
        asked for, and `runs.csv` has one line a run.
        """
        if out.suffix and not out.is_dir():
            return self._write_file(out, format_of(out, kind))
        make_folder(out, "give another file or folder for the tables")
        files = []
        for name in tables.FORMATS if kind is None else [kind]:
            files += self._write_file(out / f"report{tables.FORMATS[name][0]}", name)
        if kind in (None, "csv"):
            files.append(out / "runs.csv")
            write_text(files[-1], frame(self.records).to_csv(index=False, lineterminator="\n"))
        return files

    def write_figures(self, folder: Path) -> list[Path]:
        """Writes the figures as PNG files, for example `best_and_last.png`, into `folder`."""
        from engm import plots

        make_folder(folder, "give another folder for the figures")
        files = []
        for name, (_, figure) in self.figures().items():
            files.append(folder / f"{name}.png")
            write_bytes(files[-1], plots.to_png(figure))
        return files

    def figures(self) -> "dict[str, tuple[str, Figure]]":
        """Draws what there is to draw: under a short name the caption and the figure.

        Best and last accuracies always; differences where there is a baseline; learning curves
        where the rows are few enough to tell them apart.
        """
        from engm import plots

        if not self.summary:
            return {}
        names = labels(self.summary)
        named = dict(zip(names, self.summary, strict=True))
        caption = "Robust accuracy of the best and the last checkpoint, mean and deviation"
        drawn = {"best_and_last": (caption, plots.best_and_last_rows(named))}
        if self.compared:
            baseline = self.compared[0].baseline.split(",")[0]
            caption = f"Robust accuracy minus that of {baseline}: seeds, mean, Student's interval"
            panels: dict[str, dict[str, Paired]] = {}
            names_of = labels([found.settings for found in self.compared])
            for label, found in zip(names_of, self.compared, strict=True):
                panels.setdefault(found.quantity, {})[label] = found.paired
            drawn["differences"] = caption, plots.difference_intervals(panels, baseline)
        groups = [members for _, members in results.groups_of(self.records)]
        metrics = [[read_metrics(record.folder) for record in members] for members in groups]
        if len(names) <= _MOST_CURVES and all(line for seeds in metrics for line in seeds):
            caption = "Accuracy on the validation images over the epochs, mean and single seeds"
            curves = dict(zip(names, metrics, strict=True))
            drawn["learning_curves"] = caption, plots.learning_curves(curves)
        return drawn

    def _write_file(self, path: Path, kind: str) -> list[Path]:
        if kind == "csv":
            files = []
            for name, rows in self.parts(kind).items():
                own = "" if name == "summary" else f"-{name}"
                files.append(path.with_name(f"{path.stem}{own}{path.suffix}"))
                write_text(files[-1], tables.to_csv(rows))
            return files
        text, sign = self.text(kind), {"markdown": "-", "latex": "%"}.get(kind)
        remarks = self.all_remarks(kind)
        if sign and remarks:
            text += "".join(f"\n{sign} {remark}" for remark in remarks) + "\n"
        write_text(path, text)
        return [path]

    def _page(self) -> str:
        from engm import plots

        parts = [
            (_TITLES[name], tables.to_html(rows) or "<p>no finished run</p>")
            for name, rows in self.parts("html").items()
        ]
        if remarks := "".join(f"<li>{escape(r)}</li>" for r in self.all_remarks("html")):
            parts.append(("Remarks", f"<ul>{remarks}</ul>"))
        pictures = {caption: plots.to_png(figure) for caption, figure in self.figures().values()}
        return tables.page("Runs", parts, pictures)


def build(
    records: Sequence[results.Record],
    *,
    compare: str | None = None,
    choose: Collection[str] = (),
    mixed: bool = False,
    costs: bool = False,
) -> RunReport:
    """Puts runs side by side.

    Args:
        records: Finished runs.
        compare: The baseline, see `comparisons.setting_of`.
        choose: Settings of which each optimizer (or value of the compared setting) keeps the value
            that the validation images prefer.
        mixed: Allow runs that were not evaluated alike.
        costs: Add what the runs took, and on what hardware.

    Raises:
        InputError: If runs were not evaluated alike, are there twice, or cannot be compared.
    """
    if not mixed:
        results.check_protocol(records)
    remarks, kept = results.provenance(records), records
    if choose:
        by = "optimizer" if compare is None else comparisons.setting_of(compare)[0]
        kept, more = comparisons.choose(records, choose, compared=by)
        remarks += [comparisons.how_chosen(records, choose), *more]
    found: list[comparisons.Comparison] = []
    if compare is not None:
        found, alone = comparisons.compare(kept, compare, chosen=choose)
        remarks += [*alone, *[_READING] * bool(found)]
        if len(found) > 1:
            remarks.append(
                f"{len(found)} comparisons: of those without any difference one in 20 "
                "looks settled by chance"
            )
    stronger, more = results.evaluated(kept, mixed=mixed)
    rows = [a | b for a, b in zip(results.summarise(kept), stronger, strict=True)]
    took = results.costs(kept) if costs else []
    remarks += [*more, *[_TIMES] * bool(took)]
    notes = []
    for settings, members in results.groups_of(kept):
        if chance := results.near_chance(members):
            remarks.append(f"{results.in_words(settings)}: {chance}")
        end = comparisons.grid_end(records, members, choose)
        notes.append("; ".join(filter(None, (end, chance))))
    remarks += [_CHANCE] * any(results.CHANCE in note for note in notes)
    single = [members[0] for _, members in results.groups_of(kept) if len(members) == 1]
    remarks += filter(None, [results.one_seed(single)])
    return RunReport(kept, results.with_seeds(rows), found, remarks, took, notes)


def frame(runs: "Path | str | Sequence[Record]") -> "pandas.DataFrame":
    """Returns finished runs as a pandas DataFrame: one row a run, accuracies as fractions.

    Columns are the folder, the title of the data, each setting of the run, clean and robust
    accuracy of the best and the last checkpoint, their gap, and what `engm evaluate` found.

        engm.report.frame("runs").groupby(["optimizer", "lr"])["robust (best)"].agg(["mean", "std"])

    `runs` is the folder of the runs or one above it, or finished runs; an InputError says that
    there is none, or that one cannot be read.
    """
    import pandas

    records = results.collect(Path(runs))[0] if isinstance(runs, Path | str) else runs
    rows = []
    for record in records:
        found, *_ = results.measured(record)
        further = {column.head(): found[column][0] for column in sorted(found)}
        names = {"folder": str(record.folder), "data": record.result["data"]}
        rows.append(names | record.config.to_dict() | results.accuracies(record) | further)
    return pandas.DataFrame(rows)


_READING = (
    "differences: percentage points, mean ± standard deviation over the pairs. The outcome is "
    "that of Student's 95% interval; the bootstrap's stays within the range of the pairs, and "
    "covers less than 95% below six of them. p: sign-flip test, and the least it could be. "
    "Not settled does not mean alike: every difference that Student's interval holds is open"
)
_CHANCE = f"{results.CHANCE}: {results.NEAR}"
_TIMES = (
    "seconds an epoch: the median over epochs and seeds, validation included; times of runs that "
    "shared a machine with others are no measure of it"
)


def format_of(path: Path, kind: str | None) -> str:
    """Returns the format that the extension of a file stands for; refuses another than `kind`."""
    known = {suffix: name for name, (suffix, _) in tables.FORMATS.items()}
    found = known.get(path.suffix.lower())
    if found is None:
        raise InputError(
            f"{path} is no folder, and its extension is none of {', '.join(known)}; choose one"
        )
    if kind not in (None, found):
        raise InputError(
            f"{path} would be {found}, but --format says {kind}; leave one of them out"
        )
    return found


def labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names rows of `summarise`, by the settings that differ and that their optimizer reads.

    One row alone has its data, method and optimizer for a name.
    """
    if len(rows) == 1:
        return [results.in_words(rows[0], ("dataset", "method", "optimizer"))]
    along = _along(rows)[1]
    differing = [n for n in _SETTINGS if _values(rows, [n]) > 1 and n not in along]
    brief, full = [], []
    for row in rows:
        idle = set(OF_OPTIMIZERS) - set(READ_BY[row["optimizer"]])
        brief.append(results.in_words(row, [n for n in differing if n not in idle]) or "all runs")
        full.append(results.in_words(row, differing))
    return brief if len(set(brief)) == len(set(full)) else full


_SETTINGS = (*TYPES, "test images", "attack")


def _along(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    # which of data, method and AWP differ; and the settings, such as eps, that each has its own of
    differing = [name for name in _SETTINGS if _values(rows, [name]) > 1]
    tell = [name for name in differing if name in ("dataset", "method", "awp")]
    others = [name for name in differing if name not in tell]
    return tell, [name for name in others if _values(rows, [*tell, name]) == _values(rows, tell)]


def _values(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> int:
    return len({tuple(repr(row.get(name)) for name in names) for row in rows})


# --- copies of logs


def copy_logs(records: Sequence[Record], folder: Path) -> list[Path]:
    """Copies what `engm report` reads of each run to `folder / NAME`, NAME as `engm train` has it.

    That is the config, metrics, result and evaluations, some 10 to 30 KB; weights and images stay
    where they are. A run that is there already gets what it lacks, and the newest evaluations.

    Raises:
        InputError: Before anything is written, if one of these folders holds another run, even one
            of the same config, or two of the runs would share one.
    """
    refuse_copies(records)
    targets = {folder / record.config.name: record for record in records}
    for record in records:
        target = folder / record.config.name
        same = targets[target] is record
        for name in (CONFIG, METRICS, RESULT):
            there, own = target / name, record.folder / name
            same &= not there.exists() or (own.exists() and there.read_bytes() == own.read_bytes())
        if not same:
            raise InputError(
                f"{target} is, or would be, the place of another run than {record.folder}; choose "
                "another folder for the logs"
            )
    make_folder(folder, "give another folder for the logs")
    for target, record in targets.items():
        # the result last: a run is complete when it is there
        for name in (CONFIG, METRICS, *EVALUATIONS.values(), RESULT):
            if (record.folder / name).exists():
                write_bytes(target / name, (record.folder / name).read_bytes())
    return list(targets)
