"""The command `bench`."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from engm.cli.options import Command, PathType, device_option, settings_options
from engm.config import RunConfig

_BENCH = (
    *("model", "width", "model_norm", "batch_size", "num_steps", "precision", "channels_last"),
    "seed",
)


@click.command(cls=Command)
@partial(settings_options, names=_BENCH)
@click.option("--image-size", type=click.IntRange(min=1), default=32, show_default=True,
              help="height and width of the images")  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True,
              help="rounds; each measures every method once")  # fmt: skip
@click.option("--methods", metavar="NAME,NAME,...",
              help="what to measure; default: all, an unknown name lists them")  # fmt: skip
@click.option("--out", type=PathType(), default=Path("outputs/bench"), show_default=True,
              help="folder of bench.json and bench.png")  # fmt: skip
@device_option
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
    from engm.bench import costs

    names = methods.split(",") if methods is not None else measurement.METHODS
    what: dict[str, Any] = dict(image_size=image_size, repeats=repeats, device=device)
    result = measurement.run(config, names=names, **what)
    costs.write(result, out)
    click.echo(costs.table(result))
    click.echo(f"written to {click.format_filename(out)}")
