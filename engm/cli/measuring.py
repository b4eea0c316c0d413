"""The command `bench`."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from engm.cli.options import (
    Count,
    PathType,
    data_root_option,
    device_option,
    main,
    say,
    settings_options,
    stoppable,
)
from engm.config import RunConfig
from engm.errors import check_choice

_BENCH = (
    *("model", "width", "model_norm", "batch_size", "num_steps", "precision", "channels_last"),
    *("seed", "subset"),
)
# What only one kind of bench has, and why the other one has not.
_OWN = {
    "step": {
        "precision": "its --methods name the precision, such as bfloat16",
        "channels_last": "its --methods name it, such as 'bfloat16 channels_last'",
        "image_size": "its images are of 32x32",
    },
    "training": {
        "subset": "its images are random",
        "dataset": "its images are random",
        "data_root": "its images are random",
        "steps": "a round is one step",
    },
}


@main.command()
@click.option("--what", type=click.Choice(["step", "training"]), default="step", show_default=True,
              help="the cost of a step of ENGM beside other ways to it, or the speed of training "
              "beside that of a public reference")  # fmt: skip
@partial(settings_options, names=_BENCH)
@click.option("--image-size", type=Count(), default=32, show_default=True,
              help="step: height and width of the images")  # fmt: skip
@click.option("--dataset", type=click.Choice(["cifar10", "random"]),
              help="training: images; default: cifar10 where it is prepared")  # fmt: skip
@click.option("--steps", type=Count(),
              help="training: steps of a round; default: 20 on CUDA, 2 on the CPU")  # fmt: skip
@click.option("--repeats", type=Count(), default=15, show_default=True,
              help="rounds; each measures every method once")  # fmt: skip
@click.option("--methods", metavar="NAME,NAME,...",
              help="what to measure; default: all, an unknown name lists them")  # fmt: skip
@click.option("--out", type=PathType(), default=Path("outputs/bench"), show_default=True,
              help="folder of bench.json and bench.png")  # fmt: skip
@data_root_option
@device_option
@click.pass_context
def bench(
    context: click.Context,
    what: str,
    repeats: int,
    methods: str | None,
    out: Path,
    device: str,
    **rest: Any,
) -> None:
    """Measure time and peak memory of a step of ENGM, as ratios to MSGD.

    In the same rounds it measures other libraries' ways to the same step, where they are installed:
    pip install 'engm[peers]'.

    With --what training: how many images a second adversarial training takes by the protocol of a
    public reference (github.com/locuslab/robust_overfitting) and by this kit, how near the attack
    is to the device's rate of bfloat16 matrix products, and where the rest of the time goes.

    \b
    engm bench --model preact_resnet18 --model-norm group --width 32 --batch-size 16
    engm bench --what training --batch-size 128 --device cuda
    engm bench --what training --methods "float32,bfloat16 channels_last" --width 16 --batch-size 32
    """
    other = "training" if what == "step" else "step"
    for name, instead in _OWN[other].items():
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} is not for --what {what}: {instead}", context)
    own = {name: rest.pop(name) for name in ("dataset", "data_root", "steps")}
    image_size = rest.pop("image_size")
    config = RunConfig(**{"dataset": "cifar10"} | rest)
    from engm.bench import outer_step, tables, training

    known = outer_step.METHODS if what == "step" else training.METHODS
    names = methods.split(",") if methods is not None else known
    for name in names:
        if what == "step":
            check_choice("method", name, known)
        elif name != training.REFERENCE:
            training.row_name(name)
    times = "once" if repeats == 1 else f"in {repeats} rounds, each method once a round"
    say(f"measuring {times}, after a warm-up; bars say how long it takes")
    libraries = {word for name in names for word in name.split("-")} & {"opacus", "backpack"}
    if missing := [name for name in sorted(libraries) if find_spec(name) is None]:
        say(f"without {' and '.join(missing)}: pip install 'engm[peers]' adds them")
    how: dict[str, Any] = dict(repeats=repeats, names=names, device=device)
    with stoppable("a measurement is kept when all rounds are done; the same command begins anew"):
        if what == "step":
            result = outer_step.run(config, image_size=image_size, **how)
        else:
            result = training.run(config, **own, save=partial(tables.write, out=out), **how)
    tables.write(result, out)
    click.echo(tables.table(result))
    click.echo(f"written to {click.format_filename(out)}")
    say(f"next: engm bench --what {other} measures the other half")
