"""The commands `prepare`, `train`, `evaluate`, `report` and `sweep`."""

import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from engm.cli.options import (
    QUICK,
    Count,
    PathType,
    Setting,
    data_root_option,
    device_option,
    duration,
    main,
    once,
    option_of,
    quoted,
    save_option,
    say,
    settings_options,
    stoppable,
    warn_of_hours,
    with_options,
)
from engm.config import READ_BY, RECIPES, TYPES, RunConfig, choices
from engm.errors import InputError, check_count, meant

_PREPARED = [name for name in choices(TYPES["dataset"]) if name != "digits"]


@main.command()
@click.argument("name", required=False, metavar=f"[{'|'.join(_PREPARED)}]")
@click.option("--archive", type=PathType(),
              help="take this zip, tar or folder instead of downloading: the official files, or "
              "the same images as train/<class>/*.png and test/<class>/*.png")  # fmt: skip
@click.option("--root", type=PathType(),
              help="folder to write to; default: ENGM_DATA, or else ~/.cache/engm")  # fmt: skip
def prepare(name: str | None, archive: Path | None, root: Path | None) -> None:
    """Prepare the data set NAME for the kit: download (or --archive), check, convert.

    Writes NAME.npz and NAME.json. Without NAME, lists the names, and what each takes on the disk.
    The digits come with scikit-learn and need no preparation. Images of your own do not work:
    names, counts and classes are held to those of the official data sets.

    \b
    engm prepare cifar10
    engm prepare cifar10 --archive cifar-10-python.tar.gz
    """
    from engm.data import SPECS, data_root, load, recorded_digest
    from engm.preparation import caches

    if name is None and archive is not None:
        raise click.UsageError(f"of which data set? engm prepare NAME --archive {quoted(archive)}")
    if name is None:
        click.echo("Data sets to prepare (engm prepare NAME, or --help):")
        for spec in (SPECS[name] for name in _PREPARED):
            size = " x ".join(map(str, spec.image_shape))
            counts = f"{spec.train_count:,} + {spec.test_count:,} images, {size}"
            there = ", prepared" if recorded_digest(spec.name, root) else ""
            size = f"{caches.cache_size(spec):.2f} GB on the disk{there}"
            click.echo(f"  {spec.name:14} {counts:36} {size}")
        click.echo("A download takes room beside the cache until it has been read.")
        return
    if name == "digits":
        raise click.UsageError("the digits come with scikit-learn and need no preparation")
    if name not in _PREPARED:
        known = f"{name!r} is not one of {', '.join(_PREPARED)}"
        raise click.UsageError(known + meant(name, _PREPARED))
    cache, before = data_root(root) / f"{name}.npz", recorded_digest(name, root)
    whole = False
    if before and archive is None:
        with suppress(InputError):
            whole = bool(load(name, root=root))
    if whole:
        say(f"{name} is prepared: {quoted(cache)}; delete that file to have it made anew")
    else:
        try:
            caches.prepare(SPECS[name], archive, data_root(root))
        except OSError as error:
            raise InputError(f"{error}; {name} is not prepared") from None
        if before not in (None, recorded_digest(name, root)):
            say("its images are others than before; runs on those will not go on with these")
    setting = "" if cache.parent == data_root() else f"ENGM_DATA={quoted(cache.parent)} "
    say(f"next, to see that it runs: {setting}engm train --dataset {name} {QUICK}")


@main.command()
@settings_options
@click.option("--out", type=PathType(), default=Path("runs"), show_default=True,
              help="folder of the run directories")  # fmt: skip
