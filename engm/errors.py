"""What a user of the kit is told: two errors, a warning, and three checks that all rooms share."""

import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real


class InputError(ValueError):
    """A value, file or folder from outside is wrong; the message says what to do instead.

    The command line prints the message alone. Anything else that escapes is a fault of the kit
    and keeps its traceback.
    """


class NonFiniteLossError(FloatingPointError):
    """A loss is inf or nan; the step that would have followed was not taken.

    Attributes:
        steps_ago: How many steps, the failed one among them, were asked for and not taken before
            this was known: 0 on the CPU, some on a GPU, which the host does not wait for.
    """

    steps_ago = 0


def warn(message: str) -> None:
    """Warns at the line that called the optimizer, outside of it and of torch."""
    inside = ("engm.errors", "engm.optim", "engm.norms", "torch.")
    level, frame = 1, sys._getframe()
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_count(name: str, value: int, low: int = 1, high: int | None = None) -> int:
    """Returns a whole number as an `int`; refuses all else, and what is not in low to high."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"{low} to {high}"
        raise InputError(f"{name} must be a whole number, {limits}; got {value!r}")
    return int(value)


def check_number(name: str, value: float, example: str) -> None:
    """Refuses what is not a finite number, 0 or more."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise InputError(f"{name} must be a number, 0 or more, as in {example}; got {value!r}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a value that is not one of `choices`."""
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
