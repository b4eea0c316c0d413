import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from engm.report import tables
from engm.report.comparisons import Difference
from engm.report.records import Quantity
from engm.report.statistics import Interval, SignFlip

ODD = r"a_b & 5% $x$ #1 {y} ~ ^ \z <b> | é ± [*"
ROWS = [
    {"name": ODD, "lr": 8 / 255, "robust": Quantity(0.5, 0.0125, 3), "interval": "", "n": 3},
    {
        "name": "engm-input",
        "lr": 1.0,
        "robust": Quantity(2 / 3, None, 1),
        "interval": Interval(-0.01, 0.02),
        "n": None,
    },
]


def test_markdown_keeps_its_columns_whatever_a_cell_says():
    head, rule, *lines = tables.to_markdown(ROWS).splitlines()
    assert head == "| name | lr | robust | interval | n |"
    assert rule == "| --- | --- | --- | --- | --- |"
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert [len(c) for c in cells] == [5, 5]
    assert cells[0][0].strip().replace(r"\|", "|") == ODD
    assert [c.strip() for c in cells[0][1:]] == ["0.03137", "50.0 ± 1.2", "", "3"]
    assert [c.strip() for c in cells[1][1:]] == ["1", "66.7", "-1.0 to +2.0", "none"]


def test_csv_gives_every_number_unrounded_in_a_column_of_its_own():
    found = list(csv.DictReader(io.StringIO(tables.to_csv(ROWS))))
    assert list(found[0]) == [
        *("name", "lr", "robust mean", "robust sd", "robust n", "n"),
        *("interval low", "interval high"),
    ]
    assert found[0]["name"] == ODD
    assert float(found[0]["lr"]) == 8 / 255
    assert float(found[1]["robust mean"]) == 2 / 3
    assert (found[0]["robust sd"], found[1]["robust sd"]) == ("0.0125", "")
    assert (found[0]["interval low"], found[1]["interval low"]) == ("", "-0.01")


def test_latex_escapes_what_is_special():
    text = tables.to_latex(ROWS)
    assert "\\begin{tabular}{lrrlr}\n\\hline\n" in text
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert [len(re.split(r"(?<!\\)&", line)) for line in body] == [5, 5, 5]
    for part in (r"a\_b \& 5\% \$x\$ \#1 \{y\}", r"\textbackslash{}z", "$<$b$>$ $|$", r"$\pm$ {[}"):
        assert part in body[1]
    assert r"50.0 $\pm$ 1.2" in body[1]
    assert "engm-input" in body[2]
    assert "$-$1.0 to +2.0" in body[2]


WIDE = [{f"column {k}": f"{k} of {row}, and more words" for k in range(12)} for row in range(2)]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
@pytest.mark.parametrize("package", ["", r"\usepackage{graphicx}"])
def test_latex_compiles_and_fits_the_line(package, tmp_path):
    inputs = "\n\n".join(map(tables.to_latex, (ROWS, WIDE)))
    document = rf"\documentclass{{article}}{package}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "t.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert ("Overfull" in done.stdout) is not bool(package)


def test_what_all_rows_say_stands_above_the_table_and_not_in_it():
    rows = [
        {"data": "D_1", "lr": lr, "n": Quantity(7, None, 1), "outcome": "ahead"} for lr in (1, 2)
    ]
    for write, words in (
        (tables.to_html, "<p>in all rows: data D_1"),
        (tables.to_latex, "% in all"),
    ):
        above, table = write(rows).split("\n", 1)
        assert above.startswith(words)
        assert "outcome" in table and "ahead" in table  # the last column stays
        assert table.count("700.0") == 2  # and what was measured
        assert "D" not in table
    assert "in all rows" not in tables.to_html(rows[:1])
    assert "| data |" in tables.to_markdown(rows)
    assert tables.to_csv(rows).startswith("data,lr,")


@pytest.mark.parametrize(
    ("number", "shown"),
    [(10960.4, "10960"), (1029.2, "1029"), (999.96, "1000"), (0.03137255, "0.03137"),
     (1e-5, "1e-05"), (-12345.6, "-12346"), (float("inf"), "inf"), (3, "3"), (None, "none")],
)  # fmt: skip
def test_no_number_above_one_has_an_exponent(number, shown):
    assert tables.text(number) == shown
    assert tables.to_markdown([{"x": number}]).splitlines()[2] == f"| {shown} |"


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.loads, self.inside = [], [], False

    def handle_starttag(self, tag, attributes):
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")
        self.loads += [v for k, v in attributes if k in ("src", "href") and v[:5] != "data:"]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


def test_a_page_shows_the_cells_and_loads_nothing():
    parts = [("A < B", tables.to_html(ROWS))]
    page = tables.page("T & T", parts, {'the "figure"': b"\x89PNG"})
    reader = Reader()
    reader.feed(page)
    assert reader.cells[:5] == ["name", "lr", "robust", "interval", "n"]
    assert reader.cells[5:8] == [ODD, "0.03137", "50.0 ± 1.2"]
    assert reader.loads == []
    assert "<h2>A &lt; B</h2>" in page
    assert "<title>T &amp; T</title>" in page
    assert 'src="data:image/png;base64,iVBORw=="' in page
    assert "http" not in page


def test_no_rows_make_an_empty_table():
    for write in (tables.to_markdown, tables.to_csv, tables.to_latex, tables.to_html):
        assert write([]) == ""


def test_several_numbers_read_as_one_phrase():
    assert str(Difference(0.012, 0.003, 3)) == "+1.2 ± 0.3"
    assert str(Difference(-0.012, None, 1)) == "-1.2"
    assert str(SignFlip(0.25, 0.25)) == "p 0.25 (least: 0.25)"