@device_option
@data_root_option
@save_option
def train(
    out: Path, device: str, data_root: Path | None, save_adversarial: bool, **settings: Any
) -> None:
    """Train and evaluate a classifier; go on where an earlier call was cut off.

    Without options: adversarial training with MSGD on the digits that come with the kit.

    \b
    engm train --optimizer engm --subset 300 --epochs 80
    engm train --dataset cifar10 --eps 8/255 --schedule one-cycle --precision bfloat16
    engm train --recipe trades --optimizer engm
    """
    source_of = click.get_current_context().get_parameter_source
    given = {n: v for n, v in settings.items() if source_of(n) is not ParameterSource.DEFAULT}
    try:
        config = RunConfig(**given).resolved()
    except InputError as error:
        raise click.UsageError(with_options(str(error))) from None
    for name in sorted(given.keys() & config.unread):
        if getattr(config, name) == getattr(RunConfig(), name):
            continue  # else it would be a run of its own, the same as another
        readers = [optimizer for optimizer, names in READ_BY.items() if name in names]
        raise click.UsageError(
            f"{option_of(name)} has no effect with {config.optimizer}; leave it out, or take an "
            f"--optimizer that reads it: {', '.join(readers)}"
        )
    from engm.device import pick_device
    from engm.evaluation.checks import unit_of
    from engm.report.records import NEAR, Record, intervals, near_chance, summarise, to_markdown
    from engm.runs import CHECKPOINTS, fits_config, load_tensors
    from engm.training import expected_seconds, fit, load_data, read_finished

    on = pick_device(device)  # this and the data before all that is said
    folder = (out / config.name).resolve()
    finished = read_finished(config, out, data_root)
    if config.capture and on.type != "cuda" and not finished:
        raise click.UsageError(f"--capture records CUDA graphs, and this is a {on}; leave it out")
    dataset = None if finished else load_data(config, data_root)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    if first:
        for name, value in config.to_dict().items():
            click.echo(f"{name:17} {'default' if value is None else value}")
        assert config.eps is not None and config.step_size is not None
        unit = unit_of(config.eps, config.norm)
        if not unit.passed:
            say(f"\n{unit.meaning}")
        attacked = config.method != "natural"
        if attacked and "step_size" in given and config.step_size > 2 * config.eps:
            step = f"--step-size {config.step_size:g} is more than twice --eps {config.eps:g}"
            say(f"\n{step}: a single step of the training attack leaves the budget, and is cut off")
        if config.recipe:
            say(f"\nrecipe {config.recipe}: {RECIPES[config.recipe].source}; options override it")
        if dataset is None:
            say(f"\nshowing the finished run in {quoted(folder)}")
        else:
            say(f"\ntraining, then attacking the test images, in {quoted(folder)}")
            last, done = folder / CHECKPOINTS["last"], 0
            if last.exists():  # the metrics may count an epoch that was cut off before it was kept
                with fits_config(last):
                    done = load_tensors(last)["epoch"]
                say(f"going on after epoch {done} of {config.epochs}")
            if config.model != "small_cnn" and on.type == "cpu":
                takes = duration(expected_seconds(config, dataset, config.epochs - done))
                say(f"this takes up to about {takes}, by the time of one pass; bars know better")
            else:
                say("bars say how long it takes")
            warn_of_hours(config, device)
            if config.recipe and on.type == "cpu" and "model" not in given:
                say(
                    f"the recipe's network, {config.model} of width {config.width}, wants a GPU; "
                    "quicker: --model preact_resnet18 --width 8"
                )
    how: dict[str, Any] = dict(device=device, dataset=dataset, save_adversarial=save_adversarial)
    with stoppable("the same command goes on after the last whole epoch, if there is one"):
        run = finished or fit(config, out, **how)
    if first:
        click.echo(f"\n{click.format_filename(run.folder)}\n")
        record = Record(run.folder, run.config, run.result)
        click.echo(to_markdown(summarise([record])))
        click.echo(intervals(record))
        if chance := near_chance([record]):
            warmup = ", or an --awp-warmup" if config.awp and not config.awp_warmup else ""
            say(f"{chance} ({NEAR}); a smaller --lr, more --epochs or images{warmup} may help\n")
        say(
            f"next: engm evaluate {quoted(run.folder)} attacks it in more ways, "
            f"engm report {quoted(out)} puts it beside others"
        )


@main.command()
@click.argument("run", type=PathType())
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="default: both")
@click.option("--num-steps", type=Count(), help="PGD steps; default: the run's own")
@click.option("--eps", type=Setting("eps"), help="attack budget, as in 8/255; default: the run's")
@click.option("--images", type=Count(),
              help="this many test images, evenly over the classes; default: all")  # fmt: skip
@click.option("--autoattack", is_flag=True, help="also run AutoAttack; it takes long, and goes on "
              "where it was cut off")  # fmt: skip
