"""What a sweep is: tasks from a grid, all of them checked before any of them runs.

plan("train", {"optimizer": ["msgd", "engm"], "lr": ["0.1", "0.2"]}, seeds=3)
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

from engm.config import OF_OPTIMIZERS, READ_BY, TYPES, RunConfig
from engm.errors import InputError, check_count
from engm.values import read

TRAIN = "train"


@dataclass(frozen=True)
class Task:
    """One entry of a sweep: "train" with fields of `RunConfig`, or a notebook with parameters.

    `name` is that of its folder: the same settings mean the same folder.
    """

    name: str
    target: str
    settings: dict[str, Any]


@cache
def code_version() -> str:
    """Returns the version of the package and a digest of its source."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return f"engm-{metadata.version('engm')}-{digest.hexdigest()[:8]}"


def plan(
    target: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    seeds: int | None = None,
) -> list[Task]:
    """Makes one task for each combination of the grid's values and each seed, in their order.

    Args:
        target: "train", or a notebook as `engm.lab.batch.find` knows it.
        grid: Values to try, under the names of settings; text is read as on the command line.
        settings: What is the same in all tasks.
        seeds: Runs the seeds 0 to `seeds` - 1. A notebook that takes a list `seeds` gets them all,
            since its verdict needs them; one that takes a `seed` runs once for each.

    Raises:
        InputError: If a name is unknown, a value is wrong or given twice, or there is none; or no
            optimizer of the tasks reads a setting.
    """
    tasks = _tasks(target, grid, settings or {}, seeds)
    _refuse_idle(tasks, _chosen(settings or {}))
    return tasks


def _tasks(
    target: str, grid: Mapping[str, Sequence[Any]], settings: Mapping[str, Any], seeds: int | None
) -> list[Task]:
    axes, fixed = dict(grid), dict(settings)
    if seeds is not None:
        _add_seeds(target, axes, fixed, seeds)
    for name, values in axes.items():
        if name in fixed:
            raise InputError(f"{name} is in the grid and fixed as well; leave one of them out")
        if not values:
            raise InputError(f"the grid has no value for {name}; write {name}=A,B")
    made = (
        _task(target, fixed | dict(zip(axes, each, strict=True)))
        for each in product(*axes.values())
    )
    tasks = list({task.name: task for task in made}.values())
    _refuse_idle(tasks, axes)
    return tasks


def _chosen(settings: Mapping[str, Any]) -> list[str]:
    # the names whose value is another than the default, which would be lost
    return [
        name
        for name, value in settings.items()
        if name in OF_OPTIMIZERS and _setting(name, value) != getattr(RunConfig, name)
    ]


def _refuse_idle(tasks: Sequence[Task], names: Iterable[str]) -> None:
    # what some of the optimizers read may be given to all; else it is a mistake
    trained = [task.settings["optimizer"] for task in tasks if task.target == TRAIN]
    read_by_some = {name for optimizer in trained for name in READ_BY[optimizer]}
    if idle := [n for n in names if trained and n in OF_OPTIMIZERS and n not in read_by_some]:
        among = ", ".join(sorted(set(trained)))
        raise InputError(
            f"no optimizer of the sweep ({among}) reads {', '.join(idle)}; leave it out"
        )


def read_plan(path: Path) -> tuple[list[Task], Path | None]:
    """Reads the tasks of a sweep, and its folder if it names one, from a YAML file.

        run: train
        out: runs/digits
        seeds: 3
        settings: {subset: 300, epochs: 80}
        grid: {optimizer: [msgd, engm], lr: [0.1, 0.2]}

    `grid` may be a list of grids, whose tasks follow one another.

    Raises:
        InputError: If the file is no such plan; as for `plan`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Of a name that is given twice YAML's own takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(f"{path} has {twice[0]!r} twice; leave one of them out")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    known = {"run": str, "out": str, "seeds": int, "settings": dict, "grid": dict}
    in_words = {str: "text", int: "a whole number", dict: "names and values"}
    if not isinstance(values, dict) or not isinstance(values.get("run"), str):
        raise InputError(f"{path} must say `run: train` or `run: NOTEBOOK`")
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{path} has {name!r}; a plan has {', '.join(known)}")
        parts = value if name == "grid" and isinstance(value, list) else [value]
        if not all(type(part) is known[name] for part in parts):  # a bool is an int to isinstance
            raise InputError(f"{name} in {path} must be {in_words[known[name]]}, got {value!r}")
    settings = values.get("settings", {})
    grids = values.get("grid", {})
    tasks: list[Task] = []
    for grid in grids if isinstance(grids, list) else [grids]:
        lists = {k: v if isinstance(v, list) else [v] for k, v in grid.items()}
        tasks += _tasks(values["run"], lists, settings, values.get("seeds"))
    _refuse_idle(tasks, _chosen(settings))  # one of the other grids may read them
    once = list({task.name: task for task in tasks}.values())
    return once, Path(values["out"]) if values.get("out") else None


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Reads `optimizer=msgd,engm` and the like; commas within brackets do not part values.

    Raises:
        InputError: If a text has another form, or names a setting that another one named.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise InputError(f"{text!r} is no part of a grid; write NAME=VALUE,VALUE")
        if name in grid:
            raise InputError(f"{name} is in the grid twice; write all its values in one --grid")
        parts, depth = [""], 0
        for sign in values:
            depth += (sign in "[(") - (sign in "])")
            if sign == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += sign
        grid[name] = [part.strip() for part in parts if part.strip()]
    return grid


def _add_seeds(target: str, axes: dict[str, Any], fixed: dict[str, Any], seeds: int) -> None:
    check_count("seeds", seeds)
    name = "seed"
    if target != TRAIN:
        from engm.lab import batch, parameters

        takes = parameters.parameters(batch.find(target))
        if "seeds" in takes and "seed" not in takes:
            name = "seeds"
    if name in axes or name in fixed:
        raise InputError(f"{name} is given twice; leave out the number of seeds")
    if name == "seed":
        axes["seed"] = list(range(seeds))
    else:
        fixed["seeds"] = list(range(seeds))


def _task(target: str, given: Mapping[str, Any]) -> Task:
    if target == TRAIN:
        values = {k: _setting(k, v) for k, v in given.items()}
        unread = RunConfig.from_dict(values).unread  # makes no run of its own
        read_values = {k: v for k, v in values.items() if k not in unread}
        config = RunConfig.from_dict(read_values).resolved()
        return Task(config.name, TRAIN, asdict(config))

    from engm.lab import batch, parameters

    try:
        path = batch.find(target)
    except InputError as error:
        raise InputError(f"{error}; or {TRAIN}, for training runs") from None
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    values = parameters.check(path, {k: v for k, v in given.items() if k not in texts})
    values |= parameters.parse(path, texts)
    parameters.check_ranges(values)
    cells = [c.source for c in parameters.read_notebook(path).cells if c.cell_type == "code"]
    content = json.dumps([cells, sorted(values.items())])
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return Task(f"{path.stem}-{digest}", str(path.resolve()), values)


def _setting(name: str, value: Any) -> Any:
    if name in TYPES and isinstance(value, str):
        with suppress(ValueError):
            return read(value, TYPES[name])
    return value  # RunConfig says what it takes instead
