"""The command `engm` and its subcommands."""

import click

from engm.cli import measuring, notebooks, preparing, runs, sweeping
from engm.cli.options import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="engm")
def main() -> None:
    """Learn, test and use ENGM, the outer optimizer for adversarial training.

    The usual order: `engm prepare` fetches a data set (the digits are there), `engm train` makes a
    run directory, `engm evaluate` attacks what it holds, `engm report` puts many of them into one
    table. `engm run` runs a notebook with parameters.
    """


for command in (
    *(preparing.prepare, runs.train, runs.evaluate, runs.report, measuring.bench),
    *(notebooks.run, notebooks.demo, notebooks.colab, notebooks.student, sweeping.sweep),
):
    main.add_command(command)
