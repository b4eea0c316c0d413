"""The notebooks with what they computed, as one HTML file that opens from disk without a network.

Formulas are MathML, figures are embedded, there are no scripts: nothing is loaded from anywhere.
"""

import base64
import importlib.metadata
import importlib.resources
import itertools
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from engm.errors import InputError
from engm.lab.batch import RESULT_TYPE, NotebookRun, available, check, find, run
from engm.lab.offline_html import code_style, highlighted, markdown, offline, plain_text, slug
from engm.lab.parameters import read_notebook
from engm.runs import write_text

_WIDGET_TYPE = "application/vnd.jupyter.widget-view+json"
_LONG = 20  # lines; longer code is folded, so that prose and pictures lead
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def demo(
    output_dir: Path,
    names: Sequence[str] | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    timeout: float | None = None,
    progress: bool = True,
) -> list[NotebookRun]:
    """Runs notebooks one after another, whatever fails, and writes `output_dir/index.html`.

    Prints a line per notebook: how long it took and whether it went well, or which cell stopped
    it and why.

    Args:
        output_dir: For the executed notebooks, their results and files, and the report.
        names: As for `notebooks.find`; None for all the numbered ones.
        parameters: For each notebook its values, `{"06_cifar": {"lr": 0.05}}`.
        timeout: Seconds that each notebook may take.
        progress: Whether a bar counts the cells.

    Returns:
        What happened to each notebook; all went well if every one is `ok`.

    Raises:
        InputError: If a notebook or a parameter is wrong. Nothing was run then.
    """
    paths = [find(name) for name in names] if names is not None else available()
    stems = [path.stem for path in paths]
    given = {Path(name).stem: values for name, values in (parameters or {}).items()}
    if not paths:
        raise InputError("there are no notebooks to run; give names or run this in a checkout")
    if len(set(stems)) < len(stems):
        raise InputError(f"two of the notebooks {', '.join(stems)} have one name; leave one out")
    if unknown := sorted(set(given) - set(stems)):
        raise InputError(f"parameters for {unknown[0]!r}, which is not among {', '.join(stems)}")
    for path in paths:
        if path.stem in given:
            check(path, given[path.stem])

    runs = []
    for path in paths:
        values = given.get(path.stem)
        runs.append(run(path, values, output_dir=output_dir, timeout=timeout, progress=progress))
        verdict = "ok" if runs[-1].ok else f"FAILED at {runs[-1].error}"
        print(f"{path.stem:<34}{runs[-1].seconds:7.1f} s  {verdict}", flush=True)
    print(f"report: {build(runs, Path(output_dir) / 'index.html')}", flush=True)
    return runs


