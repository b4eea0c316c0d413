import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import nbformat
import numpy as np
import pytest

import engm
from engm.errors import InputError
from engm.lab import batch as notebooks
from engm.lab import parameters

PARAMETERS = """from typing import Literal

lr: float = 0.05  # learning rate
eps: float = 8 / 255
seeds: list[int] = [0, 1]  # one run each
size: tuple[int, int] = (2, 3)
mode: Literal["fast", "slow"] = "fast"
steps: int | None = None
flag: bool = True
title: str = "a # b"  # shown on top
quoted: "int" = 3
none: list[float] = []
untyped = 0.5
"""


def write_notebook(folder: Path, name: str, *cells: str, tagged: bool = True) -> Path:
    """A notebook of code cells, the first of which is tagged `parameters`."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    if tagged:
        notebook.cells[0].metadata.tags = ["parameters"]
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    return write_notebook(tmp_path, "00_declared", PARAMETERS)


def test_parameters_are_read_as_python_reads_them(declared):
    found = parameters.parameters(declared)

    assert str(found["lr"]) == "lr: float = 0.05  # learning rate"
    assert (found["eps"].default, found["eps"].help) == ("8 / 255", "")
    assert found["mode"].type == "Literal['fast', 'slow']"
    assert found["steps"].type == "int | None"
    assert (found["title"].default, found["title"].help) == ("'a # b'", "shown on top")
    assert (found["quoted"].type, found["untyped"].type) == ("int", "float")
    assert len(found) == 11


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-2", 0.01),
        ("lr", "2", 2.0),
        ("lr", "-8/255", -8 / 255),
        ("eps", " 4 / 255 ", 4 / 255),
        ("seeds", "[3, 4]", [3, 4]),
        ("seeds", "(3, 4)", [3, 4]),
        ("none", "[]", []),
        ("size", "[4, 5]", (4, 5)),
        ("mode", "slow", "slow"),
        ("mode", "'slow'", "slow"),
        ("steps", "7", 7),
        ("steps", "None", None),
        ("flag", "FALSE", False),
        ("flag", "true", True),
        ("title", "5", "5"),
        ("title", "'x'", "'x'"),
        ("title", 'say "hi"\\', 'say "hi"\\'),
        ("quoted", "-1", -1),
    ],
)
def test_texts_are_read_by_the_type(declared, name, text, value):
    read = parameters.parse(declared, {name: text})[name]

    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lr", "abc"),
        ("lr", "nan"),
        ("lr", "1e999"),
        ("lr", "1/0"),
        ("lr", "true"),
        ("lr", "[0.1]"),
        ("lr", "__import__('os')"),
        ("seeds", "[0.5]"),
        ("seeds", "3"),
        ("seeds", "[]"),
        ("seeds", "[3, True]"),
        ("size", "(1, 2, 3)"),
        ("mode", "medium"),
        ("mode", "Slow"),
        ("steps", "2.5"),
        ("flag", "maybe"),
        ("flag", "1"),
        ("quoted", "1e3"),
        ("learning_rate", "0.1"),
    ],
)
def test_other_texts_are_refused_with_what_there_is(declared, name, text):
    with pytest.raises(InputError, match=name) as refusal:
        parameters.parse(declared, {name: text})

    assert "lr: float = 0.05  # learning rate" in str(refusal.value)
    assert "mode: Literal['fast', 'slow'] = 'fast'" in str(refusal.value)


def test_a_wrong_choice_is_refused_with_the_choices(declared):
    with pytest.raises(InputError, match="mode = 'fas' is not one of fast, slow; did you"):
        parameters.parse(declared, {"mode": "fas"})


def test_python_values_keep_the_same_rules(declared):
    values = {"lr": 1, "eps": np.float32(0.5), "seeds": (1, np.int64(2)), "steps": None}

    assert parameters.check(declared, values) == {
        "lr": 1.0,
        "eps": 0.5,
        "seeds": [1, 2],
        "steps": None,
    }
    for name, value in [
        ("lr", "0.05"),  # text is not a number once it comes from Python
        ("lr", True),
        ("lr", float("inf")),
        ("steps", 2.0),
        ("seeds", []),
        ("flag", 1),
        ("mode", None),
        ("title", Path("x")),
    ]:
        with pytest.raises(InputError, match=f"^{name} = "):
            parameters.check(declared, {name: value})


def test_what_is_put_into_a_notebook_can_be_read_back(tmp_path):
    loose = write_notebook(tmp_path, "01_loose", "values: list = []")

    with pytest.raises(InputError, match="values = "):
        parameters.check(loose, {"values": [object()]})
    with pytest.raises(InputError, match="values = "):
        parameters.check(loose, {"values": [float("nan")]})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("lr: float = '0.1'", "not a plain value"),
        ("lr = compute()", "not a plain value"),
        ("lr: Tensor = 1", "not a plain value"),
        ("print(1)", "name: type = value"),
        ("a = b = 1", "name: type = value"),
        ("%matplotlib inline", "not Python"),
        ("steps: int | None", "steps a type and no value"),
        ("steps: int | None\nsteps = 'many'", "not a plain value"),
    ],
)
def test_a_cell_that_does_not_declare_plainly_is_refused(tmp_path, source, message):
    with pytest.raises(InputError, match=message):
        parameters.parameters(write_notebook(tmp_path, "01_odd", source))


def test_types_may_stand_above_the_values_as_papermill_needs_it(tmp_path):
    lines = "mode: Literal['fast', 'slow']\nsteps: int | None\nmode = 'fast'\nsteps = 3  # many"
    path = write_notebook(tmp_path, "01_apart", f"from typing import Literal\n\n{lines}")

    found = parameters.parameters(path)
    assert str(found["steps"]) == "steps: int | None = 3  # many"
    assert parameters.parse(path, {"steps": "none", "mode": "slow"}) == {
        "steps": None,
        "mode": "slow",
    }
    with pytest.raises(InputError, match="mode = 'medium'"):
        parameters.parse(path, {"mode": "medium"})


def test_a_notebook_without_the_tag_is_refused(tmp_path):
    untagged = write_notebook(tmp_path, "01_untagged", "lr: float = 0.1", tagged=False)

    with pytest.raises(InputError, match="no cell tagged 'parameters'"):
        parameters.parameters(untagged)


def test_find_takes_names_and_paths(tmp_path, monkeypatch):
    path = write_notebook(tmp_path / "notebooks", "97_here", "n = 1")
    other = write_notebook(tmp_path / "elsewhere", "98_there", "n = 1")
    write_notebook(tmp_path / "notebooks", "scratch", "n = 1")
    monkeypatch.chdir(tmp_path)

    for name in ("97_here", "97_here.ipynb", "notebooks/97_here", path):
        assert notebooks.find(name).samefile(path)
    assert notebooks.find("elsewhere/98_there.ipynb").samefile(other)
    names = [each.stem for each in notebooks.available()]
    assert "97_here" in names
    assert "scratch" not in names
    assert names == sorted(names)
    with pytest.raises(InputError, match=r"'98_there'.*97_here"):
        notebooks.find("98_there")
    with pytest.raises(InputError, match="elsewhere"):
        notebooks.find("elsewhere")


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"summary": [{"value": float("nan")}]}, "numbers that are finite"),
        ({"summary": [{"value": np.float32(1)}]}, r"float32 .*use float\(x\)"),
        ({"verdict": "holds"}, "summary"),
        ({"summary": {"value": 1}}, "summary"),
        ({"summary": [{"value": [1]}]}, "flat"),
        ({"summary": [], "verdict": 3}, "verdict"),
    ],
)
def test_publish_says_what_it_cannot_take(result, reason):
    with pytest.raises(InputError, match=reason):
        notebooks.publish(result)


GOOD = """import json, os, sys
from pathlib import Path
import engm, engm.lab.batch
facts = {"executable": sys.executable, "cwd": os.getcwd(), "engm": engm.__file__, "lr": lr,
         "data": os.environ["ENGM_DATA"], "size": size, "title": title}
