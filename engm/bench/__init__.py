"""What ENGM costs, as ratios to MSGD measured side by side in one run."""

from engm.bench.outer_step import run

__all__ = ["run"]
