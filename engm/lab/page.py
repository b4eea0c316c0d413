"""The notebooks with what they computed, as one HTML file that opens from disk without a network.

Formulas are MathML, figures are embedded, there are no scripts: nothing is loaded from anywhere.
"""

import itertools
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from engm.errors import InputError
from engm.lab.batch import RESULT_TYPE, NotebookRun, available, even, run
from engm.lab.offline_html import code_style, exporter, offline, slug
from engm.lab.parameters import read_notebook
from engm.report import tables, verdicts
from engm.runs import write_text

_WIDGET_TYPE = "application/vnd.jupyter.widget-view+json"
_UNDESCRIBED = "No description has been provided for this image"  # what nbconvert puts too

# What the abstract claims; the notebooks that test it; the section whose first figure shows it.
_CLAIMS = {
    "C1": (
        "Gradients are larger and vary more in adversarial than in natural training.",
        ["02_gradient_variance"],
        "Over the epochs",
    ),
    "C2": (
        "MSGD converges more slowly the more its gradients vary; ENGM does not.",
        ["04_convergence"],
        "The measurement",
    ),
    "C3": (
        "The norm of an example's gradient can be told from its gradient w.r.t. the image.",
        ["05_norms_from_inputs"],
        "Along a training run",
    ),
    "C4": (
        "ENGM improves many methods of adversarial training.",
        ["06_cifar", "07_tiny_imagenet"],
        "ENGM against MSGD",
    ),
    "C5": (
        "ENGM lessens robust overfitting and the sensitivity to hyperparameters.",
        ["08_overfitting_and_sensitivity"],
        "What longer runs say",
    ),
}
_BADGES = {
    verdicts.HOLDS: ("good", "holds"),
    verdicts.DOES_NOT_HOLD: ("bad", "does not hold"),
    verdicts.NOT_SETTLED: ("open", "not settled"),
}


def demo(
    output_dir: Path, paths: Sequence[Path] | None = None, progress: bool = True
) -> list[NotebookRun]:
    """Runs notebooks one after another, whatever fails, and writes `output_dir/index.html`.

    Prints a line per notebook: how long it took and whether it went well, or which cell stopped
    it and why.

    Args:
        output_dir: For the executed notebooks, their results and files, and the report.
        paths: The notebooks; None for all the numbered ones.
        progress: Whether a bar counts the cells.

    Returns:
        What happened to each notebook; all went well if every one is `ok`.

    Raises:
        InputError: If there is no notebook.
    """
    paths = available() if paths is None else paths
    if not paths:
        raise InputError("there are no notebooks to run; run this in a checkout of the kit")
    runs = []
    for path in paths:
        runs.append(run(path, output_dir=output_dir, progress=progress))
        verdict = "ok" if runs[-1].ok else f"FAILED at {runs[-1].error}"
        print(f"{path.stem:<34}{runs[-1].seconds:7.1f} s  {verdict}", flush=True)
    print(f"report: {build(runs, Path(output_dir) / 'index.html')}", flush=True)
    return runs


def build(
    runs: Sequence[NotebookRun], path: Path, title: str = "ENGM, notebook by notebook"
) -> Path:
    """Writes the report on `runs` to `path`, one HTML file with everything in it.

    The first screen has the paper's claims that the notebooks test, each with its verdict and a
    figure. Then comes what each notebook found (`result["verdict"]` and the rows of
    `result["summary"]`) or why it failed; below stand the notebooks as they were executed.

    Warns:
        UserWarning: For a formula that has no MathML; its TeX is shown instead.
    """
    with_mathml = exporter()
    from jinja2 import Environment

    pages = {each.name: _Page(each, with_mathml) for each in runs}
    for page in pages.values():
        page.settle_links(pages)
    versions = [f"{name} {metadata.version(name)}" for name in ("engm", "torch")]
    python = f"Python {platform.python_version()}"
    files = resources.files("engm.lab")
    template = Environment(autoescape=True).from_string(
        files.joinpath("page.html").read_text("utf-8")
    )
    html = template.render(
        title=title,
        style=files.joinpath("page.css").read_text("utf-8") + code_style(),
        facts=[time.strftime("%Y-%m-%d %H:%M"), python, *versions, platform.machine()],
        failed=sum(not each.ok for each in runs),
        pages=list(pages.values()),
        claims=_claims(pages),
    )
    write_text(Path(path), html + "\n")
    return Path(path)


