"""Many runs from one grid or plan, on processes of this machine or on a cluster."""

from engm.sweep.engine import Options, Outcome, folder_of, is_done, run
from engm.sweep.plan import TRAIN, Task, parse_grid, plan, read_plan

__all__ = [
    "TRAIN",
    "Options",
    "Outcome",
    "Task",
    "folder_of",
    "is_done",
    "parse_grid",
    "plan",
    "read_plan",
    "run",
]
