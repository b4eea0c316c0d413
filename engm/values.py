"""Values of settings and of notebook parameters: one reader of text, one check of types."""

import ast
import math
import numbers
import sys
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {"true": True, "false": False, "none": None}
# what Python's own parser raises where text is no value
UNREADABLE = (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError)


def read(text: str, kind: Any) -> Any:
    """Reads a value from text: `0.05`, `8/255`, `[0, 1]`, `true`, `none`, a word.

    Args:
        text: Python's literals, fractions, and true, false and none in any case; or text that
            stands for itself, where `kind` takes it.
        kind: A type as for `fit`.

    Raises:
        ValueError: If the text is no value of that type.
    """
    for each in (kind, *get_args(kind)):
        if get_origin(each) is Literal and text in get_args(each):
            return text  # "none" where that is a word
    if kind is not str:
        with suppress(*UNREADABLE):
            plain = text.strip()
            known = plain.lower() in _WORDS
            value = _WORDS[plain.lower()] if known else literal(ast.parse(plain, mode="eval").body)
            return fit(value, kind)
    return fit(text, kind)


def literal(node: ast.expr) -> Any:
    """Returns the value of a Python literal, in which numbers may be divided.

    Raises:
        ValueError: If it is none, among others that Python's parser has.
    """
    match node:
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return ast.literal_eval(left) / ast.literal_eval(right)
        case ast.List(elts=items):
            return [literal(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(literal(item) for item in items)
    return ast.literal_eval(node)


def fit(value: Any, kind: Any) -> Any:
    """Returns `value` as a value of type `kind`: a whole number becomes a float, no more than that.

    Args:
        value: Any value.
        kind: `int`, `float`, `bool`, `str`, `None`, `list`, `tuple`, also with types of the items,
            `Literal`, or a union of them. Numbers of other libraries count as Python's.

    Raises:
        ValueError: If it is of another type, or a number that is not finite.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if origin in (Union, UnionType):
        for each in inner:
            with suppress(ValueError):
                return fit(value, each)
    elif origin is Literal:
        for option in inner:
            if type(option) is type(value) and option == value:
                return value
    elif origin in (None, NoneType) and value is None:
        return None
    elif origin in (bool, str) and isinstance(value, origin):
        return value
    elif origin is int and number and isinstance(value, numbers.Integral):
        if abs(int(value)) <= sys.maxsize:
            return int(value)
    elif origin is float and number:
        with suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        if origin is list or inner[-1:] == (...,):
            inner = inner[:1] * len(value)
        if get_args(kind):
            value = [fit(item, each) for item, each in zip(value, inner, strict=True)]
        return origin(value)
    raise ValueError(f"{value!r} is not of type {kind}")
