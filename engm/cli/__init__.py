"""The command `engm`. Torch is imported when a command needs it, so `--help` answers at once."""

from engm.cli import measuring, notebooks, runs  # whose commands `main` then has
from engm.cli.options import main

__all__ = ["main"]
