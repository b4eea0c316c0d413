"""The command `engm`. Torch is imported when a command needs it, so `--help` answers at once."""

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from engm.cli_sweep import add_sweep
from engm.config import TYPES, RunConfig, alternatives, choices, parse_number
from engm.errors import InputError, NonFiniteLossError


class _Command(click.Command):
    """Names every option when one is unknown."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            options = [o for o in self.get_params(ctx) if isinstance(o, click.Option)]
            known = ", ".join(option.opts[0] for option in options)
            message = f"no such option {error.option_name!r}; the options are {known}"
            raise click.UsageError(message, ctx) from None


class _Group(click.Group):
    """Names every command when one is unknown; turns the kit's own errors into one line."""

    command_class = _Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            known = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"no such command {args[0]!r}; the commands are {known}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough; click ends in silence
        except (InputError, NonFiniteLossError, OSError) as error:
            raise click.ClickException(str(error)) from None


class _Path(click.Path):
    """A path; an empty one is the trace of an empty variable, not the present folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "":
            self.fail("the path is empty; '.' is the present folder", param, ctx)
        return super().convert(value, param, ctx)


class _Setting(click.ParamType):
    """A field of `RunConfig`: one of its literal values, or a number."""

    def __init__(self, name: str) -> None:
        self.kinds, self.names = alternatives(TYPES[name]), choices(TYPES[name])
        numbers = [kind.__name__ for kind in (int, float) if kind in self.kinds]
        self.name = "|".join(self.names + numbers)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str) or value in self.names:
            return value
        try:
            if int in self.kinds:
                return int(value)
            if float in self.kinds:
                return parse_number(value)
        except ValueError:
            pass
        wanted = [*self.names] + ["a whole number"] * (int in self.kinds)
        wanted += ["a number such as 0.03 or 8/255"] * (float in self.kinds)
        self.fail(f"{value!r} is not {' or '.join(wanted)}", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: Any = None) -> str:
        return f"[{self.name}]" if len(self.names) > 0 else self.name.upper()


def _settings(command: Callable[..., Any], names: Collection[str] = TYPES) -> Callable[..., Any]:
    """Gives a command one option for each field of `RunConfig`, or for those in `names`."""
    for item in reversed([item for item in fields(RunConfig) if item.name in names]):
        flag = f"--{item.name.replace('_', '-')}"
        is_flag = TYPES[item.name] is bool
        option = click.option(
            f"{flag}/--no-{flag[2:]}" if is_flag else flag,
            item.name,
            type=None if is_flag else _Setting(item.name),
            default=item.default,
            show_default=item.default is not None,
            help=item.metadata["help"],
        )
        command = option(command)
    return command


_BENCH = (
    *("model", "width", "model_norm", "batch_size", "num_steps", "precision", "channels_last"),
    "seed",
)
_device = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
_data_root = click.option("--data-root", type=_Path(), help="where prepare.py put the datasets")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="engm")
def main() -> None:
    """Learn, test and use ENGM, the outer optimizer for adversarial training.

    The usual order: `engm train` makes a run directory, `engm evaluate` attacks what it holds,
    `engm report` puts many of them into one table. `engm run` runs a notebook with parameters.
    """


@main.command()
@_settings
@click.option("--out", type=_Path(), default=Path("runs"), show_default=True,
              help="folder of the run directories")  # fmt: skip
@_device
@_data_root
@click.option("--save-adversarial/--no-save-adversarial", default=True, show_default=True,
              help="keep the adversarial test examples")  # fmt: skip
def train(
    out: Path, device: str, data_root: Path | None, save_adversarial: bool, **settings: Any
) -> None:
    """Train and evaluate a classifier; go on where an earlier call was cut off.

    Without options: adversarial training with MSGD on the digits that come with the kit.

    \b
    engm train --optimizer engm --subset 300 --epochs 80
    engm train --dataset cifar10 --eps 8/255 --schedule one-cycle --precision bfloat16
    """
    config = RunConfig(**settings).resolved()
    from engm.results import Record, summarise, to_markdown
    from engm.training import fit

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    if first:
        click.echo("\n".join(f"{name:14} {value}" for name, value in config.to_dict().items()))
    where: dict[str, Any] = dict(device=device, data_root=data_root)
    try:
        run = fit(config, out, **where, save_adversarial=save_adversarial)
    except KeyboardInterrupt:
        click.echo("\nstopped; the same command goes on after the last whole epoch", err=True)
        sys.exit(130)  # what shells report of Ctrl-C
    if first:
        click.echo(f"\n{click.format_filename(run.folder)}\n")
        click.echo(to_markdown(summarise([Record(run.folder, run.config, run.result)])))


@main.command()
@click.argument("run", type=_Path())
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="default: both")
@click.option("--num-steps", type=click.IntRange(min=1), help="PGD steps; default: the run's own")
@click.option("--eps", type=_Setting("eps"), help="attack budget, as in 8/255; default: the run's")
@click.option("--images", type=click.IntRange(min=1),
              help="this many test images, evenly over the classes; default: all")  # fmt: skip
@click.option("--autoattack", is_flag=True, help="also run AutoAttack; it takes long, and goes on "
              "where it was cut off")  # fmt: skip
@_device
@_data_root
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
    from engm import data
    from engm.robustness import evaluate_checkpoint
    from engm.run_directory import read_config
    from engm.training import pick_device

    config = read_config(run)
    dataset = data.load(config.dataset, root=data_root).to(pick_device(device))
    options: dict[str, Any] = dict(num_steps=num_steps, eps=eps, images=images)
    for which in [checkpoint] if checkpoint else ["best", "last"]:
        report = evaluate_checkpoint(
            run, which, dataset, **options, autoattack=autoattack, progress=True
        )
        click.echo(f"{which} checkpoint: {report}\n")
    click.echo(f"written to {click.format_filename(run)}")


@main.command()
@click.argument("runs", type=_Path(), nargs=-1, required=True)
@click.option("--compare", type=click.Choice(choices(TYPES["optimizer"])),
              help="compare the other optimizers with this one, seed by seed")  # fmt: skip
@click.option("--choose", metavar="SETTING,...", default="",
              help="keep for each optimizer what does best on the validation images")  # fmt: skip
@click.option("--mixed", is_flag=True, help="allow runs that were not evaluated alike")
@click.option("--format", "kind", type=click.Choice(["markdown", "csv", "latex", "html"]),
              help="default: markdown, or what the file is called")  # fmt: skip
@click.option("--out", type=_Path(), help="also write a file (.md, .csv, .tex, .html) or a folder")
@click.option("--figures", type=_Path(), help="also write figures into this folder")
def report(
    runs: tuple[Path, ...],
    compare: str | None,
    choose: str,
    mixed: bool,
    kind: str | None,
    out: Path | None,
    figures: Path | None,
) -> None:
    """Put the run directories at or below RUNS into one table.

    Runs that differ in their seed alone share a row: mean ± standard deviation, in percent; CSV
    has fractions, unrounded.

    \b
    engm report runs --choose lr --compare msgd --out report.html
    """
    from engm import run_report
    from engm.results import collect

    if out is not None and out.suffix and not out.is_dir():
        run_report.format_of(out, kind)  # before anything is read
    found = [collect(root) for root in runs]
    names = [name.strip().replace("-", "_") for name in choose.split(",") if name.strip()]
    records = [record for records, _ in found for record in records]
    done = run_report.build(records, compare=compare, choose=names, mixed=mixed)
    click.echo(done.text("markdown" if out is not None or kind is None else kind))
    unfinished = [folder for _, folders in found for folder in folders]
    remarks = [f"left out, not finished: {', '.join(map(str, unfinished))}"] * bool(unfinished)
    for remark in [*remarks, *done.remarks]:
        click.echo(remark, err=True)
    files = [] if out is None else done.write(out, kind)
    files += [] if figures is None else done.write_figures(figures)
    for path in files:
        click.echo(f"written to {click.format_filename(path)}", err=True)


@main.command()
@partial(_settings, names=_BENCH)
@click.option("--image-size", type=click.IntRange(min=1), default=32, show_default=True,
              help="height and width of the images")  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True,
              help="rounds; each measures every method once")  # fmt: skip
@click.option("--methods", metavar="NAME,NAME,...",
              help="what to measure; default: all, an unknown name lists them")  # fmt: skip
@click.option("--out", type=_Path(), default=Path("outputs/bench"), show_default=True,
              help="folder of bench.json and bench.png")  # fmt: skip
@_device
def bench(
    image_size: int, repeats: int, methods: str | None, out: Path, device: str, **settings: Any
) -> None:
    """Measure time and peak memory of a step of ENGM, as ratios to MSGD.

    In the same rounds it measures other libraries' ways to the same step, where they are installed:
    pip install 'engm[peers]'.

    \b
    engm bench --model preact_resnet18 --model-norm group --width 32 --batch-size 16
    """
    config = RunConfig(**{"dataset": "cifar10"} | settings)
    from engm import bench as measurement
    from engm import costs

    names = methods.split(",") if methods is not None else measurement.METHODS
    what: dict[str, Any] = dict(image_size=image_size, repeats=repeats, device=device)
    result = measurement.run(config, names=names, **what)
    costs.write(result, out)
    click.echo(costs.table(result))
    click.echo(f"written to {click.format_filename(out)}")


@main.command()
@click.argument("notebook")
@click.option("-p", "values", nargs=2, multiple=True, metavar="NAME VALUE",
              help="set a parameter of the notebook; may be repeated")  # fmt: skip
@click.option("--out", type=_Path(), default=Path("outputs"), show_default=True,
              help="folder of the executed notebook and its result")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True),
              help="seconds the notebook may take; default: no limit")  # fmt: skip
def run(
    notebook: str, values: tuple[tuple[str, str], ...], out: Path, timeout: float | None
) -> None:
    """Run NOTEBOOK, a name such as 06_cifar or a path, with parameters.

    Unknown names and values of a wrong type are refused before anything runs.

    \b
    engm run 06_cifar -p dataset cifar10 -p eps 8/255
    """
    from engm import notebooks

    path = notebooks.find(notebook)
    done = notebooks.run(path, notebooks.parse(path, dict(values)), output_dir=out, timeout=timeout)
    click.echo(click.format_filename(done.path))
    if done.error is not None:
        raise click.ClickException(f"{notebook} failed in {done.error}")


@main.command()
@click.option("--repo", metavar="OWNER/NAME", help="your repository on GitHub, a public one")
@click.option("--branch", default="main", show_default=True, help="its branch")
@click.option("--remove", is_flag=True, help="take badge and cell out again")
@click.option("--notebooks", "folder", type=_Path(), default=Path("notebooks"), show_default=True,
              help="folder of the notebooks")  # fmt: skip
def colab(repo: str | None, branch: str, remove: bool, folder: Path) -> None:
    """Let the notebooks open in Google Colab, from a repository of yours.

    Each gets a badge that opens it there, and a first cell that installs the kit, looks for a GPU
    and, if you like, keeps runs on Google Drive. Off Colab the cell does nothing. The same command
    again changes nothing; another repository takes the place of the first.

    \b
    engm colab --repo owner/name
    """
    from engm import colab as stamps

    if (repo is None) != remove:
        raise click.UsageError("give either --repo OWNER/NAME or --remove")
    paths = sorted(folder.glob("[0-9]*_*.ipynb"))
    if not paths:
        raise InputError(f"there are no notebooks in {folder}; --notebooks says where they are")
    changed = stamps.stamp(paths, repo, branch) if repo is not None else stamps.remove(paths)
    for path in changed:
        click.echo(click.format_filename(path))
    click.echo(f"{len(changed)} of {len(paths)} notebooks changed")


@main.command()
@click.option("--out", type=_Path(), default=Path("outputs"), show_default=True,
              help="folder of the executed notebooks and the report")  # fmt: skip
def demo(out: Path) -> None:
    """Run every notebook with its own defaults and build one report, OUT/index.html.

    A notebook that fails is named with the cell and the reason; the others still run.
    """
    from engm import report as html

    if not all(done.ok for done in html.demo(out)):
        sys.exit(1)


add_sweep(main, _Path())
