"""The two errors that a user of the kit meets on purpose, and three checks that all rooms share."""

import math
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
