"""Fills in `notebooks/README.md`: for each notebook its time and a picture, from executed ones.

python notebook_map.py FOLDER     # of executed notebooks, such as outputs
"""

import base64
import io
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from engm.lab.parameters import read_notebook, shown
from engm.runs import write_bytes, write_text

# Which of a notebook's figures stands for it, where it is not the first.
_FIGURE = {
    **{"01_attacks": 1, "02_gradient_variance": 1},
    **{"07_tiny_imagenet": 3, "08_overfitting_and_sensitivity": 4},
}
_WIDTH, _COLOURS = 360, 128  # pixels; enough to recognise a figure by
_ROW = re.compile(r"\| \[[^\]]*\]\((\w+)\.ipynb\) \|")


def update(readme: Path, executed: Path) -> None:
    """Writes times and pictures of the notebooks in `executed` into the table of `readme`.

    A row is `| [title](NAME.ipynb) | what it does | time | picture |`. Its last two cells are
    replaced where `executed/NAME.ipynb` says how long its cells took (what `engm demo` and
    `jupyter execute` leave behind); the other rows stay. Pictures go to `pictures/NAME.png`
    beside `readme`.
    """
    lines = readme.read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        name = row[1] if (row := _ROW.match(line)) else ""
        if not (executed / f"{name}.ipynb").is_file():
            continue
        notebook = read_notebook(executed / f"{name}.ipynb")
        taken, figures = seconds(notebook), shown(notebook, "image/png")
        if taken is None or not figures:
            continue
        picture = f"pictures/{name}.png"
        figure = base64.b64decode(figures[min(_FIGURE.get(name, 0), len(figures) - 1)])
        write_bytes(readme.parent / picture, thumbnail(figure))
        title, purpose, *_ = line.split(" | ")
        link = f"[![a figure from it]({picture})]({name}.ipynb)"
        lines[index] = f"{title} | {purpose} | {taken:.0f} s | {link} |"
    write_text(readme, "\n".join(lines) + "\n")


def seconds(notebook: Any) -> float | None:
    """How long the cells of an executed notebook took, from the first to the last; None: unsaid."""
    moments = [
        datetime.fromisoformat(moment)
        for cell in notebook.cells
        for moment in cell.metadata.get("execution", {}).values()
    ]
    return (max(moments) - min(moments)).total_seconds() if moments else None


def thumbnail(png: bytes) -> bytes:
    """A small version of a PNG, in few colours."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        size = _WIDTH, round(image.height * _WIDTH / image.width)
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS).quantize(_COLOURS)
    file = io.BytesIO()
    small.save(file, format="png", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    update(Path("notebooks/README.md"), Path(sys.argv[1]))
