"""The command `prepare`."""

import shlex
from pathlib import Path

import click

from engm.cli.options import Command, PathType, say
from engm.config import TYPES, choices
from engm.errors import InputError

NAMES = [name for name in choices(TYPES["dataset"]) if name != "digits"]


@click.command(cls=Command)
@click.argument("name", required=False, type=click.Choice(NAMES))
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
    from engm.data import SPECS, data_root
    from engm.preparation import caches

    if name is None:
        click.echo("Data sets to prepare (engm prepare NAME, or --help):")
        for spec in (SPECS[name] for name in NAMES):
            size = " x ".join(map(str, spec.image_shape))
            counts = f"{spec.train_count:,} + {spec.test_count:,} images, {size}"
            click.echo(f"  {spec.name:14} {counts:36} {caches.cache_size(spec):.2f} GB on the disk")
        click.echo("A download takes room beside the cache until it has been read.")
        return
    try:
        cache = caches.prepare(SPECS[name], archive, data_root(root))
    except OSError as error:
        raise InputError(f"{error}; {name} is not prepared") from None
    setting = "" if cache.parent == data_root() else f"ENGM_DATA={shlex.quote(str(cache.parent))} "
    few = "--subset 500 --validation-images 100 --test-images 200 --width 8 --epochs 1"
    say(f"next: {setting}engm train --dataset {name} {few}")
