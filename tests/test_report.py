import base64
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from engm.errors import InputError
from engm.lab import page as report
from engm.lab.batch import RESULT_TYPE, NotebookError, NotebookRun

PNG = base64.b64encode(b"\x89PNG not a real picture").decode()
WIDGET = "application/vnd.jupyter.widget-view+json"
PROSE = r"""# The first notebook

Link to [the other](01_second.ipynb), [its part](01_second.ipynb#A-part), [a part it lacks](
01_second.ipynb#Nowhere), [below](#A-part), [a place](#here), [no notebook](09_none.ipynb),
[code](../engm/optim.py), [the paper](https://arxiv.org/abs/2209.01199).

$$\min_\theta \max_{\|\delta\|_\infty \le \varepsilon} \ell(x + \delta)$$

| quantity | meaning |
|---|---|
| $w_i$ | weight |

<a id="here"></a>

<details><summary>Solution with $f$</summary>

At most $\frac{1}{f}$.

</details>

## A part

## A part
"""
NASTY = """<table><tr><td>0.67</td></tr></table><script src="https://example.org/a.js">evil()</script>
<img src="https://example.org/a.png" alt="a curve" onerror="evil()"><iframe src="//example.org">
</iframe><p style="background: url(https://example.org/b.png)" onclick="evil()">kept</p>
<style>@import "https://example.org/a.css";</style><link rel="stylesheet" href="https://x.org/c">
<svg><image href="https://example.org/d.png"/></svg><video poster="https://example.org/e.png"/>
<a href="javascript:evil()">unlinked</a>"""


