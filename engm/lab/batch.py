"""Runs of notebooks by papermill: checked parameters in, the notebook and its result out.

Papermill's own injection of values is not used: it takes any name and any value.
"""

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from engm.device import pick_device
from engm.errors import InputError
from engm.lab.parameters import blank, check, read_notebook, shown
from engm.lab.parameters import parameters as declared
from engm.report import tables
from engm.runs import environment, write_json, write_text

# without an estimate of the rest: cells take from nothing to hours
_BAR = {"bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} cells [{elapsed}]"}
RESULT_TYPE = "application/vnd.engm.result+json"
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class NotebookError:
    """Why a notebook stopped: name of an exception, what it says, and the first line of its cell.

    `cell` is the number that Jupyter shows beside it, as in `[3]`; None before the first.
    """

    cell: int | None
    source: str
    name: str
    value: str

    def __str__(self) -> str:
        """Where and why, in one line."""
        where = f"cell [{self.cell}] ({self.source})" if self.cell else "before the first cell"
        return f"{where}: {self.name}: {self.value.strip().partition(chr(10))[0]}"


@dataclass(frozen=True)
class NotebookRun:
    """One executed notebook, at `path`; its name is that without `.ipynb`.

    Attributes:
        error: Why it stopped, or None where every cell ran.
        result: What it handed to `publish`, or None.
        earlier: Where another notebook that was at `path` is kept: other parameters, or answers.
    """

    name: str
    path: Path
    seconds: float
    error: NotebookError | None = None
    result: dict[str, Any] | None = None
    earlier: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether every code cell was executed without an error."""
        return self.error is None


def kit(name: str) -> Path:
    """The folder `notebooks` or `results`: in the package as installed, beside it in a checkout."""
    return PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE.parent / name


def available() -> list[Path]:
    """The numbered notebooks (`00_tour.ipynb` and on) that a name can mean, sorted by name.

    Those in `./notebooks` come before those in what `kit` says.
    """
    folders = (kit("notebooks"), Path("notebooks"))
    found = {path.name: path for folder in folders for path in folder.glob("[0-9]*_*.ipynb")}
    return [found[name] for name in sorted(found)]


def find(name: str | Path) -> Path:
    """The notebook that `name` means: a path, or a name with or without `.ipynb`, such as 06."""
    for folder in (Path(), Path("notebooks"), kit("notebooks")):
        for path in (folder / name, folder / f"{name}.ipynb"):
            if path.suffix == ".ipynb" and path.is_file():
                return path
    begins = [path for path in available() if path.stem.startswith(f"{name}_")]
    if len(begins) == 1:
        return begins[0]
    names = ", ".join(path.stem for path in available())
    raise InputError(f"there is no notebook {str(name)!r}; take one of {names}, or a path")


def run(
    name: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    output_dir: Path,
    timeout: float | None = None,
    progress: bool = True,
) -> NotebookRun:
    """Executes a notebook in a fresh kernel of this very interpreter, and says how it went.

    The executed notebook is `output_dir/NAME.ipynb`, written as it goes; what it published is
    `output_dir/NAME.result.json`, with all parameters, versions and hardware under "run".
    A notebook that is there already, with other parameters or with answers of a learner, gets a
    number to its name, and so does its result; the same one is replaced.
    The kernel works in `output_dir`, so a notebook's own files land there. Done means that every
    code cell was executed: a cell with `sys.exit(0)` is a failure.

    Args:
        name: As for `find`.
        parameters: Values as for `check`; the notebook's defaults hold for the rest.
        output_dir: Where everything is written; made where it is missing.
        timeout: Seconds that the whole notebook may take; its kernel is killed after that.
        progress: Whether a bar counts the cells.

    Raises:
        InputError: If the notebook, a parameter, the timeout or the folder is wrong, or papermill
            is not installed. Nothing was run then.
    """
    try:
        import nbformat
        import papermill
        from nbclient.exceptions import CellControlSignal
    except ImportError:
        raise InputError('papermill is not installed: pip install "engm[batch]"') from None
    source = find(name)
    values = check(source, parameters) if parameters else {}
    if timeout is not None and not timeout > 0:
        raise InputError(f"timeout = {timeout} is not a number of seconds above 0")
    folder = Path(output_dir).resolve()
    path, result_path = folder / source.name, folder / f"{source.stem}.result.json"
    if path == source.resolve():
        raise InputError(f"output_dir = {folder} holds the notebook itself; take another folder")

    fresh = _fresh(read_notebook(source), values)
    earlier = _set_aside(path, result_path, fresh)
    result_path.unlink(missing_ok=True)
    write_text(path, nbformat.writes(fresh))
    template = str(path).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    started: list[int] = []
    began = time.monotonic()
    why: tuple[str, str] | None = None
    executed: Any = None
    try:
        executed = papermill.execute_notebook(
            template,
            template,
            engine_name="nbclient",
            kernel_name="python3",
            language="python",
            progress_bar=_BAR | {"desc": source.stem} if progress else False,
            start_timeout=120,
            iopub_timeout=60,
            kernel_manager_class=_kernel_manager(),
            resources={"metadata": {"path": str(folder)}},
            on_cell_execute=lambda cell, cell_index: started.append(cell_index),
            timeout_func=lambda cell: timeout and max(began + timeout - time.monotonic(), 0.01),
        )
    except papermill.PapermillExecutionError:
        pass  # the cell has it
    except (CellControlSignal, RuntimeError) as stopped:  # too late, or the kernel died
        late = timeout is not None and isinstance(stopped, TimeoutError)
        reason = f"not finished within {timeout:g} s" if late else str(stopped)
        why = (type(stopped).__name__, reason)
    finally:  # of Ctrl-C, too
        seconds = time.monotonic() - began
        notebook = read_notebook(path)
        # papermill adds cells that say that there was an error; the report says it better
        added = "papermill-error-cell-tag"
        notebook.cells = [cell for cell in notebook.cells if added not in cell.metadata.tags]
        notebook.metadata.pop("papermill", None)
        write_text(path, nbformat.writes(notebook))
    error = _error(notebook, started[-1] if started else None, *why) if why else None
    error = error or _unfinished(notebook)
    published = [] if error else shown(executed, RESULT_TYPE)  # its file has the keys sorted
    result = json.loads(json.dumps(published[-1])) if published else None
    if result is not None:
        defaults = {name: parameter.default for name, parameter in declared(source).items()}
        origin = {
            "notebook": source.stem,
            "parameters": defaults | {name: repr(value) for name, value in values.items()},
            "seconds": seconds,
            "environment": environment(pick_device("auto")),
        }
        write_json(result_path, {**result, "run": origin})
    return NotebookRun(source.stem, path, seconds, error, result, earlier)


def publish(result: dict[str, Any]) -> None:
    """Hands a notebook's result to whoever runs the notebook; the last call counts.

    `result["summary"]` is a list of flat dicts, the rows of a table, such as `{"quantity": "robust
    accuracy", "value": 0.67}`. `result["verdict"]`, where there is one, is a sentence. Whatever
    else JSON can hold may stand beside them.

    Raises:
        InputError: If `result` has another form, or holds what JSON cannot, nan and inf among it.
    """
    from IPython.display import display

    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"a result is of numbers that are finite, text, lists and dicts: {error}; use float(x) "
            "for a number of another library, and None where there is none"
        ) from None
    rows: Any = result.get("summary")
    verdict = result.get("verdict", "")
    flat = isinstance(rows, list) and all(
        isinstance(row, dict) and not any(isinstance(v, list | dict) for v in row.values())
        for row in rows
    )
    if not flat or not isinstance(verdict, str):
        raise InputError(
            'a result needs "summary", a list of flat dicts such as {"quantity": "lr", "value": '
            '0.1}, and a "verdict", if it has one, that is text'
        )
    table = tables.to_markdown(even(rows))
    shown = {
        RESULT_TYPE: result,
        "text/markdown": f"**{verdict}**\n\n{table}" if verdict else table,
        "text/plain": "\n".join([*(str(row) for row in rows), verdict]),
    }
    display(shown, raw=True)


def even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a result with the same columns in each, as tables want them."""
    blank = dict.fromkeys((key for row in rows for key in row), "")
    return [blank | {k: v for k, v in row.items() if v is not None} for row in rows]


