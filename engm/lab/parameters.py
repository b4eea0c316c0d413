"""What a notebook lets its reader set, and the strict check of what was given.

Nothing runs until every value has the type that the notebook declares.
"""

import ast
import io
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Any, Literal, get_args, get_origin

from engm.config import TYPES, RunConfig
from engm.errors import InputError, meant
from engm.values import UNREADABLE, fit, literal, read

_KNOWN_TYPES = "int, float, bool, str, list, tuple, list[int], tuple[int, int], Literal, T | None"
_NAMES = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "tuple": tuple}


@dataclass(frozen=True)
class Parameter:
    """One line `name: type = default  # help` of the cell that is tagged `parameters`.

    The type may stand in a line of its own further up, `name: type`: papermill, when it is used by
    itself, does not understand `int | None` or `Literal["a", "b"]` in the line of the value, and
    says that the parameter is unknown. `type` and `default` are as they are written there, `kind`
    is the type itself.
    """

    name: str
    type: str
    default: str
    help: str
    kind: Any

    def __str__(self) -> str:
        """The line itself, as messages show it."""
        line = f"{self.name}: {self.type} = {self.default}"
        return f"{line}  # {self.help}" if self.help else line


def library() -> ModuleType:
    """Returns nbformat, or says how to install it."""
    try:
        import nbformat
    except ImportError:
        raise InputError('nbformat is not installed: pip install "engm[batch]"') from None
    return nbformat


def read_notebook(path: Path) -> Any:
    """The notebook at `path` as an nbformat node; every cell has `metadata.tags`."""
    nbformat = library()
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, UnicodeDecodeError, nbformat.reader.NotJSONError) as error:
        raise InputError(f"{path} is not a notebook that can be read: {error}") from None
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    return notebook


def blank(notebook: Any) -> None:
    """Takes outputs and counts out of a notebook."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def shown(notebook: Any, kind: str) -> list[Any]:
    """Returns what the cells of a notebook put out of a MIME type."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def parameters(path: Path) -> dict[str, Parameter]:
    """What can be set in a notebook, read from its cell tagged `parameters`.

    The cell is read as Python, not by papermill's pattern.

    Raises:
        InputError: If there is no such cell, or it has more than `name: type = value`, each value
            of its type.
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
        annotation: ast.expr | None = None
        match statement:
            case ast.Import() | ast.ImportFrom():  # Literal comes from typing
                continue
            case ast.AnnAssign(ast.Name(name), annotation, None):
                declared[name] = annotation
                continue
            case ast.AnnAssign(ast.Name(name), annotation, ast.expr() as value):
                pass
            case ast.Assign([ast.Name(name)], value):
                annotation = declared.pop(name, None)
            case _:
                raise InputError(
                    f"the parameters cell of {path} has the line {ast.unparse(statement)!r}; "
                    "write each parameter as `name: type = value  # help`"
                )
        try:
            default = literal(value)
            kind = type(default) if annotation is None else _kind(annotation)
            fit(default, kind)
        except UNREADABLE:
            raise InputError(
                f"in the parameters cell of {path}, {ast.unparse(statement)!r} is not a plain "
                f"value of a known type ({_KNOWN_TYPES})"
            ) from None
        help_text = comments.get(statement.end_lineno or 0, "")
        written = kind.__name__ if annotation is None else ast.unparse(annotation).strip("'")
        found[name] = Parameter(name, written, ast.unparse(value), help_text, kind)
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
    return _accept(path, values, fit)


def parse(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """The same for texts, each read by `engm.values.read`: `{"lr": "0.05", "eps": "8/255"}`."""
    return _accept(path, texts, read)


def check_ranges(values: Mapping[str, Any]) -> RunConfig:
    """Returns the run that these values describe; refuses what a run would, such as no epochs."""
    settings = {k: v for k, v in values.items() if k in TYPES and v is not None}
    return RunConfig.from_dict(settings).resolved()


def _accept(
    path: Path, given: Mapping[str, Any], taken: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    known = parameters(path)
    listing = f"{Path(path).stem} takes:\n" + "\n".join(f"  {each}" for each in known.values())
    accepted = {}
    for name, value in given.items():
        if name not in known:
            hint = meant(name, known) or ";"
            raise InputError(f"there is no parameter {name!r}{hint} {listing}")
        try:
            accepted[name] = taken(value, known[name].kind)
            ast.literal_eval(repr(accepted[name]))  # what an untyped list holds can be read back
        except UNREADABLE:
            what = f"{name} = {value!r} is not "
            if get_origin(known[name].kind) is Literal:
                options = [str(option) for option in get_args(known[name].kind)]
                one = f"one of {', '.join(options)}{meant(value, options) or ';'}"
                raise InputError(f"{what}{one} {listing}") from None
            raise InputError(f"{what}of type {known[name].type}; {listing}") from None
        if accepted[name] in ([], ()) and known[name].default not in ("[]", "()"):
            raise InputError(f"{name} = {value!r} is empty; give at least one value; {listing}")
        values = accepted[name] if isinstance(accepted[name], list) else []
        if name.endswith("seeds") and len(set(values)) < len(values):
            raise InputError(f"{name} = {values} counts a seed twice; give unlike ones")
    return accepted


def _kind(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str() as quoted):
            return _kind(ast.parse(quoted, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _kind(left) | _kind(right)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            values = options.elts if isinstance(options, ast.Tuple) else [options]
            return Literal[tuple(ast.literal_eval(value) for value in values)]
        case ast.Constant(value=dots) if dots is ...:  # the rest of tuple[int, ...]
            return dots
        case ast.Subscript(value=ast.Name(id="list" | "tuple" as name), slice=inner):
            kinds = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return GenericAlias(_NAMES[name], tuple(_kind(each) for each in kinds))
    raise ValueError(f"{ast.unparse(node)} is no type of a parameter")