class Reader(HTMLParser):
    """What a browser would see: tags with their attributes, ids, text, and where links lead."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.links: dict[str, str | None] = {}
        self.open_link: str | None = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "a":
            self.open_link = dict(attrs).get("href")

    def handle_data(self, data):
        self.text += data
        if self.get_starttag_text() and self.get_starttag_text().startswith("<a"):
            self.links.setdefault(data, self.open_link)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def code(source, *outputs, count=1):
    cell = nbformat.v4.new_code_cell(source, execution_count=count)
    cell.outputs = list(outputs)
    return cell


def shown(data, **metadata):
    return nbformat.v4.new_output("display_data", data=data, metadata=metadata)


def printed(text, name="stdout"):
    return nbformat.v4.new_output("stream", text=text, name=name)


def save(path: Path, *cells, **metadata) -> Path:
    tidy = [nbformat.v4.new_markdown_cell(c) if isinstance(c, str) else c for c in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=tidy, metadata=metadata), path)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Reader:
    folder = tmp_path_factory.mktemp("report")
    widgets = {
        "box": {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_o", "IPY_MODEL_i"]}},
        "o": {"model_name": "OutputModel", "state": {"outputs": [printed("captured\n")]}},
        "i": {"model_name": "ImageModel", "state": {"format": "png"}, "buffers": [{"data": PNG}]},
    }
    result = {
        "summary": [{"optimizer": "MSGD", "robust": 0.6712345}, {"optimizer": "ENGM <b>", "n": 3}],
        "verdict": "Holds & stands.",
    }
    first = save(
        folder / "00_first.ipynb",
        PROSE,
        code("plot()", shown({"image/png": PNG, "text/plain": "<Figure>"})),
        code("plot(2)", shown({"image/png": PNG}, **{"image/png": {"alt": 'A "curve"'}})),
        code("\n".join(f"x{i} = {i}" for i in range(40)), printed("a\n"), printed("b <i>\n")),
        code("table()", shown({"text/html": NASTY, "text/plain": "no"})),
        code("slider", shown({WIDGET: {"model_id": "box"}, "text/plain": "VBox(children=())"})),
        code("tqdm", shown({WIDGET: {"model_id": "bar"}, "text/plain": "  0%|      | 0/3"})),
        code("publish()", shown({RESULT_TYPE: result, "text/plain": "plain"})),
        widgets={"application/vnd.jupyter.widget-state+json": {"state": widgets}},
    )
    traceback = ["\x1b[31mValueError\x1b[0m", "</pre><script>alert(1)</script>"]
    raised = nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=traceback)
    second = save(
        folder / "01_second.ipynb",
        "# The second\n\n[back](00_first.ipynb)\n\n## A part",
        code("ok"),
        code("", count=None),
        code("boom()", raised, count=2),
        code("never()", count=None),
    )
    error = NotebookError(2, "boom()", "ValueError", "</p><script>alert(2)</script>")
    runs = [
        NotebookRun("00_first", first, 12.3, result=result),
        NotebookRun("01_second", second, 4.0, error=error),
    ]
    return Reader(report.build(runs, folder / "index.html"))


def test_nothing_is_loaded_and_nothing_runs(page):
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "url(" not in (value or ""), (tag, name)
            if name in ("src", "srcset", "poster", "data"):
                assert value.startswith("data:image/png;base64,")
            if name in ("href", "xlink:href"):
                assert tag == "a"
                assert value.startswith(("#", "https://arxiv.org"))
    assert not re.search(r"url\(|@import|evil", page.source)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    # what was harmless in that output is still there
    assert "0.67" in page.text
    assert "kept" in page.text
    assert "[picture: a curve]" in page.text


def test_links_lead_to_places_that_exist(page):
    targets = [a["href"][1:] for a in page.all("a") if a.get("href", "").startswith("#")]

    assert len(targets) > 10
    assert set(targets) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.links["the other"] == "#01_second"
    assert page.links["its part"] == "#01_second--a-part"
    assert page.links["a part it lacks"] == "#01_second"
    assert page.links["below"] == "#00_first--a-part"
    assert page.links["a place"] == "#00_first--here"
    assert page.links["back"] == "#00_first"
    assert page.links["no notebook"] is None
    assert page.links["code"] is None
    assert page.links["unlinked"] is None
    assert page.links["the paper"] == "https://arxiv.org/abs/2209.01199"


def test_formulas_are_mathml_everywhere(page):
    displayed = [a for a in page.all("math") if a["display"] == "block"]

    # the minimax line; in the table, the summary of the fold, and inside the fold
    assert (len(displayed), len(page.all("math"))) == (1, 4)
    assert "$" not in page.text.partition("The first notebook")[2]
    assert len(page.all("mfrac")) == 1
    assert len(page.all("munder")) == 2


def test_pictures_are_embedded_and_described(page):
    images = page.all("img")

    assert [image["src"] for image in images] == [f"data:image/png;base64,{PNG}"] * 3
    assert images[0]["alt"] == "Figure 1 of 00_first, in “A part”"
    assert images[1]["alt"] == 'A "curve"'


def test_the_top_says_what_came_out(page):
    top = page.text.partition("Notebook")[2].partition("Link to")[0]

    for expected in ("Holds & stands.", "MSGD", "0.6712", "ENGM <b>", "12 s", "ok", "failed"):
        assert expected in top
    assert "1 of 2 notebooks failed." in page.text


def test_the_claims_stand_first_with_verdict_figure_and_link(tmp_path):
    def tested(name, verdict, *sections):
        cells = [cell for each in sections for cell in (f"## {each}", figure(each))]
        path = save(tmp_path / f"{name}.ipynb", f"# {name}: a title", *cells)
        return NotebookRun(name, path, 1.0, result={"summary": [], "verdict": verdict})

    def figure(text):
        data = base64.b64encode(b"\x89PNG " + text.encode()).decode()
        return code("plot()", shown({"image/png": data}))

    runs = [
        tested("02_gradient_variance", "x: not settled at this scale.", "Over the epochs", "Other"),
        tested("06_cifar", "part: not settled at this scale; the claim holds here.", "Any"),
        tested("07_tiny_imagenet", "the claim does not hold here"),
        tested("08_overfitting_and_sensitivity", ""),
    ]
    found = Reader(report.build(runs, tmp_path / "index.html"))
    top = found.text.partition("Notebook")[0]
    said = re.findall(r"(C\d) (holds|does not hold|not settled|no verdict)", top)
    assert said == [("C1", "not settled"), ("C4", "does not hold"), ("C5", "no verdict")]
    pictures = [base64.b64decode(each["src"].partition(",")[2]) for each in found.all("img")[:2]]
    assert pictures == [b"\x89PNG Over the epochs", b"\x89PNG Any"]
    assert [found.links[name] for name in ("06_cifar", "07_tiny_imagenet")] == [
        "#06_cifar", "#07_tiny_imagenet",
    ]  # fmt: skip


def test_a_failure_stands_at_the_top_and_in_place_as_text(page):
    assert page.links["cell [2] (boom()): ValueError: </p><script>alert(2)</script>"] == (
        "#01_second--error"
    )
    body = page.text.partition("The second")[2]
    assert body.index("boom()") < body.index("stopped at this cell") < body.index("never()")
    assert "</pre><script>alert(1)</script>" in body
    assert "\x1b" not in page.source
    assert [a["class"] for a in page.all("section") if "not-run" in a["class"]] == ["cell not-run"]


def test_folds_widgets_and_streams(page):
    assert "Code, 40 lines" in page.text
    assert "Solution with" in page.text
    assert len([a for a in page.all("details") if "open" not in a]) == 2
    assert "a\nb <i>" in page.text
    assert page.text.index("Interactive in the notebook") < page.text.index("captured")
    assert "VBox" not in page.text
    assert page.text.count("Interactive in the notebook") == 1  # not for the progress bar


@pytest.mark.parametrize(
    ("tex", "tags", "text"),
    [
        (r"\frac{a}{b}", ["mfrac"], "ab"),
        (r"\min_\theta f", ["munder"], "minθf"),
        (r"\operatorname*{arg\,min}_x", ["munder"], "argminx"),
        (r"\Big\|x\Big\|", [], "‖x‖"),
        (r"x \sim D", [], "x∼D"),
        (r"\begin{aligned}a&=b\\c&=d\end{aligned}", ["mtable", "mtr", "mtr"], "a=bc=d"),
        (r"\begin{align}a&=b\end{align}", ["mtable"], "a=b"),
        (r"a < b", [], "a<b"),
        (r"\mathbb{1}[y]", [], "𝟙[y]"),
        (r"\max(|g_i|,\, f c)", ["msub"], "max(|gi|,fc)"),
    ],
)
def test_formulas_that_the_converter_alone_gets_wrong_or_right(tex, tags, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = report.formula(tex, "block")

    assert re.sub("<[^>]*>", "", html).replace("&lt;", "<") == text
    for tag in set(tags):
        assert html.count(f"<{tag}>") + html.count(f"<{tag} ") == tags.count(tag)


@pytest.mark.parametrize("tex", [r"\frac{1}", r"\notacommand{x}", r"\left( x", "a & b", "x^"])
def test_a_formula_without_mathml_stays_readable(tex, tmp_path):
    path = save(tmp_path / "00_one.ipynb", f"See ${tex}$ here.")
    with pytest.warns(UserWarning, match="shown as TeX"):
        report.build([NotebookRun("00_one", path, 1.0)], tmp_path / "index.html")
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f'<code class="tex">{tex.replace("&", "&amp;")}</code>' in html


def test_offline_keeps_embedded_pictures_and_links():
    html = f'<p><img src="data:image/png;base64,{PNG}"/><a href="https://x.org">x</a></p>'

    assert str(report.offline(html)) == html


def test_demo_goes_on_after_a_failure_and_reports_both(tmp_path, capsys):
    for name, line in (("10_stops", "raise KeyError(n)"), ("11_goes_on", "print('n is', n)")):
        declared = nbformat.v4.new_code_cell("n: int = 1", metadata={"tags": ["parameters"]})
        save(tmp_path / f"{name}.ipynb", f"# {name}", declared, code(line))
    paths = sorted(tmp_path.glob("*.ipynb"))
    runs = report.demo(tmp_path / "out", paths)
    output = capsys.readouterr().out
    page = Reader(tmp_path / "out" / "index.html")

    assert [run.ok for run in runs] == [False, True]
    lines = output.splitlines()
    assert re.match(
        r"10_stops +\d+\.\d s  1 of 2  FAILED at cell \[2\] \(raise KeyError\(n\)\): Key", lines[0]
    )
    assert re.match(r"11_goes_on +\d+\.\d s  2 of 2  ok$", lines[1])
    assert lines[2].endswith("index.html")
    assert "KeyError: 1" in page.text
    assert "n is 1" in page.text


def test_demo_without_notebooks_is_refused(tmp_path):
    with pytest.raises(InputError, match="no notebooks to run"):
        report.demo(tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