@device_option
@data_root_option
def evaluate(
    run: Path,
    checkpoint: str | None,
    num_steps: int | None,
    eps: float | None,
    images: int | None,
    autoattack: bool,
    device: str,
    data_root: Path | None,
) -> None:
    """Attack the checkpoints of the run directory RUN on the test set, in many ways.

    Prints accuracies with 95% intervals, and checks whether they can be believed. RUN gets, for
    each checkpoint, evaluation-best.json, robustness-best.png and the adversarial examples, which
    the accuracies are recomputed from, in the folder evaluation-best.
    """
    from engm.device import pick_device
    from engm.evaluation.suite import evaluate_checkpoint
    from engm.runs import RESULT, read_config
    from engm.training import load_data

    config = read_config(_run_directory(run))
    dataset = load_data(config, data_root).to(pick_device(device))
    options: dict[str, Any] = dict(num_steps=num_steps, eps=eps, images=images)
    checkpoints = [checkpoint] if checkpoint else ["best", "last"]
    if images is not None:
        check_count("--images", images, 1, len(dataset.test))
    first = ", first with AutoAttack, which takes longest" if autoattack else ""
    say(
        f"attacking the {' and the '.join(checkpoints)} checkpoint of {quoted(run.resolve())} on "
        f"{images or len(dataset.test):,} test images of {dataset.title}{first}"
    )
    ended = (run / RESULT).exists()
    if not ended:
        say("this run has not ended; evaluate it again when it has: checkpoints are others then")
    aside: list[str] = []
    for which in checkpoints:
        with stoppable(
            f"the evaluation of the {which} checkpoint is not kept, but for what AutoAttack has "
            "finished; the same command makes it anew"
        ):
            report = evaluate_checkpoint(
                run, which, dataset, **options, autoattack=autoattack, progress=True
            )
        click.echo(f"{which} checkpoint: {report}\n")
        aside += [f"evaluation-{which}.json"] if report.remark else []
    click.echo(f"written to {click.format_filename(run)}")
    if not ended:
        say("next: the same engm train command as before goes on with the run")
    elif aside:
        files = " and ".join(aside)
        say(f"next: to have engm report read this evaluation, move {files} out of the folder")
    else:
        above = run.parent if run.name else run.resolve().parent  # of "." there is no parent
        say(f"next: engm report {quoted(above)} shows it beside the other runs")


def _run_directory(folder: Path) -> Path:
    from engm.runs import CONFIG

    if folder.is_file():
        raise InputError(f"{folder} is a file; give its folder, {quoted(folder.resolve().parent)}")
    inside = [path.parent.relative_to(folder) for path in sorted(folder.glob("**/*/" + CONFIG))]
    if inside and not (folder / CONFIG).exists():
        names = "\n".join(f"  {click.format_filename(name)}" for name in inside)
        raise InputError(
            f"{folder.resolve()} is not a run directory, but holds some; give one of\n{names}"
        )
    return folder.resolve()


@main.command()
@click.argument("runs", type=PathType(), nargs=-1, required=True)
@click.option("--compare", metavar="OPTIMIZER|SETTING=VALUE",
              help="compare the other optimizers, or values of the setting, with this one, seed by "
              "seed")  # fmt: skip
@click.option("--choose", metavar="SETTING,...", default="",
              help="keep for each optimizer, or value of the compared setting, what does best on "
              "the validation images")  # fmt: skip
@click.option("--costs", is_flag=True, help="add a table of times, hardware and versions")
@click.option("--mixed", is_flag=True, help="allow runs that were not evaluated alike")
@click.option("--format", "kind", type=click.Choice(["markdown", "csv", "latex", "html"]),
              help="default: markdown, or what the file is called")  # fmt: skip
@click.option(
    "--out", type=PathType(), help="also write a file (.md, .csv, .tex, .html) or a folder"
)
@click.option("--figures", type=PathType(), help="also write figures into this folder")
@click.option("--logs", type=PathType(), help="also copy what this report reads, without weights "
              "and images, to this folder")  # fmt: skip
