"""The command `engm`. Torch is imported when a command needs it, so `--help` answers at once."""

from engm.cli.command import main

__all__ = ["main"]
