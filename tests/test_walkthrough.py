"""The notebooks in their order: their exercises, and runs with other parameters than their own."""

import asyncio
import base64
import io
import re
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from engm.lab import batch as notebooks
from engm.lab.parameters import check, parameters

FOLDER = Path(__file__).parents[1] / "notebooks"
# Other parameters for each notebook than its own, and cheap. What `fit` trains is kept in `out`,
# and found there when the notebook runs again.
PARAMETERS: dict[str, dict] = {
    "00_tour": dict(subset=300, epochs=8, eps=0.1, seed=1),
    "01_attacks": dict(subset=300, eps=0.1, epochs=5, seed=1),
    "02_gradient_variance": dict(
        **dict(seeds=[1, 2], epochs=2, eps=0.05, batch_size=100, measured=100, lr=0.02),
        **dict(width=8, precision="bfloat16"),
    ),
    "03_engm_step_by_step": dict(subset=200, epochs=2, eps=0.1, lr=0.1, floor=1.0, seed=1),
    "04_convergence": dict(
        **dict(ripple=2.0, degrees_of_freedom=1.2, noise_seeds=2, steps=64),
        **dict(sigmas=[0.1, 0.3, 1.0, 3.0], network_seeds=[1, 4], epochs=2, look_every=1),
        **dict(lrs=[0.1], subset=50, measured=50, width=4),
    ),
    "05_norms_from_inputs": dict(
        **dict(subset=300, epochs=2, seeds=[3, 1], lr=0.1, eps=0.1, width=8),
        **dict(refresh_every=5, precision="bfloat16"),
    ),
    "06_cifar": dict(
        **dict(subset=50, epochs=1, seeds=[2, 3], eval_steps=2, eps=0.1, awp=0.01),
        **dict(methods=["mart"], optimizers=["msgd", "engm-input"], batch_size=25, out="runs"),
    ),
    "07_tiny_imagenet": dict(
        **dict(subset=50, width=4, epochs=1, seeds=[1, 2], eval_steps=2, image_sizes=[8]),
        **dict(methods=["TRADES", "AWP"], lr=0.05, eps=0.1, out="runs"),
    ),
    "08_overfitting_and_sensitivity": dict(
        **dict(subset=50, width=4, epochs=2, seeds=[1], grid_epochs=1, lr=0.05),
        **dict(lrs=[0.03, 0.1], weight_decays=[0.001, 0.1], eval_steps=2, out="runs"),
    ),
    "09_results": dict(baseline="msgd-clip", search=["lr", "weight_decay"]),
}
NAMES = sorted(PARAMETERS)
THERE = [name for name in NAMES if (FOLDER / f"{name}.ipynb").is_file()]


def cells_of(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells


def tagged(cells, tag):
    return [i for i, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]


def solution_of(cell):
    """The code of a folded solution."""
    [code] = re.findall(r"^```python\n(.*?)^```$", cell.source, re.S | re.M)
    return code


def said(cells):
    """What the checks printed."""
    outputs = [cells[i].outputs for i in tagged(cells, "check")]
    return ["".join(output.get("text", output.output_type) for output in each) for each in outputs]


def results_of(cells):
    """What the notebook published, each time."""
    return [
        output.data[notebooks.RESULT_TYPE]
        for cell in cells
        for output in cell.get("outputs", [])
        if notebooks.RESULT_TYPE in output.get("data", {})
    ]


def warnings_of(cells):
    """What the cells printed of warnings."""
    shown = [output.get("text", "") for cell in cells for output in cell.get("outputs", [])]
    return [text for text in shown if "Warning: " in text]


def ragged_rows(cells):
    """The rows of the tables shown that do not have as many cells as their head."""
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    tables = re.findall(
        r"(?:^\|.*\|$\n?)+", "\n\n".join(d.get("text/markdown", "") for d in shown), re.M
    )
    assert tables or not any("text/markdown" in data for data in shown)
    rows = [[re.split(r"(?<!\\)\|", line) for line in table.splitlines()] for table in tables]
    return [row for head, *rest in rows for row in rest if len(row) != len(head)]


def set_parameters(cells, values):
    """Appends values to the cell of the parameters, as plain Python."""
    [given] = [cells[i] for i in tagged(cells, "parameters")]
    given.source += "".join(f"\n{key} = {value!r}" for key, value in values.items())


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks, so that what they import is imported once."""
    manager = AsyncKernelManager(kernel_name="python3")
    yield manager
    asyncio.run(manager.shutdown_kernel(now=True))


def answered(name, folder):
    """Run All, then a wrong answer and the solution of each exercise, then Run All, in one kernel.

    So the folded solutions work on what the whole notebook left behind, and so does the notebook.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    set_parameters(notebook.cells, check(FOLDER / f"{name}.ipynb", PARAMETERS[name]))
    wrong = iter(["exercise_1 = 'wrong'", "exercise_2 = -1.5", "exercise_3 = lambda *_: -1.5"])
    answers = []
    for i in tagged(notebook.cells, "check"):
        for source in (next(wrong), solution_of(notebook.cells[i + 1])):
            answers += [nbformat.v4.new_code_cell(source), deepcopy(notebook.cells[i])]
    fresh = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(folder)!r})")
    notebook.cells = [fresh, *notebook.cells, *answers, *deepcopy(notebook.cells)]
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
    return notebook


def test_the_notebooks_are_those_of_the_walkthrough():
    assert {path.stem for path in notebooks.available()} <= set(NAMES)
    assert all(PARAMETERS.values())
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(10)]


