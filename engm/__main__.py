"""`python -m engm` is the command `engm`, for torchrun and for Pythons without it on their path."""

from engm.cli import main

main(prog_name="engm")