def _fresh(notebook: Any, values: Mapping[str, Any]) -> Any:
    import nbformat

    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.tags]
    blank(notebook)
    if values:
        lines = ["# set for this run", *(f"{name} = {value!r}" for name, value in values.items())]
        cell = nbformat.v4.new_code_cell("\n".join(lines))
        cell.metadata.tags = ["injected-parameters"]
        tagged = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.tags]
        notebook.cells.insert(tagged[0] + 1, cell)
    return notebook


def _set_aside(path: Path, result_path: Path, fresh: Any) -> Path | None:
    try:
        cells = read_notebook(path).cells if path.exists() else fresh.cells
    except InputError:  # a kill may have cut it
        cells = []
    if [cell.source for cell in cells] == [cell.source for cell in fresh.cells]:
        return None
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    earlier = next(other for other in numbered if not other.exists())
    path.rename(earlier)
    if result_path.exists():
        result_path.rename(earlier.with_suffix(".result.json"))
    return earlier


def _kernel_manager() -> type:
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    # What a machine calls python3 may be another Python: start this one by its path, with the same
    # engm from whatever folder, and with figures in the notebook whatever MPLBACKEND says.
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    if data := os.environ.get("ENGM_DATA"):  # the kernel works in another folder
        env["ENGM_DATA"] = str(Path(data).expanduser().resolve())
    if (PACKAGE.parent / "pyproject.toml").is_file():
        others = os.environ.get("PYTHONPATH")
        env["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *([others] if others else [])])

    own = {**get_kernel_dict(), "env": env}
    own["argv"] = [sys.executable, *own["argv"][1:], "--log-level=CRITICAL"]

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(**own)

    return ThisInterpreter


def _unfinished(notebook: Any) -> NotebookError | None:
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and cell.source.strip():
            for output in cell.outputs:
                if output.output_type == "error":
                    return _error(notebook, index, output.ename, output.evalue)
            if cell.execution_count is None:
                return _error(notebook, index, "NotExecuted", "this cell was not run")
    return None


def _error(notebook: Any, index: int | None, name: str, value: str) -> NotebookError:
    value = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", value)  # colours, for a terminal
    if index is None:
        return NotebookError(None, "", name, value)
    above = [c for c in notebook.cells[: index + 1] if c.cell_type == "code" and c.source.strip()]
    first = notebook.cells[index].source.strip().partition("\n")[0]
    return NotebookError(len(above), first, name, value)
