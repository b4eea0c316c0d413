"""Grids of runs and notebooks: a plan, its tasks, and the workers that run them."""

from engm.sweep.running import Options, Outcome, check, folder_of, is_done, run, superseded

__all__ = ["Options", "Outcome", "check", "folder_of", "is_done", "run", "superseded"]