@pytest.mark.parametrize("name", THERE)
def test_the_first_cell_links_to_the_neighbours(name):
    title = cells_of(name)[0].source
    before = re.findall(r"←\s*\[[^\]]*\]\((\w+)\.ipynb\)", title)
    after = re.findall(r"\[[^\]]*\]\((\w+)\.ipynb\)\s*→", title)
    place = NAMES.index(name)
    assert before == NAMES[:place][-1:]
    assert after == NAMES[place + 1 : place + 2]


@pytest.mark.parametrize("name", THERE)
def test_a_notebook_is_small_enough_to_be_looked_at_on_the_web(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000


@pytest.mark.parametrize("name", THERE)
def test_three_exercises_each_of_a_task_a_stub_a_check_and_a_folded_solution(name):
    cells = cells_of(name)
    stubs = tagged(cells, "exercise")
    assert len(stubs) == 3
    assert tagged(cells, "check") == [i + 1 for i in stubs]
    for number, i in enumerate(stubs, start=1):
        task, stub, check, solution = cells[i - 1 : i + 3]
        assert task.cell_type == solution.cell_type == "markdown"
        assert re.search(rf"^### Exercise {number} · \S", task.source, re.M)
        assert f"exercise_{number} = None" in stub.source.splitlines()[0]
        assert re.search(rf"^check\(\s*exercise_{number},", check.source, re.M)
        assert "hint=" in check.source
        parts = solution.source.split("\n")
        assert parts[:2] == ["<details><summary>Solution</summary>", ""]
        assert parts[-1] == "</details>"
        assert re.search(
            rf"^(exercise_{number} =|def exercise_{number}\()", solution_of(solution), re.M
        )
    assert said(cells) == ["not answered yet\n"] * 3  # as committed


@pytest.mark.parametrize("name", THERE)
def test_run_all_then_the_solutions_then_run_all_again(name, kernel, tmp_path):
    notebook = answered(name, tmp_path)
    NotebookClient(notebook, kernel, timeout=600).execute()
    cells = notebook.cells
    before, told, after = (said(cells)[part] for part in (slice(3), slice(3, 9), slice(9, 12)))
    assert before == after == ["not answered yet\n"] * 3
    assert told[1::2] == ["right\n"] * 3
    assert all(answer.startswith("not yet: ") for answer in told[::2]), told
    assert ragged_rows(cells) == []
    assert warnings_of(cells) == []
    first, last = results_of(cells)
    assert first["summary"] and first.get("verdict") == last.get("verdict")
    if len(PARAMETERS[name].get("seeds", [1, 2, 3])) < 3:  # one or two seeds settle nothing
        assert "not settled at this scale" in last["verdict"]


@pytest.mark.parametrize("name", THERE)
def test_plain_papermill_knows_every_parameter(name):
    import papermill

    path = FOLDER / f"{name}.ipynb"
    known, declared = papermill.inspect_notebook(str(path)), parameters(path)
    assert {name: found["default"] for name, found in known.items()} == {
        name: found.default.replace("'", '"') for name, found in declared.items()
    }


def test_the_map_has_a_row_a_time_and_a_picture_of_each_notebook():
    rows = re.findall(
        r"^\| \[\d\d · [^\]]+\]\((\w+)\.ipynb\) \| [^|]+ \| (\d+) s "
        r"\| \[!\[a figure from it\]\(pictures/(\w+)\.png\)\]\((\w+)\.ipynb\) \|$",
        (FOLDER / "README.md").read_text(),
        re.M,
    )
    assert [name for name, *_ in rows] == NAMES
    for name, seconds, picture, target in rows:
        assert name == picture == target
        assert 0 < int(seconds) <= 120
        assert (FOLDER / "pictures" / f"{name}.png").stat().st_size <= 30_000


def test_the_map_takes_times_and_pictures_from_executed_notebooks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.syspath_prepend(FOLDER / "pictures")
    import notebook_map

    figure, file = Figure(figsize=(9, 3)), io.BytesIO()
    figure.subplots().plot([1, 2])
    figure.savefig(file, format="png")
    cells = [nbformat.v4.new_code_cell("x"), nbformat.v4.new_code_cell("y")]
    for cell, start in zip(cells, (5, 20), strict=True):
        cell.metadata["execution"] = {
            "iopub.status.busy": f"2026-01-01T00:00:{start:02}.000000Z",
            "iopub.status.idle": f"2026-01-01T00:00:{start + 7:02}.000000Z",
        }
    picture = {"image/png": base64.b64encode(file.getvalue()).decode()}
    cells[0].outputs = [nbformat.v4.new_output("display_data", picture)]
    executed = tmp_path / "executed"
    executed.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), executed / "00_a.ipynb")
    readme = tmp_path / "README.md"
    start = "# map\n| notebook | does |\n| [00 · a](00_a.ipynb) | one | | |\n"
    other = "| [01 · b](01_b.ipynb) | two | 3 s | [![](pictures/01_b.png)](01_b.ipynb) |\nend\n"
    readme.write_text(start + other)
    picture = "[![a figure from it](pictures/00_a.png)](00_a.ipynb)"
    row = f"| [00 · a](00_a.ipynb) | one | 22 s | {picture} |\n"
    for _ in range(2):
        notebook_map.update(readme, executed)
        assert (
            readme.read_text() == start.replace("| [00 · a](00_a.ipynb) | one | | |\n", row) + other
        )
    with Image.open(tmp_path / "pictures" / "00_a.png") as small:
        assert small.size == (360, 120)
