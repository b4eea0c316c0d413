"""The notebooks with what they computed, as one HTML file that opens from disk without a network.

Formulas are MathML, figures are embedded, there are no scripts: nothing is loaded from anywhere.
"""

import platform
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

from engm.errors import InputError
from engm.lab.batch import RESULT_TYPE, NotebookRun, available, even, run
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

# What latex2mathml 3.81 gets wrong without a word, and what it gets right instead.
_TEX = (
    (r"\\(begin|end)\{(?:align|aligned|gather|gathered|eqnarray)\*?\}", r"\\\1{align*}"),
    (r"(\\[bB]ig+[lrm]?)\s*(?:\\\||\\[lr]?Vert\b)", r"\1‖"),
    (r"\\operatorname\*?\{(\w+)(?:\\[,;: ]\s*(\w+))?\}", r"\\operatorname{\1\2}"),
    (r"\\mathbb\{1\}|\\mathbb\s*1", "𝟙"),
)
_UNDER = {"min", "max", "argmin", "argmax", "arg\u2009min", "arg\u2009max", "sup", "inf", "lim"}
_CHILDREN = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "mroot": 2}
_LOADING = ("src", "srcset", "poster", "data", "background", "action", "formaction")


def demo(output_dir: Path, paths: Sequence[Path] | None = None) -> list[NotebookRun]:
    """Runs notebooks one after another, whatever fails, and writes `output_dir/index.html`.

    Without `paths` they are all the numbered ones. Prints a line per notebook: how long it took
    and whether it went well, or which cell stopped it and why.
    """
    paths = available() if paths is None else paths
    if not paths:
        raise InputError("there are no notebooks to run; run this in a checkout of the kit")
    runs = []
    for number, path in enumerate(paths, start=1):
        runs.append(run(path, output_dir=output_dir))
        verdict = "ok" if runs[-1].ok else f"FAILED at {runs[-1].error}"
        took = f"{path.stem:<34}{runs[-1].seconds:7.1f} s"
        print(f"{took}  {number} of {len(paths)}  {verdict}", flush=True)
        if runs[-1].earlier is not None:
            print(f"another {path.name} was there; it is {runs[-1].earlier} now", flush=True)
    print(f"report: {build(runs, Path(output_dir) / 'index.html')}", flush=True)
    return runs