class _Page:
    """One executed notebook on its way to HTML; links are settled when all are there."""

    def __init__(self, run: NotebookRun, exporter: Any) -> None:
        self.run = run
        self.ids = {run.name}
        self.headings: list[tuple[int, str, str]] = []
        self.body = offline(exporter.from_notebook_node(_prepared(run))[0])
        for part in self.body.select(".prose, .output_markdown, .alert"):
            for tag in [part, *part.find_all(True)]:
                if "id" in tag.attrs:
                    tag["id"] = self._place(tag["id"])
        self.figures: list[tuple[str, str]] = []  # section and source
        for tag in self.body.select(".prose :is(h1, h2, h3, h4, h5, h6), .output img"):
            if tag.name != "img":
                level = min(int(tag.name[1]) + 1, 6)  # the page's own title is the h1
                text = tag.get_text(" ", strip=True)
                tag.name, tag["id"] = f"h{level}", self._place(text)
                self.headings.append((level, tag["id"], text))
                continue
            self.figures.append((self.section, tag.get("src", "")))
            if tag.get("alt") in (_UNDESCRIBED, None):
                tag["alt"] = f"Figure {len(self.figures)} of {run.name}, in “{self.section}”"
        for tag in self.body.select(".output pre, .output_html"):
            tag["tabindex"] = "0"  # what scrolls can be reached by keys

    def _place(self, text: str) -> str:
        name = f"{self.run.name}--{slug(text)}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        free = next(each for each in names if each not in self.ids)
        self.ids.add(free)
        return free

    @property
    def section(self) -> str:
        return self.headings[-1][2] if self.headings else self.run.name

    @property
    def title(self) -> str:
        return self.headings[0][2] if self.headings else self.run.name

    @property
    def sections(self) -> list[tuple[str, str]]:
        return [(place, text) for level, place, text in self.headings[1:] if level == 3]

    @property
    def error(self) -> str:
        place = f"{self.run.name}--error"
        return place if place in self.ids else self.run.name

    @property
    def result(self) -> str:
        return _result(self.run.result or {})

    def settle_links(self, pages: Mapping[str, "_Page"]) -> None:
        for link in self.body.find_all("a", href=True):
            file, _, fragment = unquote(link["href"]).partition("#")
            if re.match("https?:|mailto:", file):
                continue
            name = Path(file).stem if file.endswith(".ipynb") else "" if file else self.run.name
            if name in pages:
                place = f"{name}--{slug(fragment)}"
                link["href"] = f"#{place if place in pages[name].ids else name}"
            else:  # nothing else lies beside the report
                del link["href"]


def _claims(pages: Mapping[str, _Page]) -> list[dict[str, Any]]:
    """What the page says of each claim whose notebooks are there."""
    claims = []
    for name, (sentence, tests, section) in _CLAIMS.items():
        tested = [pages[each] for each in tests if each in pages]
        found = [verdicts.named_in((each.run.result or {}).get("verdict", "")) for each in tested]
        outcomes = [outcome for outcome in found if outcome]
        kind, badge = ("bad", "no verdict")
        if len(outcomes) == len(tested) and all(each.run.ok for each in tested):
            kind, badge = _BADGES[verdicts.of_all(outcomes)]
        figures = [source for each in tested for where, source in each.figures if section in where]
        figures += [each.figures[-1][1] for each in tested if each.figures]
        claim = {"name": name, "sentence": sentence, "kind": kind, "badge": badge}
        if tested:
            claims.append({**claim, "figure": next(iter(figures), ""), "pages": tested})
    return claims


def _prepared(run: NotebookRun) -> Any:
    """The notebook as the exporter wants it: cells with their numbers, widgets as pictures."""
    notebook = read_notebook(run.path)
    states = notebook.metadata.pop("widgets", {})
    widgets = states.get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    notebook.cells = [c for c in notebook.cells if c.cell_type != "code" or c.source.strip()]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        error = run.error if run.error and run.error.cell == number else None
        cell.metadata.number = number
        cell.metadata.stopped = f"{error.name}: {error.value}" if error else ""
        cell.metadata.alt = _UNDESCRIBED
        cell.outputs = list(_outputs(cell.outputs, widgets, run))
    return notebook


def _outputs(outputs: list[Any], widgets: Mapping[str, Any], run: NotebookRun) -> Iterator[Any]:
    for output in outputs:
        data = output.get("data", {})
        if RESULT_TYPE in data:
            yield _shown("text/html", _result(run.result or data[RESULT_TYPE]))
        elif _WIDGET_TYPE not in data:
            if output.get("text") is None or output.text.strip():
                yield output
        elif "%|" not in data.get("text/plain", ""):  # a progress bar has had its time
            shown = list(_widget(data[_WIDGET_TYPE]["model_id"], widgets, run))
            note = f"Interactive in the notebook{', where it starts like this:' if shown else '.'}"
            yield _shown("text/html", f'<p class="note">{note}</p>')
            yield from shown


def _widget(model_id: str, widgets: Mapping[str, Any], run: NotebookRun) -> Iterator[Any]:
    model = widgets.get(model_id, {})
    state = model.get("state", {})
    yield from _outputs(state.get("outputs", []), widgets, run)
    if model.get("model_name") == "ImageModel":
        for picture in model.get("buffers", []):
            yield _shown(f"image/{state.get('format', 'png')}", picture["data"])
    for child in state.get("children", []):
        yield from _widget(child.removeprefix("IPY_MODEL_"), widgets, run)


def _shown(kind: str, data: str) -> Any:
    from nbformat.v4 import new_output

    return new_output("display_data", data={kind: data})


def _result(result: Mapping[str, Any]) -> str:
    table = tables.to_html(even(result.get("summary") or []))
    verdict = f'<p class="verdict">{escape(result["verdict"])}</p>' if result.get("verdict") else ""
    return f'<div class="html" tabindex="0">{verdict}{table}</div>'
