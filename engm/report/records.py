"""Run directories in; tables of means and spreads out.

What `engm evaluate` left beside runs becomes further columns. A column is of one checkpoint, one
attack, one number of images and one budget, and its name says so. What was measured in another way
gets a column of its own, so no mean is of two things.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, ClassVar, NamedTuple

from engm.attacks import FGSM, PGD
from engm.config import OF_OPTIMIZERS, READ_BY, RunConfig
from engm.data import SPECS
from engm.errors import InputError
from engm.report import tables
from engm.report.statistics import Interval, wilson
from engm.report.tables import text as short
from engm.runs import CONFIG, RESULT, read_config, read_json, read_metrics, read_result

# columns that say what a run is, shown even where all runs agree
ALWAYS = ("dataset", "method", "optimizer")
# settings of the evaluation: runs that differ in one of them were not measured alike
PROTOCOL = ("classes", "test_images", "eps", "norm", "eval_steps")
CHECKPOINTS = ("best", "last")
EVALUATIONS = {which: f"evaluation-{which}.json" for which in CHECKPOINTS}
_NEAR_CHANCE = 1.5  # times the accuracy of guessing
CHANCE = "near chance"
NEAR = f"a robust accuracy of at most {_NEAR_CHANCE} times that of guessing"
_AUTOATTACK = "AutoAttack"


@dataclass(frozen=True)
class Record:
    """A finished run as it is on disk: where, which config, what came out."""

    folder: Path
    config: RunConfig
    result: dict[str, Any]


@dataclass(frozen=True)
class Quantity:
    """The mean of `n` seeds, and their sample standard deviation; `None` for a single one."""

    mean: float
    deviation: float | None
    n: int
    _format: ClassVar[str] = ".1f"

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantity":
        """Returns that of `values`, at least one."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def percent(self) -> str:
        """Returns the mean, and the deviation where there is one, in percent."""
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:{self._format}}{spread}"

    __str__ = percent

    def numbers(self) -> dict[str, float | None]:
        """Returns all three, accuracies as fractions, for files that machines read."""
        return {"mean": self.mean, "sd": self.deviation, "n": self.n}


def collect(root: Path) -> tuple[list[Record], list[Path]]:
    """Finds the runs at or below `root`.

    Returns:
        The finished ones, and the folders of those that are not.

    Raises:
        InputError: If there is no run at all, or a run cannot be read.
    """
    folders = sorted(path.parent for path in Path(root).rglob(CONFIG))
    if not folders:
        place = Path(root).resolve()
        if place.is_file():
            raise InputError(f"{place} is a file; give its folder, {place.parent}")
        what = "run in" if place.is_dir() else "folder"
        raise InputError(
            f"there is no {what} {place}; give a folder that `engm train` or `engm sweep train` "
            "wrote to (where one was stopped at its start, run it again)"
        )
    done = [folder for folder in folders if (folder / RESULT).exists()]
    return list(map(read_record, done)), [folder for folder in folders if folder not in done]


def read_record(folder: Path) -> Record:
    """Reads the finished run in `folder`."""
    return Record(folder, read_config(folder), read_result(folder))


def check_protocol(records: Iterable[Record]) -> None:
    """Refuses runs that were not evaluated alike: their accuracies would be of different things.

    Alike means the same data and number of test images, the same eps, norm and steps of the attack,
    and the same attack in words.

    Raises:
        InputError: If they differ; the message says in what, and how many runs have which value.
    """
    records = list(records)
    protocols = [_protocol(record) for record in records]
    if differences := _differences(protocols):
        counts = Counter(map(str, protocols))
        rare = min(range(len(records)), key=lambda i: counts[str(protocols[i])])
        raise InputError(
            f"these runs were not evaluated alike: {'; '.join(differences)}. The first that "
            f"differs from most is {records[rare].folder}. Report them apart; engm report --mixed "
            "has these settings as columns"
        )


def provenance(records: Iterable[Record]) -> list[str]:
    """Returns a sentence for each of commit, versions and hardware in which the runs differ."""
    return [f"the runs differ in {each}" for each in _differences(list(map(_origin, records)))]