def build(runs: Sequence[NotebookRun], path: Path) -> Path:
    """Writes the report on `runs` to `path`, one HTML file with everything in it.

    The first screen has the paper's claims that the notebooks test, each with its verdict and a
    figure. Then comes what each notebook found (`result["verdict"]` and the rows of
    `result["summary"]`) or why it failed; below stand the notebooks as they were executed.

    Warns:
        UserWarning: For a formula that has no MathML; its TeX is shown instead.
    """
    with_mathml = _exporter()
    from jinja2 import Environment
    from pygments.formatters import HtmlFormatter

    pages = {each.name: _Page(each, with_mathml) for each in runs}
    for page in pages.values():
        page.settle_links(pages)
    versions = [f"{name} {metadata.version(name)}" for name in ("engm", "torch")]
    python = f"Python {platform.python_version()}"
    light, dark = (
        HtmlFormatter(style=style).get_style_defs(".highlight")
        for style in ("default", "github-dark")
    )
    html = (
        Environment(autoescape=True)
        .from_string(_text("page.html"))
        .render(
            title="ENGM, notebook by notebook",
            style=f"{_text('page.css')}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}",
            facts=[time.strftime("%Y-%m-%d %H:%M"), python, *versions, platform.machine()],
            failed=sum(not each.ok for each in runs),
            pages=list(pages.values()),
            claims=_claims(pages),
        )
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
        name = f"{self.run.name}--{_slug(text)}"
        while name in self.ids:
            name += "-again"
        self.ids.add(name)
        return name

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
                place = f"{name}--{_slug(fragment)}"
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


# --- pieces of a page that loads nothing


def _exporter() -> Any:
    """The exporter of nbconvert to the body of a page, with formulas as MathML.

    A code cell's number is `metadata.number`; `metadata.stopped` says why the notebook ended there.
    """
    try:
        from jinja2 import pass_context
        from nbconvert.exporters import HTMLExporter
        from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    except ImportError:
        raise InputError('nbconvert is not installed: pip install "engm[batch]"') from None

    class Formulas(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return formula(body, "block")

        def inline_math(self, body: str) -> str:
            return formula(body, "inline")

        def latex_environment(self, name: str, body: str) -> str:
            return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

        def block_html(self, html: str) -> str:  # Jupyter sets formulas in <summary> as well
            return re.sub(r"\$([^$<>]+)\$", lambda found: formula(found[1], "inline"), html)

    @pass_context
    def markdown(context: Any, source: str) -> str:
        attachments = context["cell"].get("attachments", {})
        renderer = Formulas(escape=False, attachments=attachments, exclude_anchor_links=True)
        return str(MarkdownWithMath(renderer=renderer).render(source))

    made = HTMLExporter(
        template_name="basic",
        raw_template=_text("cells.html"),
        filters={"markdown2html": markdown},
        preprocessors=["nbconvert.preprocessors.CoalesceStreamsPreprocessor"],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    kinds = ["image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown"]
    made.config.NbConvertBase.display_data_priority = [*kinds, "text/latex", "text/plain"]
    return made


def formula(tex: str, display: str) -> str:
    """MathML for `tex`, "block" or "inline"; with a warning the TeX itself, where there is none."""
    from latex2mathml.converter import convert

    plain = tex.strip()
    for pattern, better in _TEX:
        plain = re.sub(pattern, better, plain)
    try:
        mathml = ElementTree.fromstring(convert(plain, display=display))
        text = "".join(mathml.itertext())
        if left_over := re.search(r"\\(?:[A-Za-z]+|\S)", text):
            raise ValueError(f"{left_over[0]} is not known")
        for node in mathml.iter():
            name = node.tag = node.tag.rpartition("}")[2]  # HTML needs no namespace
            if len(node) != _CHILDREN.get(name, len(node)):
                raise ValueError(f"{name} has {len(node)} parts")
            if name == "mo" and node.text in ("|", "‖"):  # browsers space them as relations
                node.attrib.update(lspace="0", rspace="0")
            elif name == "mi" and node.text in ("~", ":"):  # these two are relations
                node.tag, node.text = "mo", node.text.replace("~", "∼")
            elif name == "msub" and display == "block" and "".join(node[0].itertext()) in _UNDER:
                node.tag = "munder"
    except Exception as error:  # every fault in a formula has its own class there
        warnings.warn(f"shown as TeX, not as a formula: {tex.strip()} ({error!r})", stacklevel=2)
        return f'<code class="tex">{escape(tex.strip())}</code>'
    html = ElementTree.tostring(mathml, encoding="unicode", short_empty_elements=False)
    return f'<span class="formula" tabindex="0">{html}</span>' if display == "block" else html


def offline(html: str) -> Any:
    """`html` as a BeautifulSoup tree without scripts, handlers and whatever would load something.

    Pictures that are not embedded are replaced by their alternative text. Links stay.
    """
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.find_all(["script", "link", "meta", "base", "iframe", "object", "embed"]):
        tag.decompose()
    for tag in soup.find_all(True):
        for name, value in list(tag.attrs.items()):
            text = " ".join(value) if isinstance(value, list) else str(value)
            loads = name in _LOADING and not text.startswith("data:")
            follows = name in ("href", "xlink:href") and tag.name != "a" and text[:1] != "#"
            if loads or follows or name.startswith("on") or (name == "style" and "url(" in text):
                del tag[name]
        if tag.name == "style" and re.search(r"url\(|@import", tag.get_text()):
            tag.decompose()
        elif tag.name == "img" and "src" not in tag.attrs:
            tag.replace_with(f"[picture: {tag.get('alt') or 'not part of the notebook'}]")
    return soup


def _text(name: str) -> str:
    return resources.files("engm.lab").joinpath(name).read_text("utf-8")


def _slug(text: str) -> str:
    """The name of a place in a page, from a heading or from a link to it."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")
