"""Tables as markdown, CSV, LaTeX and HTML. A table is a list of rows, a row maps columns to cells.

A cell is text, a number, nothing, or several numbers, such as a mean and its deviation: a person
reads those as `str(cell)`, and a CSV file gets a column for each of `cell.numbers()`, unrounded.
"""

import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

Row = Mapping[str, Any]


def text(cell: Any) -> str:
    """Returns a cell as text: of a fraction four digits, of a number above 1,000 the whole one."""
    if not isinstance(cell, float):
        return "none" if cell is None else str(cell)
    return f"{cell:.0f}" if 1000 <= abs(cell) < math.inf else f"{cell:.4g}"


def to_markdown(rows: Sequence[Row]) -> str:
    """Writes a markdown table; empty text for no rows."""
    return markdown(list(rows[0]), [row.values() for row in rows]) if rows else ""


def markdown(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Writes a markdown table whose columns may share names."""
    lines = [list(head), ["---"] * len(head)]
    lines += [[text(cell).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Writes comma-separated values, every number in a column of its own, unrounded.

    What a row does not have is left empty.
    """
    several = {name for row in rows for name, cell in row.items() if hasattr(cell, "numbers")}
    flat = [_flat(row, several) for row in rows]
    return _frame(flat).to_csv(index=False, lineterminator="\n") if rows else ""


def to_latex(rows: Sequence[Row]) -> str:
    r"""Writes a `tabular` to be put in with `\input`, below a comment with what all rows share.

    Where graphicx is loaded, a table that is wider than the line is made smaller until it fits.
    """
    if not rows:
        return ""
    alike, rows = without_columns_alike(rows)
    kinds = "".join("r" if _is_number(cell) else "l" for cell in rows[0].values())
    cells = [{_latex(name): _latex(text(cell)) for name, cell in row.items()} for row in rows]
    rules = [{"selector": f"{at}rule", "props": ":hline;"} for at in ("top", "mid", "bottom")]
    styled = _frame(cells).style.hide(axis="index").set_table_styles(rules)
    return _LATEX_TABLE.format(
        alike=f"% {alike}\n" if alike else "", tabular=styled.to_latex(column_format=kinds)
    )


def to_html(rows: Sequence[Row]) -> str:
    """Writes a `<table>` without style, below a line with what is the same in all rows."""
    if not rows:
        return ""
    alike, rows = without_columns_alike(rows)
    texts = [{name: text(cell) for name, cell in row.items()} for row in rows]
    table = _frame(texts).to_html(index=False, border=0, justify="unset")
    return (f"<p>{escape(alike)}</p>\n" if alike else "") + f"{table}\n"


def without_columns_alike(rows: Sequence[Row]) -> tuple[str, list[dict[str, Any]]]:
    """Takes the columns out that say the same in all of several rows, so that tables fit a page.

    Returns what they say, in words, and the rest. What was measured stays, and the last column: the
    table comes to it.
    """
    measured = {name for row in rows for name, cell in row.items() if hasattr(cell, "numbers")}
    names = [n for n in list(rows[0])[:-1] if n not in measured] if len(rows) > 1 else []
    texts = {name: {text(row[name]) for row in rows} for name in names}
    alike = {name: found.pop() or "empty" for name, found in texts.items() if len(found) == 1}
    words = "; ".join(f"{name} {value}" for name, value in alike.items())
    rest = [{name: cell for name, cell in row.items() if name not in alike} for row in rows]
    return (f"in all rows: {words}" if alike else ""), rest


def page(title: str, parts: Sequence[tuple[str, str]], figures: Mapping[str, bytes]) -> str:
    """Writes an HTML page that loads nothing: parts with headings, PNG files with captions."""
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
table { border-collapse: collapse; border: 0; font-size: 0.8125rem; }
th, td { padding: 0.25rem 0.4rem; border-bottom: 1px solid #d8dee4; text-align: left; }
th { vertical-align: bottom; border-bottom: 2px solid #59636e; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
td:last-child { white-space: normal; min-width: 6rem; }
th:last-child, td:last-child { position: sticky; right: 0; background: #fff; }
figure { margin: 2rem 0; }
img { max-width: 100%; }
"""

_LATEX_TABLE = r"""{alike}\setbox2=\hbox{{%
{tabular}}}%
\ifdefined\resizebox\ifdim\wd2>\linewidth\noindent\resizebox{{\linewidth}}{{!}}{{\box2}}\fi\fi
\ifvoid2\else\leavevmode\box2\fi
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
    return (isinstance(cell, int | float) or hasattr(cell, "numbers")) and not isinstance(
        cell, bool
    )


def _frame(rows: Sequence[Row]) -> "pandas.DataFrame":
    import pandas

    return pandas.DataFrame(rows, dtype=object)  # a whole number stays one beside an empty cell


def _flat(row: Row, several: set[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, cell in row.items():
        if hasattr(cell, "numbers"):
            flat |= {f"{name} {part}": value for part, value in cell.numbers().items()}
        elif name not in several:
            flat[name] = cell
    return flat
