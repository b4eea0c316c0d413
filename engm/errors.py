"""What a user of the kit is told: two errors, a warning, and what all rooms say and check."""

import re
import sys
import warnings
from collections.abc import Collection
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


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
    if not is_number(value) or value < 0:
        raise InputError(f"{name} must be a number, 0 or more, as in {example}; got {value!r}")


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number, of Python or of another library."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value  # a whole one may be too large for a float
    return bool(abs(number) <= sys.float_info.max)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuses a value that is not one of `choices`."""
    if value not in choices:
        known = ", ".join(choices)
        raise InputError(f"unknown {name} {value!r}; choose one of {known}{meant(value, choices)}")


# what others call settings of the kit
_ELSEWHERE = {
    "learningrate": "lr",
    "wd": "weightdecay",
    "epsilon": "eps",
    "alpha": "stepsize",
    "steps": "numsteps",
    "arch": "model",
    "clip": "maxnorm",
}


def meant(word: object, known: Collection[str]) -> str:
    """Returns the question which of the known words was meant; empty where none is like it."""
    words = {_plain(each): each for each in known}
    plain = _ELSEWHERE.get(_plain(word), "")
    plain = plain if plain in words else _plain(word)
    close = [each for each in words if plain and each.startswith(plain)]
    close = close or get_close_matches(plain, words, n=1, cutoff=0.65)
    # such as seed in random_seed
    close = close or [part for part in re.split("[-_ ]", str(word).lower()) if part in words]
    return f"; did you mean {words[close[0]]}?" if close else ""


def offered(word: object, known: Collection[str], what: str) -> str:
    """Returns what follows a word that is not known: which was meant, and what there is."""
    return f"{meant(word, known) or ';'} {what} {', '.join(known)}"


def _plain(word: object) -> str:
    return re.sub("[-_ ]", "", str(word).lower())