def build(
    runs: Sequence[NotebookRun], path: Path, title: str = "ENGM, notebook by notebook"
) -> Path:
    """Writes the report on `runs` to `path`, one HTML file with everything in it.

    At the top stands what each notebook found (`result["verdict"]` and the rows of
    `result["summary"]`) or why it failed; below stand the notebooks as they were executed.

    Warns:
        UserWarning: For a formula that has no MathML; its TeX is shown instead.
    """
    pages = [_Page(each) for each in runs]
    articles = _linked(pages)
    failed = sum(not each.ok for each in runs)
    versions = [f"Python {platform.python_version()}", *map(_version, ("engm", "torch"))]
    facts = [time.strftime("%Y-%m-%d %H:%M"), *versions, platform.machine()]
    alert = f'<p class="alert">{failed} of {len(runs)} notebooks failed.</p>' if failed else ""
    style = importlib.resources.files("engm.lab").joinpath("page.css").read_text(encoding="utf-8")
    write_text(
        Path(path),
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{style}
{code_style()}
</style>
</head>
<body>
<nav aria-label="Contents"><details open><summary>Contents</summary>
<ul><li><a href="#top">Summary</a></li>{"".join(page.contents() for page in pages)}</ul>
</details></nav>
<main>
<header id="top"><h1>{escape(title)}</h1><p class="facts">{escape(" · ".join(facts))}</p>{alert}
<table class="summary"><thead><tr><th>Notebook</th><th>Status</th><th>Time</th></tr></thead>
{"".join(page.summary() for page in pages)}</table></header>
{articles}
</main>
</body>
</html>
""",
    )
    return Path(path)


class _Page:
    """One executed notebook on its way to HTML; links are settled when all are there."""

    def __init__(self, run: NotebookRun) -> None:
        notebook = read_notebook(run.path)
        states = notebook.metadata.get("widgets", {})
        self.run = run
        self.widgets = states.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
        self.ids = {run.name}
        self.headings: list[tuple[int, str, str]] = []
        self.figures = 0
        numbers = itertools.count(1)
        self.body = "".join(self._cell(cell, numbers) for cell in notebook.cells)

    @property
    def title(self) -> str:
        return self.headings[0][2] if self.headings else self.run.name

    def contents(self) -> str:
        sections = [(id_, text) for level, id_, text in self.headings[1:] if level == 3]
        inner = "".join(f'<li><a href="#{id_}">{escape(text)}</a></li>' for id_, text in sections)
        mark = "" if self.run.ok else ' <span class="bad">failed</span>'
        link = f'<a href="#{self.run.name}">{escape(self.title)}</a>{mark}'
        return f"<li>{link}{f'<ul>{inner}</ul>' if inner else ''}</li>"

    def summary(self) -> str:
        run = self.run
        status = '<span class="good">ok</span>' if run.ok else '<span class="bad">failed</span>'
        more = _result(run.result) if run.result else ""
        if run.error:
            where = f"#{run.name}--error" if f"{run.name}--error" in self.ids else f"#{run.name}"
            more = f'<p class="bad"><a href="{where}">{escape(str(run.error))}</a></p>'
        return (
            f'<tbody><tr><th scope="row"><a href="#{run.name}">{escape(self.title)}</a></th>'
            f"<td>{status}</td><td>{run.seconds:.0f} s</td></tr>"
            + (f'<tr><td colspan="3">{more}</td></tr>' if more else "")
            + "</tbody>"
        )

    def _cell(self, cell: Any, numbers: Iterable[int]) -> str:
        if cell.cell_type == "markdown":
            return self._markdown(cell.source, cell.get("attachments"))
        if cell.cell_type != "code" or not cell.source.strip():
            return ""
        number = next(iter(numbers))
        error = self.run.error if self.run.error and self.run.error.cell == number else None
        code = highlighted(cell.source)
        lines = cell.source.count("\n") + 1
        if lines > _LONG and not error:
            code = f"<details><summary>Code, {lines} lines</summary>{code}</details>"
        failure = ""
        if error:
            self.ids.add(f"{self.run.name}--error")
            failure = (
                f'<p class="alert" id="{self.run.name}--error">The notebook stopped at this cell. '
                f"{escape(error.name)}: {escape(error.value)}</p>"
            )
        ran = "" if cell.execution_count or error else " not-run"
        return (
            f'<section class="cell{ran}"><span class="number">[{number}]</span>{code}{failure}'
            f"{self._outputs(cell.outputs)}</section>"
        )

    def _outputs(self, outputs: list[Any]) -> str:
        html = ""
        for kind, group in itertools.groupby(outputs, lambda o: (o.output_type, o.get("name"))):
            if kind[0] == "stream":
                text = plain_text("".join(output.text for output in group))
                html += f'<pre class="{kind[1]}" tabindex="0">{escape(text)}</pre>' if text else ""
            elif kind[0] == "error":
                text = "\n".join(line for output in group for line in output.traceback)
                html += f'<pre class="error" tabindex="0">{escape(plain_text(text))}</pre>'
            else:
                html += "".join(self._display(output.data, output.metadata) for output in group)
        return html

    def _display(self, data: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
        text = data.get("text/plain", "")
        if RESULT_TYPE in data:
            return _result(self.run.result or data[RESULT_TYPE])
        for kind in ("image/png", "image/jpeg"):
            if kind in data:
                return self._image(kind, data[kind], metadata.get(kind, {}))
        if "image/svg+xml" in data:
            encoded = base64.b64encode(data["image/svg+xml"].encode()).decode()
            return self._image("image/svg+xml", encoded, {})
        if _WIDGET_TYPE in data:
            if "%|" in text:  # a progress bar that has had its time
                return ""
            shown = self._widget(data[_WIDGET_TYPE]["model_id"])
            note = f"Interactive in the notebook{', where it starts like this:' if shown else '.'}"
            return f'<div class="widget"><p class="note">{note}</p>{shown}</div>'
        if "text/html" in data:
            return f'<div class="html" tabindex="0">{offline(data["text/html"])}</div>'
        for kind in ("text/markdown", "text/latex"):
            if kind in data:
                return self._markdown(data[kind], None)
        return f'<pre tabindex="0">{escape(plain_text(text))}</pre>'

    def _widget(self, model_id: str) -> str:
        model = self.widgets.get(model_id, {})
        state = model.get("state", {})
        html = self._outputs(state.get("outputs", []))
        if model.get("model_name") == "ImageModel":
            for picture in model.get("buffers", []):
                html += self._image(f"image/{state.get('format', 'png')}", picture["data"], {})
        children = [child.removeprefix("IPY_MODEL_") for child in state.get("children", [])]
        return html + "".join(map(self._widget, children))

    def _image(self, kind: str, encoded: str, metadata: Mapping[str, Any]) -> str:
        self.figures += 1
        section = self.headings[-1][2] if self.headings else self.run.name
        alt = metadata.get("alt") or f"Figure {self.figures} of {self.run.name}, in “{section}”"
        width = f' width="{int(metadata["width"])}"' if "width" in metadata else ""
        data = "".join(encoded.split())
        return f'<img src="data:{kind};base64,{data}" alt="{escape(alt)}"{width}>'

    def _markdown(self, source: str, attachments: Any) -> str:
        soup = offline(markdown(source, attachments or {}))
        for tag in soup.find_all(id=True):
            tag["id"] = f"{self.run.name}--{slug(tag['id'])}"
            self.ids.add(tag["id"])
        for heading in soup.find_all(re.compile("^h[1-6]$")):
            level = min(int(heading.name[1]) + 1, 6)  # the page's own title is the h1
            text = heading.get_text(" ", strip=True)
            name = f"{self.run.name}--{slug(text)}"
            for number in itertools.count(2):
                if name not in self.ids:
                    break
                name = f"{self.run.name}--{slug(text)}-{number}"
            heading.name, heading["id"] = f"h{level}", name
            self.ids.add(name)
            self.headings.append((level, name, text))
        return f'<div class="prose">{soup}</div>'


def _linked(pages: Sequence[_Page]) -> str:
    ids = {page.run.name: page.ids for page in pages}
    articles = ""
    for page in pages:

        def settled(match: re.Match[str], own: str = page.run.name) -> str:
            target = unquote(match[2].replace("&amp;", "&"))
            file, _, fragment = target.partition("#")
            if re.match("https?:|mailto:", file):
                return match[0]
            name = Path(file).stem if file.endswith(".ipynb") else "" if file else own
            if name not in ids:  # nothing else lies beside the report
                return match[1]
            place = f"{name}--{slug(fragment)}"
            return f'{match[1]} href="#{place if place in ids[name] else name}"'

        body = re.sub(r'(<a\b[^>]*?) href="([^"]*)"', settled, page.body)
        articles += f'<article id="{page.run.name}">{body}</article>\n'
    return articles


def _result(result: Mapping[str, Any]) -> str:
    rows = result.get("summary") or []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ""
    for row in rows:
        cells = [row.get(column) for column in columns]
        texts = [f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells]
        lines += "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>" if rows else ""
    verdict = f'<p class="verdict">{escape(result["verdict"])}</p>' if result.get("verdict") else ""
    return f'<div class="html" tabindex="0">{verdict}{table}</div>'


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # run from a folder on PYTHONPATH
        return package
