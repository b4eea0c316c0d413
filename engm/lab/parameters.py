"""What a notebook lets its reader set, and the strict check of what was given.

papermill takes any name and any value: an unknown one is logged and lost, `lr="abc"` is accepted.
Here nothing runs until every value has the type that the notebook declares.
"""

import ast
import io
import numbers
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engm.errors import InputError

_KNOWN_TYPES = "int, float, bool, str, list, tuple, list[int], tuple[int, int], Literal, T | None"
_NOT_A_VALUE = (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError)


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = default  # help` of the cell that is tagged `parameters`.

    The type may stand in a line of its own further up, `name: type`: papermill, when it is used by
    itself, does not understand `int | None` or `Literal["a", "b"]` in the line of the value, and
    says that the parameter is unknown.
    """

    name: str
    type: str
    default: str
    help: str

    def __str__(self) -> str:
        """The line itself, as messages show it."""
        return f"{self.name}: {self.type} = {self.default}" + f"  # {self.help}" * bool(self.help)


def read_notebook(path: Path) -> Any:
    """The notebook at `path` as an nbformat node; every cell has `metadata.tags`.

    Raises:
        InputError: If it cannot be read, or nbformat is not installed.
    """
    try:
        import nbformat
    except ImportError:
        raise InputError('nbformat is not installed: pip install "engm[batch]"') from None
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, UnicodeDecodeError, nbformat.reader.NotJSONError) as error:
        raise InputError(f"{path} is not a notebook that can be read: {error}") from None
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    return notebook


def parameters(path: Path) -> dict[str, Parameter]:
    """What can be set in a notebook, read from its cell tagged `parameters`.

    The cell is read as Python, not by papermill's pattern.

    Raises:
        InputError: If no cell has that tag, if a line is not `name: type = value`, if a type has no
            value, or if a default is not of its own type.
    """
    cells = [cell for cell in read_notebook(path).cells if "parameters" in cell.metadata.tags]
    if not cells:
        raise InputError(f"{path} has no cell tagged 'parameters'; tag the one that sets them")
    source = cells[0].source
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise InputError(f"the parameters cell of {path} is not Python: {error}") from None
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}

    found = {}
    declared: dict[str, ast.expr] = {}
    for statement in statements:
        kind: ast.expr | None = None
        match statement:
            case ast.Import() | ast.ImportFrom():  # Literal comes from typing
                continue
            case ast.AnnAssign(ast.Name(name), kind, None):
                declared[name] = kind
                continue
            case ast.AnnAssign(ast.Name(name), kind, ast.expr() as value):
                pass
            case ast.Assign([ast.Name(name)], value):
                kind = declared.pop(name, None)
            case _:
                raise InputError(
                    f"the parameters cell of {path} has the line {ast.unparse(statement)!r}; "
                    "write each parameter as `name: type = value  # help`"
                )
        try:
            default = _literal(value)
            if isinstance(kind, ast.Constant) and isinstance(kind.value, str):  # x: "int" = 1
                kind = ast.parse(kind.value, mode="eval").body
            kind = kind or ast.Name(id=type(default).__name__)
            _fit(default, kind)
        except _NOT_A_VALUE:
            raise InputError(
                f"in the parameters cell of {path}, {ast.unparse(statement)!r} is not a plain "
                f"value of a known type ({_KNOWN_TYPES})"
            ) from None
        help_text = comments.get(statement.end_lineno or 0, "")
        found[name] = Parameter(name, ast.unparse(kind), ast.unparse(value), help_text)
    if declared:
        raise InputError(
            f"the parameters cell of {path} gives {', '.join(declared)} a type and no value"
        )
    return found


def check(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Python values for a notebook's parameters, each of its declared type.

    An int becomes a float where a float is asked for; nothing else is converted.

    Raises:
        InputError: On an unknown name or a value of another type; the message lists what there is.
    """
    return _accept(path, values, lambda value, _: iter([value]))


def parse(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """Values from the command line: `{"lr": "0.05", "eps": "8/255", "seeds": "[0, 1]"}`.

    Each text is read by the parameter's type: Python literals, `true`, `false` and `none` in any
    case, and fractions.

    Raises:
        InputError: As for `check`.
    """
    return _accept(path, texts, _readings)


def _accept(
    path: Path, given: Mapping[str, Any], readings: Callable[[Any, ast.expr], Iterator[Any]]
) -> dict[str, Any]:
    known = parameters(path)
    listing = f"{Path(path).stem} takes:\n" + "\n".join(f"  {each}" for each in known.values())
    accepted = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"there is no parameter {name!r}; {listing}")
        kind = ast.parse(known[name].type, mode="eval").body
        for reading in readings(value, kind):
            try:
                accepted[name] = _fit(reading, kind)
                ast.literal_eval(repr(accepted[name]))  # nan and objects cannot be read back
                break
            except _NOT_A_VALUE:
                continue
        else:
            raise InputError(f"{name} = {value!r} is not of type {known[name].type}; {listing}")
    return accepted


def _readings(text: str, kind: ast.expr) -> Iterator[Any]:
    if not (isinstance(kind, ast.Name) and kind.id == "str"):
        words = {"true": True, "false": False, "none": None}
        with suppress(*_NOT_A_VALUE):
            plain = text.strip()
            known = plain.lower() in words
            yield words[plain.lower()] if known else _literal(ast.parse(plain, mode="eval").body)
    yield text


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _literal(left) / _literal(right)
        case ast.List(elts=items):
            return [_literal(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_literal(item) for item in items)
    return ast.literal_eval(node)


def _fit(value: Any, kind: ast.expr) -> Any:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_sequence = isinstance(value, list | tuple)
    match kind:
        case ast.Constant(value=None) | ast.Name(id="NoneType") if value is None:
            return None
        case ast.Name(id="bool") if isinstance(value, bool):
            return value
        case ast.Name(id="str") if isinstance(value, str):
            return value
        case ast.Name(id="int") if is_number and isinstance(value, numbers.Integral):
            return int(value)
        case ast.Name(id="float") if is_number:
            return float(value)
        case ast.Name(id="list" | "tuple" as name) if is_sequence:
            return list(value) if name == "list" else tuple(value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            try:
                return _fit(value, left)
            except ValueError:
                return _fit(value, right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            for option in options.elts if isinstance(options, ast.Tuple) else [options]:
                allowed = ast.literal_eval(option)
                if type(allowed) is type(value) and allowed == value:
                    return value
        case ast.Subscript(value=ast.Name(id="list" | "tuple" as name), slice=inner) if is_sequence:
            kinds = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if name == "list" or ast.unparse(kinds[-1]) == "...":
                kinds = kinds[:1] * len(value)
            items = [_fit(item, each) for item, each in zip(value, kinds, strict=True)]
            return items if name == "list" else tuple(items)
    raise ValueError(f"{value!r} is not of type {ast.unparse(kind)}")
