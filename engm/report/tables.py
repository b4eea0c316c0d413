"""Tables as markdown, CSV, LaTeX and HTML. A table is a list of rows, a row maps columns to cells.

A cell is text, a number, nothing, or something of several numbers (`Cell`), which a person reads as
`str(cell)` and a CSV file gets as a column each, in full precision.
"""

import csv
import io
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, Protocol, runtime_checkable

Row = Mapping[str, Any]


@runtime_checkable
class Cell(Protocol):
    """Several numbers in one cell, such as a mean and its deviation."""

    def numbers(self) -> Mapping[str, float | None]:
        """Returns them under what is added to the name of the column."""
        ...


def to_markdown(rows: Sequence[Row]) -> str:
    """Writes a markdown table; empty text for no rows."""
    return markdown(list(rows[0]), [row.values() for row in rows]) if rows else ""


def markdown(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Writes a markdown table whose columns may share names.

    Args:
        head: Of each column.
        rows: Their cells.
    """
    lines = [list(head), ["---"] * len(head)]
    lines += [[_text(cell).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Writes comma-separated values, every number in a column of its own, unrounded.

    Accuracies are fractions there, as in the code. What a row does not have is left empty.
    """
    several = {name for row in rows for name, cell in row.items() if isinstance(cell, Cell)}
    flat = [_flat(row, several) for row in rows]
    columns = dict.fromkeys(name for row in flat for name in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
    if flat:
        writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def to_latex(rows: Sequence[Row]) -> str:
    r"""Writes a plain `tabular` that needs no package, to be put in with `\input`."""
    if not rows:
        return ""
    kinds = ["r" if _is_number(cell) else "l" for cell in rows[0].values()]
    lines = [[_latex(name) for name in rows[0]]]
    lines += [[_latex(_text(cell)) for cell in row.values()] for row in rows]
    body = [" & ".join(line) + r" \\" for line in lines]
    begin = rf"\begin{{tabular}}{{{''.join(kinds)}}}"
    return "\n".join([begin, r"\hline", body[0], r"\hline", *body[1:], r"\hline"]) + (
        "\n\\end{tabular}\n"
    )


def to_html(rows: Sequence[Row]) -> str:
    """Writes a `<table>`, without style."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in rows[0])
    lines = []
    for row in rows:
        cells = [
            f"<td{' class=number' * _is_number(cell)}>{escape(_text(cell))}</td>"
            for cell in row.values()
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(
        ["<table>", f"<thead><tr>{head}</tr></thead>", "<tbody>", *lines, "</tbody></table>\n"]
    )


def page(title: str, parts: Sequence[tuple[str, str]], figures: Mapping[str, bytes]) -> str:
    """Writes an HTML page that loads nothing.

    Args:
        title: What it is about.
        parts: Heading and HTML of each part.
        figures: PNG files under their captions, put into the page itself.
    """
    body = [f"<h2>{escape(heading)}</h2>\n<div class=wide>{html}</div>" for heading, html in parts]
    for caption, png in figures.items():
        data, text = b64encode(png).decode(), escape(caption)
        body.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


FORMATS: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "markdown": (".md", to_markdown),
    "csv": (".csv", to_csv),
    "latex": (".tex", to_latex),
    "html": (".html", to_html),
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2128; background: #fff; margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #d8dee4; text-align: left; }
th { vertical-align: bottom; border-bottom: 2px solid #59636e; }
td { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 2rem 0; }
img { max-width: 100%; }
"""

_LATEX = {
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "<": "$<$", ">": "$>$", "|": "$|$", "[": "{[}", "*": "{*}", "\n": " "},
}


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(sign, sign) for sign in text)
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)  # a minus, not a hyphen


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float | Cell) and not isinstance(cell, bool)


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _flat(row: Row, several: set[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, cell in row.items():
        if isinstance(cell, Cell):
            flat |= {f"{name} {part}": value for part, value in cell.numbers().items()}
        elif name not in several:
            flat[name] = cell
    return flat
