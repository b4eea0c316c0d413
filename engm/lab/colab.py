"""Makes notebooks open in Google Colab from the user's own repository: a badge and a first cell."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engm.errors import InputError
from engm.lab.parameters import library, read_notebook
from engm.runs import write_text

_TAG = "colab"
_BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repo}/blob/{branch}/notebooks/{name})"
)
_CELL = """\
# Off Colab this cell does nothing. There it installs the kit and looks for a GPU. With
# keep_on_drive, runs and data lie in your Google Drive, and are found there after a disconnect.
import os
import subprocess
import sys

keep_on_drive = False  # @param {{type: "boolean"}}

if "google.colab" in sys.modules:
    kit = "/content/engm-kit"
    if not os.path.exists(kit):
        url = "https://github.com/{repo}"
        branch = "{branch}"
        subprocess.run(["git", "clone", "--depth=1", "--branch", branch, url, kit], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", kit], check=True)
    if keep_on_drive:
        from google.colab import drive

        drive.mount("/content/drive")
        home = "/content/drive/MyDrive/engm"
        os.makedirs(home, exist_ok=True)
        os.chdir(home)
        os.environ["ENGM_DATA"] = f"{{home}}/data"
        print('Where a parameter is called out, set it to "runs" to keep and resume runs in', home)

    import torch

    if torch.cuda.is_available():
        print("GPU:", torch.cuda.get_device_name())
    else:
        print("No GPU: the digits need none. For more, choose Runtime > Change runtime type.")
    print("Other data: !engm prepare cifar10")"""


def stamp(paths: Sequence[Path], repo: str, branch: str = "main") -> list[Path]:
    """Puts a Colab badge and a first cell behind the title of notebooks, or replaces them.

    The cell does nothing off Colab. Other cells keep their outputs; if all were executed, they are
    counted anew, as if the cell had been executed with them.

    Args:
        paths: The notebooks, which lie in the folder `notebooks` of the repository.
        repo: `owner/name` on GitHub; it has to be public for Colab to open it.
        branch: The branch that Colab reads.

    Returns:
        Those that changed.

    Raises:
        InputError: If a name or a notebook is wrong; nothing was written then.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}", repo):
        raise InputError(f"{repo!r} is no GitHub repository; write owner/name, without an address")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._/-]*", branch) or ".." in branch:
        raise InputError(f"{branch!r} is no name of a branch; write one such as main")
    return _rewrite(paths, repo, branch)


def remove(paths: Sequence[Path]) -> list[Path]:
    """Takes what `stamp` put into notebooks out again; returns those that changed."""
    return _rewrite(paths, None, "")


def _rewrite(paths: Sequence[Path], repo: str | None, branch: str) -> list[Path]:
    nbformat = library()
    from nbformat.v4 import new_code_cell, new_markdown_cell

    changed = {}
    for path in paths:
        notebook = read_notebook(path)
        before = nbformat.writes(read_notebook(path))
        notebook.cells = [cell for cell in notebook.cells if _TAG not in cell.metadata.tags]
        if repo is not None:
            values = dict(repo=repo, branch=branch, name=path.name)
            tags = {"tags": [_TAG]}
            notebook.cells[1:1] = [
                new_markdown_cell(_BADGE.format(**values), id="colab-badge", metadata=tags),
                new_code_cell(_CELL.format(**values), id="colab-cell", metadata=tags),
            ]
        _count(notebook)
        if nbformat.writes(notebook) != before:
            for cell in notebook.cells:
                if not cell.metadata.tags:
                    del cell.metadata["tags"]  # read_notebook gave every cell some
            changed[path] = nbformat.writes(notebook) + "\n"
    for path, text in changed.items():
        write_text(path, text)
    return list(changed)


def _count(notebook: Any) -> None:
    """Counts the cells anew where all were executed, as if the new one had been as well."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(cell.execution_count is None for cell in code if _TAG not in cell.metadata.tags):
        return
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
