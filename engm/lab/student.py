"""A copy of the notebooks for a class: the exercises without their solutions, nothing run."""

from collections.abc import Sequence
from pathlib import Path

from engm.errors import InputError
from engm.lab.parameters import read_notebook
from engm.runs import write_text

_SOLUTION = "<details><summary>Solution</summary>"


def write_copies(paths: Sequence[Path], out: Path) -> list[Path]:
    """Writes notebooks without solutions, outputs and counts.

    Args:
        paths: The notebooks.
        out: The folder of the copies; it is made where it does not exist.

    Returns:
        The copies.

    Raises:
        InputError: Before anything is written, if one of the copies exists: it may hold answers.
    """
    import nbformat

    copies = [out / path.name for path in paths]
    if there := [copy.name for copy in copies if copy.exists()]:
        raise InputError(
            f"{out} has {', '.join(there)} already, perhaps with somebody's answers; choose "
            "another folder, or take them away"
        )
    for path, copy in zip(paths, copies, strict=True):
        notebook = read_notebook(path)
        notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith(_SOLUTION)]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_text(copy, nbformat.writes(notebook) + "\n")
    return copies