def report(
    runs: tuple[Path, ...],
    compare: str | None,
    choose: str,
    costs: bool,
    mixed: bool,
    kind: str | None,
    out: Path | None,
    figures: Path | None,
    logs: Path | None,
) -> None:
    """Put the run directories at or below RUNS into one table.

    Runs that differ in their seed alone share a row: mean ± standard deviation, in percent; CSV
    has fractions, unrounded. What `engm evaluate` found has columns of its own. A choice at an end
    of its grid and rows near chance are marked.

    \b
    engm report runs --choose lr --compare msgd --out report.html
    engm report runs --compare precision=float32 --costs --logs results/precision
    """
    from engm.report import run_report
    from engm.report.records import collect
    from engm.report.run_report import copy_logs
    from engm.sweep import superseded

    if out is not None and out.suffix and not out.is_dir():
        run_report.format_of(out, kind)  # before anything is read
    found = [collect(root) for root in runs]
    names = [name.strip().replace("-", "_") for name in choose.split(",") if name.strip()]
    every = [record for records, _ in found for record in records]
    old = superseded([record.folder for record in every])
    records = [record for record in every if record.folder not in old]
    if unfinished := [folder for _, folders in found for folder in folders]:
        say(f"left out, not finished: {', '.join(map(str, unfinished))}")
    done = run_report.build(records, compare=compare, choose=names, mixed=mixed, costs=costs)
    click.echo(done.text("markdown" if out is not None or kind is None else kind))
    if old:
        say(f"left out, made again by another version: {', '.join(map(str, old))}")
    for remark in done.all_remarks(kind or "markdown"):
        say(remark)
    files = [] if out is None else done.write(out, kind)
    files += [] if figures is None else done.write_figures(figures)
    # all of them: which ones --choose takes is a part of what the logs show
    files += [] if logs is None else copy_logs(records, logs)
    for path in files:
        click.echo(f"written to {click.format_filename(path)}", err=True)
    if not records:
        say("next: the same engm train or sweep command goes on with what is not finished")
    elif not files and kind is None:
        optimizers = {record.config.optimizer for record in records}
        paired = not compare and len(optimizers) > 1 and "msgd" in optimizers
        pairs = ", --compare msgd pairs it seed by seed" if paired else ""
        say(f"next: --out report.html makes a page of it{pairs}")


@main.command()
@click.argument("target")
@click.option("--grid", multiple=True, metavar="NAME=VALUE,...",
              help="values to try, each with each of the others; may be repeated")  # fmt: skip
@click.option("--set", "settings", nargs=2, multiple=True, metavar="NAME VALUE",
              help="a setting that all runs have; may be repeated")  # fmt: skip
@click.option("--seeds", type=Count(),
              help="run the seeds 0 to this number - 1")  # fmt: skip
@click.option("--out", type=PathType(), help="folder of the runs; default: the plan's, or runs")
@click.option("--workers", type=Count(),
              help="processes on this machine; default: 1")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS",
              help="use the workers of a dask scheduler, as tcp://10.0.0.1:8786")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True),
              help="seconds that a notebook may take; default: no limit")  # fmt: skip
@device_option
@data_root_option
@save_option
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
    from engm.report.records import groups_of, near_chance, read_record, summarise, to_markdown
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
    sweeps.check(tasks, out, how)
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
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    trained = [each for each in outcomes if each.task.target == TRAIN]
    click.echo(f"\n{click.format_filename(folder)}\n")
    if records := [read_record(each.folder) for each in trained if each.error is None]:
        click.echo(to_markdown(summarise(records)))
        rows = groups_of(records)
        if near := sum(bool(near_chance(members)) for _, members in rows):
            say(f"{near} of {len(rows)} rows near chance: engm report says which")
    for outcome in failed:
        say(f"failed: {outcome.task.name}: {outcome.error}")
    if failed:
        count = _count(len(outcomes))
        say(f"{len(failed)} of {count} failed; the same command tries them again")
        sys.exit(1)
    notebooks = "each folder has the executed notebook and its result"
    optimizers = {each.task.settings["optimizer"] for each in trained}
    pairs = " --compare msgd" if len(optimizers) > 1 and "msgd" in optimizers else ""
    say(f"next: engm report {quoted(out)}{pairs}" if trained else notebooks)


def _count(number: int) -> str:
    return f"{number} run{'s' * (number != 1)}"
