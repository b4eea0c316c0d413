"""The norms of the examples' gradients: exact, by a loop, and estimated from the inputs."""

from engm.norms.layers import register_formula
from engm.norms.watch import Watch, loop_norms

__all__ = ["Watch", "loop_norms", "register_formula"]