def costs(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Says of each row of `summarise`, in their order, what its runs took and on what they ran.

    Seconds are the median over all epochs and seeds, training with validation.
    """
    rows = []
    for settings, members in groups_of(records):
        lines = [line for member in members for line in read_metrics(member.folder)]
        times = [line["seconds"] for line in lines if type(line.get("seconds")) in (int, float)]
        seconds = float(median(times)) if times else 0.0
        took = {
            "seconds an epoch": seconds or "",
            "epochs an hour": 3600 / seconds if seconds else "",
        }
        origins = [_origin(member) for member in members]
        where = {
            name: listed(dict.fromkeys(origin[name] for origin in origins))
            for name in ("device", "torch", "commit")
        }
        rows.append(settings | took | where | {"seeds": len(members)})
    return rows


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Puts finished runs that differ in nothing but their seed into one row.

    Returns:
        A row for each config, sorted: the settings in which the runs differ, and the `Quantity` of
        each accuracy; of a setting that the optimizer of a row does not read, `None`. All other
        settings are the same in every row.

    Raises:
        InputError: If two records are the same run, which would count twice.
    """
    refuse_copies(records)
    rows = []
    for settings, members in groups_of(records):
        found = [accuracies(member) for member in members]
        means = {name: Quantity.of([each[name] for each in found]) for name in found[0]}
        rows.append(settings | means)
    return rows


def accuracies(record: Record) -> dict[str, float]:
    """Returns the accuracies of a run and their gap, fractions under the heads of their columns."""
    found = {
        f"{kind} ({which})": record.result[which][f"{kind}_accuracy"]
        for which in CHECKPOINTS
        for kind in ("clean", "robust")
    }
    return found | {"gap": record.result["robust_overfitting_gap"]}


def near_chance(members: Sequence[Record]) -> str:
    """Says how many of the runs of a row do as well as guessing; empty for most.

    That is a robust accuracy of at most 1.5 / K, with K classes; source: this kit. A network that
    gives one answer to all images has 1 / K, whatever the attack. Of natural training nothing else
    is expected.
    """
    config, found = members[0].config, []
    limit = _NEAR_CHANCE / (config.classes or SPECS[config.dataset].num_classes)
    for which in CHECKPOINTS if config.method != "natural" else ():
        if n := sum(member.result[which]["robust_accuracy"] <= limit for member in members):
            found.append(f"{which} in {n}")
    return f"{CHANCE}: {listed(found)} of {len(members)} seeds" if found else ""


def with_seeds(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the number of seeds as the last column of the rows of `summarise`."""
    return [{**row, "seeds": row["gap"].n} for row in rows]


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the rows of `summarise` as a markdown table, accuracies in percent."""
    return tables.to_markdown(with_seeds(rows)) or "no finished run\n"


def _origin(record: Record) -> dict[str, str]:
    environment = record.result.get("environment", {})
    packages, commit = environment.get("packages", {}), environment.get("commit") or "unknown"
    return {
        "commit": commit[:12] + "-dirty" * commit.endswith("-dirty"),
        "engm": packages.get("engm", "unknown"),
        "torch": packages.get("torch", "unknown"),
        "device": environment.get("device", "unknown"),
    }


def _protocol(record: Record) -> dict[str, Any]:
    tested, settings = record.result["last"], record.config.to_dict()
    facts = {"data": record.result["data"], "test images": tested.get("num_examples")}
    attack = _attack_in_words(tested.get("attack"))
    all_or = {name: "all" if settings[name] is None else settings[name] for name in PROTOCOL}
    return facts | all_or | {"attack": attack}


def _attack_in_words(attack: Any) -> Any:
    if isinstance(attack, str):
        # logs of old hold repr(attack)
        found = re.findall(r"(\w+)='?([^,')]*)", attack)
        attack = {"kind": attack.partition("(")[0], **dict(found)} if found else attack
    if not isinstance(attack, dict):
        return attack
    # what attacks have got since a log was written was at its default
    of_kind = {"PGD": fields(PGD), "FGSM": fields(FGSM)}.get(attack.get("kind", ""), ())
    settings = {field.name: field.default for field in of_kind} | attack
    kind = settings.pop("kind", "")
    return f"{kind}({', '.join(f'{name}={value}' for name, value in settings.items())})"


def _differences(facts: Sequence[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for name in facts[0] if facts else ():
        counts = Counter(str(fact[name]) for fact in facts)
        # the attack in words repeats eps, norm and steps
        if len(counts) > 1 and not (name == "attack" and found):
            values = listed(f"{value} ({n} run{'s' * (n > 1)})" for value, n in counts.items())
            found.append(f"{name} {values}")
    return found


def refuse_copies(records: Iterable[Record]) -> None:
    """Refuses the same run from two folders, and runs on data that share nothing but their title.

    The first would count twice, the others would be averaged. Logs of old do not have the digest
    of their data; their title is believed.
    """
    seen: dict[Any, Path] = {}
    data: dict[str, tuple[str, Path]] = {}
    for record in records:
        title = record.result["data"]
        other = seen.setdefault((record.config, title), record.folder)
        if other is not record.folder and other.resolve() == record.folder.resolve():
            raise InputError(f"{other} is given twice; give each folder once")
        if other is not record.folder:
            raise InputError(
                f"{other} and {record.folder} hold the same run; leave one of them out, by "
                "naming each folder to report, or by moving it elsewhere"
            )
        if digest := record.result.get("environment", {}).get("data_sha256"):
            known, other = data.setdefault(title, (digest, record.folder))
            if known != digest:
                raise InputError(
                    f"{other} and {record.folder} are runs on two caches of {title} that differ "
                    f"(data_sha256 {known[:8]}, {digest[:8]}); report them apart"
                )


def _settings(record: Record, without: Collection[str] = ()) -> dict[str, Any]:
    protocol = _protocol(record)
    settings = {**record.config.to_dict(), "dataset": protocol.pop("data")} | protocol
    settings["subset"] = "all" if settings["subset"] is None else settings["subset"]
    return {name: v for name, v in settings.items() if name not in ("seed", *without)}


def intervals(record: Record) -> str:
    """Says what the test images of a run say of its robust accuracies about all images."""
    parts = [
        f"robust ({which}) {100 * ends.low:.1f} to {100 * ends.high:.1f}"
        for which, ends in _intervals(record).items()
    ]
    n = record.result["last"].get("num_examples")
    return f"95% intervals, from {n} test images: {', '.join(parts)}\n" if parts else ""


def one_seed(records: Iterable[Record]) -> str:
    """Says how wide these intervals are of runs that alone make a row; empty where there is none.

    A row of several seeds has their deviation.
    """
    found = [ends for record in records for ends in _intervals(record).values()]
    if not found:
        return ""
    widest = 100 * max(ends.high - ends.low for ends in found)
    return (
        "rows of one seed have no deviation; the number of test images alone leaves their robust "
        f"accuracies 95% intervals of up to {widest:.1f} points"
    )


def _intervals(record: Record) -> dict[str, Interval]:
    n = record.result["last"].get("num_examples")
    if n is None:  # in logs of old
        return {}
    counts = {which: round(record.result[which]["robust_accuracy"] * n) for which in CHECKPOINTS}
    return {which: wilson(count, n) for which, count in counts.items()}


def key_of(record: Record, without: Collection[str]) -> str:
    """Returns what the runs of a row share: all settings but the seed and those in `without`."""
    return repr(_settings(record, without))


def groups_of(
    records: Sequence[Record], without: Collection[str] = ()
) -> list[tuple[dict[str, Any], list[Record]]]:
    """Puts together runs that agree in all but their seed and `without`.

    Each group has the settings in which the groups differ, by which they are sorted, and its runs.
    A setting that its optimizer does not read is `None`, unless groups would then look alike.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[key_of(record, without)].append(record)
    settings = [_settings(members[0], without) for members in groups.values()]
    names = [
        name
        for name in (settings[0] if settings else {})
        if name in ALWAYS or len({repr(s[name]) for s in settings}) > 1
    ]
    if "attack" in names and set(names) & set(PROTOCOL):
        names.remove("attack")
    shown = []
    for setting, members in zip(settings, groups.values(), strict=True):
        idle = {*OF_OPTIMIZERS}.difference(READ_BY[members[0].config.optimizer])
        shown.append({name: None if name in idle else setting[name] for name in names})
    if len({repr(row) for row in shown}) < len(shown):  # rows that nothing else tells apart
        shown = [{name: setting[name] for name in names} for setting in settings]
    found = list(zip(shown, groups.values(), strict=True))
    # by kind first: a scale is a number or a word
    return sorted(found, key=lambda pair: [(str(type(v)), v) for v in pair[0].values()])


def in_words(settings: dict[str, Any], names: Collection[str] | None = None) -> str:
    """Returns settings as a phrase, such as "engm, lr 0.1"; of `names` only, where given."""
    wanted = settings if names is None else names
    shown = {n: settings[n] for n in wanted if settings.get(n) is not None}
    return ", ".join(short(v) if n in ALWAYS else f"{n} {short(v)}" for n, v in shown.items())


def listed(values: Iterable[Any]) -> str:
    """Returns values as text, with commas."""
    return ", ".join(map(short, values))


# --- what `engm evaluate` found


class Column(NamedTuple):
    """What an accuracy was measured of; columns are sorted by their fields.

    `place` is that among the columns of its checkpoint; `other` what is not as the config says.
    """

    which: str
    place: int
    attack: str
    images: int
    other: str

    def head(self) -> str:
        """Returns what stands above the column."""
        return f"{self.attack} ({self.which}, {self.images} images{self.other})"


def measured(record: Record) -> tuple[dict[Column, tuple[float, str]], Counter[str], list[str]]:
    """Reads what `engm evaluate` wrote in a run directory; an InputError names a wrong file.

    Returns accuracy and attack in words, for PGD on the margin, AutoAttack where it ran, and the
    worst case over all attacks of each checkpoint; the number of flags of each check; and in words
    what was left out, as it was made before the run had ended.
    """
    found: dict[Column, tuple[float, str]] = {}
    flags = Counter[str]()
    early: list[str] = []
    for which, name in EVALUATIONS.items():
        path = record.folder / name
        if not path.exists():
            continue
        early += [
            f"left out: {other}, beside {name}, which has something that it has not"
            for other in sorted(record.folder.glob(f"evaluation-{which}-*.json"))
        ]
        facts = read_json(path)
        try:
            epoch = _epochs(record).get(which, facts["epoch"])
            if facts["epoch"] != epoch:
                early.append(
                    f"left out: {path} is of epoch {facts['epoch']}, and the {which} checkpoint of "
                    f"epoch {epoch}; engm evaluate {record.folder} makes it anew"
                )
                continue
            found |= _columns(record.config, which, facts)
            names = [str(check["name"]) for check in facts["checks"] if not check["passed"]]
            flags.update(dict.fromkeys(names, 1))
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            raise InputError(
                f"{path} is not what `engm evaluate` writes; delete it, and evaluate the run again"
            ) from None
    return found, flags, early


def _epochs(record: Record) -> dict[str, int]:
    """Returns the epochs of the checkpoints of a finished run; nothing if its metrics are gone."""
    lines = read_metrics(record.folder)
    if not lines:
        return {}
    best = max(lines, key=lambda line: line["validation_robust_accuracy"])  # the first of them
    return {"best": best["epoch"], "last": lines[-1]["epoch"]}


def evaluated(
    records: Sequence[Record], *, mixed: bool = False
) -> tuple[list[dict[str, Quantity | str]], list[str]]:
    """Returns the further cells of each row of `summarise`, in their order, and remarks on them.

    Runs without evaluations have no part in the means. `mixed` allows other settings of the attacks
    in other rows; within a row they never mix.
    """
    groups, found = groups_of(records), {id(record): measured(record) for record in records}
    columns = sorted({column for cells, *_ in found.values() for column in cells})
    for part in [members for _, members in groups] if mixed else [records]:
        for column in columns:
            _refuse_mixture(column, {r.folder: found[id(r)][0].get(column) for r in part})
    rows: list[dict[str, Quantity | str]] = []
    remarks = [_READING] if columns else []
    for settings, members in groups:
        row: dict[str, Quantity | str] = {}
        lacking = defaultdict(list)
        for column in columns:
            cells = [found[id(member)][0].get(column) for member in members]
            values = [cell[0] for cell in cells if cell is not None]
            row[column.head()] = Quantity.of(values) if values else "-"
            if 0 < len(values) < len(members):
                lacking[len(values)].append(column.head())
        rows.append(row)
        remarks += [
            f"{in_words(settings)}: {n} of {len(members)} seeds evaluated for {listed(names)}"
            for n, names in lacking.items()
        ]
    remarks += [remark for _, _, early in found.values() for remark in early]
    if flags := sum((flags for _, flags, _ in found.values()), Counter[str]()):
        named = listed(f"{name} ({n})" for name, n in flags.items())
        remarks.append(f"evaluations in which a check raised a flag: {named}")
    return rows, remarks


_READING = (
    "worst case: each image under the attack that is worst for it, of those that `engm evaluate` "
    "ran; means over the seeds that were evaluated"
)


def _columns(
    config: RunConfig, which: str, facts: dict[str, Any]
) -> dict[Column, tuple[float, str]]:
    images, eps, norm = facts["num_examples"], facts["eps"], facts["norm"]
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

    found = {
        Column(which, place, name, images, other): (
            accuracy(facts["attacks"][name]),
            f"{where}; {attacks[name]}",
        )
        for place, name in enumerate((margin, _AUTOATTACK))
        if name in attacks
    }
    name = f"worst case with {_AUTOATTACK}" if _AUTOATTACK in attacks else "worst case"
    how = "; ".join([where, *sorted(attacks.values())])
    found[Column(which, 2, name, images, other + steps)] = accuracy(facts["worst"]), how
    return found


def _refuse_mixture(column: Column, cells: dict[Path, tuple[float, str] | None]) -> None:
    ways: dict[str, Path] = {}
    for folder, cell in cells.items():
        if cell is not None:
            ways.setdefault(cell[1], folder)
    if len(ways) > 1:
        (first, one), (second, other), *_ = ways.items()
        raise InputError(
            f"{one} and {other} were not attacked alike for {column.head()}: {first} against "
            f"{second}. `engm evaluate` one of them again as the other was, or report them apart"
        )
