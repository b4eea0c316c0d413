"""Checks the reader's answers to the exercises of the notebooks. It never raises."""

from typing import Any

import torch


def check(answer: Any, expected: Any, hint: str, *, tolerance: float = 1e-4) -> None:
    """Says whether an answer is right: `right`, `not yet` and a hint, or `not answered yet`.

    Args:
        answer: What the reader assigned; `None` is no answer.
        expected: The answer, as a number, text, a tensor or a sequence of numbers; or a function
            that takes the reader's answer and returns whether it is right.
        hint: What a wrong answer is met with.
        tolerance: How far numbers may be off, relative to the expected ones, or absolute near 0.
    """
    if answer is None:
        print("not answered yet")
        return
    try:
        good = expected(answer) if callable(expected) else _close(answer, expected, tolerance)
        good = bool(good)
    except Exception as error:  # an answer of any kind may be tried
        print(f"not yet: {hint} (your answer gave {type(error).__name__}: {error})")
        return
    print("right" if good else f"not yet: {hint}")


def _close(answer: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, bool | str):
        return type(answer) is type(expected) and answer == expected
    found, wanted = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (answer, expected))
    return found.shape == wanted.shape and torch.allclose(
        found, wanted, rtol=tolerance, atol=tolerance * 1e-2
    )