Path("own_file.json").write_text(json.dumps(facts))
engm.lab.batch.publish({"summary": [{"quantity": "first", "value": 1}]})
engm.lab.batch.publish({"summary": [{"value": lr, "quantity": "lr"}], "verdict": "holds"})
"""


LEAVES = "import sys, engm.lab.batch\nengm.lab.batch.publish({'summary': []})\nsys.exit(0)"
SLEEPS = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(5)"


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> dict:
    """One run of each kind, on a machine whose kernel `python3` is not to be trusted."""
    folder = tmp_path_factory.mktemp("kernels")
    spec = folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    wrong = {"argv": ["/bin/false"], "display_name": "wrong", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(wrong))
    source, out = folder / "source", folder / "out {braces}"
    good = write_notebook(source, "00_good", PARAMETERS, GOOD)
    fail = "x = 1\n", "", "# why\nraise ValueError('\\x1b[31mred\\x1b[0m <b>')", "print('never')"
    paths = {
        "fail": write_notebook(source, "01_fail", "n = 1", *fail),
        "exit": write_notebook(source, "02_exit", "n = 1", LEAVES, "x = 2"),
        "last": write_notebook(source, "03_last", "n = 1", "import sys; sys.exit(0)"),
        "dies": write_notebook(source, "04_dies", "n = 1", "import os; os._exit(0)", "x = 2"),
    }
    skips = nbformat.read(write_notebook(source, "05_skips", "n = 1", "x = 2"), as_version=4)
    skips.cells[1].metadata.tags = ["skip-execution"]
    nbformat.write(skips, source / "05_skips.ipynb")
    paths["skips"] = source / "05_skips.ipynb"
    (folder / "shadow" / "engm").mkdir(parents=True)
    (folder / "shadow" / "engm" / "__init__.py").touch()
    out.mkdir()
    for name in ("00_good", "01_fail"):
        (out / f"{name}.result.json").write_text('{"summary": "of an earlier run"}')
    write_notebook(out, "01_fail", "n = 1", "answer = 'of a learner'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("ENGM_DATA", "some/data")
        patch.setenv("PYTHONPATH", str(folder / "shadow"))
        before = dict(os.environ), os.getcwd()
        values = {"lr": 1, "size": (4, 5), "title": 'a "b" \\ {c}\n'}
        runs = {"good": notebooks.run(good, values, output_dir=out, progress=False)}
        for name, path in paths.items():
            runs[name] = notebooks.run(path, output_dir=out, progress=False)
        runs["again"] = notebooks.run(paths["last"], output_dir=out, progress=False)
        # each cell alone would be in time
        path = write_notebook(source, "06_late", SLEEPS, "time.sleep(7)", "x = 2")
        runs["late"] = notebooks.run(path, output_dir=out, timeout=8, progress=False)
        assert (dict(os.environ), os.getcwd()) == before
    return runs


def test_a_good_run_is_done_with_the_values_it_was_given(executed):
    run = executed["good"]
    facts = json.loads((run.path.parent / "own_file.json").read_text())

    assert run.ok
    assert (facts["lr"], facts["size"]) == (1.0, [4, 5])
    assert facts["title"] == 'a "b" \\ {c}\n'
    assert facts["data"] == str(Path("some/data").resolve())


def test_the_kernel_is_this_interpreter_with_this_package(executed):
    run = executed["good"]
    facts = json.loads((run.path.parent / "own_file.json").read_text())

    assert facts["executable"] == sys.executable
    assert Path(facts["cwd"]).samefile(run.path.parent)
    assert Path(facts["engm"]).samefile(engm.__file__)


def test_the_last_result_is_handed_out_and_written(executed):
    run = executed["good"]
    written = json.loads((run.path.parent / "00_good.result.json").read_text())

    origin = written.pop("run")
    assert run.result == written
    assert origin["notebook"] == "00_good"
    assert origin["parameters"]["lr"] == "1.0"  # given; those that follow are defaults
    defaults = {k: v for k, v in origin["parameters"].items() if k != "lr"}
    assert len(defaults) == len(parameters.parameters(run.path)) - 1 > 0
    assert origin["environment"]["packages"]["torch"].startswith(metadata.version("torch"))
    assert list(written["summary"][0].items()) == [("value", 1.0), ("quantity", "lr")]
    assert written["verdict"] == "holds"


def test_a_failure_names_the_cell_and_the_reason(executed):
    error = executed["fail"].error

    # the empty cell has no number in Jupyter either
    assert (error.cell, error.source) == (3, "# why")
    assert (error.name, error.value) == ("ValueError", "red <b>")
    assert str(error) == "cell [3] (# why): ValueError: red <b>"


def test_a_failed_run_leaves_no_result_of_an_earlier_one(executed):
    run = executed["fail"]

    assert run.result is None
    assert not (run.path.parent / "01_fail.result.json").exists()


def test_a_notebook_with_other_cells_is_kept_under_a_number(executed):
    kept = executed["fail"].earlier

    assert kept == executed["fail"].path.with_name("01_fail-1.ipynb")
    assert "of a learner" in kept.read_text()
    assert "of an earlier run" in kept.with_name("01_fail-1.result.json").read_text()
    assert executed["again"].earlier is None
    assert not kept.with_name("03_last-1.ipynb").exists()


@pytest.mark.parametrize(
    ("kind", "cell", "name"),
    [
        ("exit", 2, "SystemExit"),
        ("last", 2, "SystemExit"),
        ("dies", 2, "DeadKernelError"),
        ("skips", 2, "NotExecuted"),
    ],
)
def test_only_a_notebook_that_ran_to_its_end_is_done(executed, kind, cell, name):
    run = executed[kind]

    assert not run.ok
    assert (run.error.cell, run.error.name) == (cell, name)
    assert run.result is None
    assert not run.path.with_name(f"{run.name}.result.json").exists()


def test_the_kernel_is_gone_after_the_time_that_all_cells_have(executed):
    run = executed["late"]
    process = int((run.path.parent / "pid").read_text())

    assert run.error.name == "CellTimeoutError"
    assert "within 8 s" in run.error.value
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the kernel still runs")


@pytest.mark.parametrize("kind", ["good", "fail", "exit", "dies", "late"])
def test_the_executed_notebook_is_whole_and_the_author_s(executed, kind):
    notebook = nbformat.read(executed[kind].path, as_version=4)

    nbformat.validate(notebook)
    assert all(cell.cell_type == "code" for cell in notebook.cells)
    tags = [cell.metadata.tags for cell in notebook.cells]
    assert tags[0] == ["parameters"]
    assert (["injected-parameters"] in tags) == (kind == "good")


def test_nothing_is_written_when_something_is_refused(declared, tmp_path):
    out = tmp_path / "out"

    for given, options, message in [
        ({"lr": "abc"}, {}, "lr = 'abc'"),
        ({"nothing": 1}, {}, "no parameter 'nothing'"),
        ({}, {"timeout": 0}, "timeout = 0"),
        ({}, {"output_dir": declared.parent}, "holds the notebook itself"),
    ]:
        before = declared.read_bytes()
        with pytest.raises(InputError, match=message):
            notebooks.run(declared, given, **{"output_dir": out, **options})
        assert not out.exists()
        assert declared.read_bytes() == before


def test_without_papermill_the_message_says_what_to_install(declared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)

    with pytest.raises(InputError, match=r'pip install "engm\[batch\]"'):
        notebooks.run(declared, output_dir=tmp_path / "out")
