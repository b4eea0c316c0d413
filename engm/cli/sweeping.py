"""The command `engm sweep`."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engm.cli.options import (
    PathType,
    data_root_option,
    device_option,
    main,
    once,
    quoted,
    say,
    stoppable,
)

if TYPE_CHECKING:
    from engm.sweep import Outcome


@main.command()
@click.argument("target")
@click.option("--grid", multiple=True, metavar="NAME=VALUE,...",
              help="values to try, each with each of the others; may be repeated")  # fmt: skip
@click.option("--set", "settings", nargs=2, multiple=True, metavar="NAME VALUE",
              help="a setting that all runs have; may be repeated")  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1),
              help="run the seeds 0 to this number - 1")  # fmt: skip
@click.option("--out", type=PathType(), help="folder of the runs; default: the plan's, or runs")
@click.option("--workers", type=click.IntRange(min=1),
              help="processes on this machine; default: 1")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS",
              help="use the workers of a dask scheduler, as tcp://10.0.0.1:8786")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True),
              help="seconds that a notebook may take; default: no limit")  # fmt: skip
@device_option
@data_root_option
@click.option("--save-adversarial/--no-save-adversarial", default=True, show_default=True,
              help="keep the adversarial test examples")  # fmt: skip
def sweep(
    target: str,
    grid: tuple[str, ...],
    settings: tuple[tuple[str, str], ...],
    seeds: int | None,
    out: Path | None,
    workers: int | None,
    scheduler: str | None,
    **options: Any,
) -> None:
    """Run TARGET with all values of a grid, on several processes or a cluster.

    TARGET is "train", for training runs with the settings of `engm train`; a notebook, for its
    parameters; or a plan, a YAML file with all of this. What is done is not run again, and what
    was cut off goes on: after Ctrl-C, a kill or a power cut, give the same command again.

    \b
    engm sweep train --grid optimizer=msgd,engm --grid lr=0.1,0.2 --seeds 3 --workers 2
    engm sweep 06_cifar --grid lr=0.05,0.1 --set dataset cifar10 --set subset none
    engm sweep plan.yaml --scheduler tcp://10.0.0.1:8786
    """
    if workers is not None and scheduler is not None:
        raise click.UsageError("give either --workers or --scheduler")
    from engm import sweep as sweeps
    from engm.sweep.plan import TRAIN, parse_grid, plan, read_plan

    if target.endswith((".yaml", ".yml")):
        if grid or settings or seeds is not None:
            raise click.UsageError("a plan has its own grid, settings and seeds; write them there")
        tasks, planned = read_plan(Path(target))
        out = out or planned
    else:
        # options are written with dashes, settings with underscores
        dash = "-" if target == TRAIN else "_"
        axes = ((name.replace(dash, "_"), values) for name, values in parse_grid(grid).items())
        fixed = once(((n.replace(dash, "_"), v) for n, v in settings), "--grid NAME=A,B tries both")
        tasks = plan(target, once(axes, "write it once"), settings=fixed, seeds=seeds)
    out = out or Path("runs")
    how = sweeps.Options(workers=workers or 1, scheduler=scheduler, **options)
    folder = sweeps.folder_of(out)
    done = sum(sweeps.is_done(task, folder) for task in tasks)
    click.echo(f"{_count(len(tasks))}, {done} done already, in {click.format_filename(folder)}")
    if others := [p.name for p in folder.parent.glob("engm-*") if p != folder]:
        click.echo(f"runs of other versions stay beside it: {', '.join(others)}")
    if done < len(tasks):
        here = "1 process" if how.workers == 1 else f"{how.workers} processes"
        place = f"the workers of {scheduler}" if scheduler else f"{here} of this machine"
        say(f"running {len(tasks) - done} on {place}; the bar says how long it takes")
    with stoppable("the same command goes on where this one was"), warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="distributed")
        warnings.showwarning = lambda message, *_, **__: say(f"\nwarning: {message}")
        outcomes = sweeps.run(tasks, out, how)
    _tell(outcomes, folder)
    if any(outcome.error is not None for outcome in outcomes):
        sys.exit(1)
    trained = any(task.target == TRAIN for task in tasks)
    notebooks = "each folder has the executed notebook and its result"
    say(f"next: engm report {quoted(out)}" if trained else notebooks)


def _tell(outcomes: list["Outcome"], folder: Path) -> None:
    from engm.report.records import read_record, summarise, to_markdown
    from engm.sweep.plan import TRAIN

    whole = [outcome for outcome in outcomes if outcome.error is None]
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    click.echo(f"\n{click.format_filename(folder)}\n")
    runs = [outcome.folder for outcome in whole if outcome.task.target == TRAIN]
    if runs:
        click.echo(to_markdown(summarise(list(map(read_record, runs)))))
    for outcome in failed:
        click.echo(f"failed: {outcome.task.name}: {outcome.error}", err=True)
    if failed:
        click.echo(
            f"{len(failed)} of {_count(len(outcomes))} failed; the same command tries them again",
            err=True,
        )


def _count(number: int) -> str:
    return f"{number} run{'s' * (number != 1)}"
