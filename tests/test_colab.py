import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from click.testing import CliRunner

from engm.cli import main
from engm.errors import InputError
from engm.lab import batch as notebooks
from engm.lab import colab

FOLDER = Path(__file__).parents[1] / "notebooks"
TOUR = "00_tour.ipynb"


@pytest.fixture
def copies(tmp_path):
    paths = [tmp_path / path.name for path in sorted(FOLDER.glob("0*.ipynb"))]
    for path in paths:
        shutil.copy(FOLDER / path.name, path)
    return paths


def setup_of(path):
    cells = nbformat.read(path, as_version=4).cells
    [cell] = [c for c in cells if c.cell_type == "code" and "colab" in c.metadata.get("tags", [])]
    return cell.source


def bytes_of(paths):
    return [path.read_bytes() for path in paths]


def test_badge_and_cell_stand_behind_the_title(copies):
    assert colab.stamp(copies, "some-one/their.kit", "dev/x") == copies
    for path in copies:
        title, badge, cell, *rest = nbformat.read(path, as_version=4).cells
        assert title.source.startswith("# ")
        assert (
            "https://colab.research.google.com/github/some-one/their.kit/blob/dev/x/notebooks/"
            f"{path.name})" in badge.source
        )
        assert "https://github.com/some-one/their.kit" in cell.source
        assert '"dev/x"' in cell.source
        tags = [c.metadata.get("tags", []) for c in [title, badge, cell, *rest]]
        assert sum("parameters" in each for each in tags) == 1
        # nbval compares a cell only if it has a count
        counts = [c.execution_count for c in [cell, *rest] if c.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        ids = [c.id for c in [title, badge, cell, *rest]]
        assert len(set(ids)) == len(ids)


def test_stamping_twice_changes_nothing_and_another_repository_takes_the_place(copies):
    original = bytes_of(copies)
    colab.stamp(copies, "owner/name")
    once = bytes_of(copies)
    assert colab.stamp(copies, "owner/name") == []
    assert bytes_of(copies) == once
    assert colab.stamp(copies, "owner/other") == copies
    assert all(b"owner/name" not in found for found in bytes_of(copies))
    colab.stamp(copies, "owner/name")
    assert bytes_of(copies) == once
    assert colab.remove(copies) == copies
    assert bytes_of(copies) == original
    assert colab.remove(copies) == []


def test_a_notebook_that_was_not_run_stays_so(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# title"), nbformat.v4.new_code_cell("x = 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    colab.stamp([tmp_path / "a.ipynb"], "owner/name")
    found = nbformat.read(tmp_path / "a.ipynb", as_version=4).cells
    assert [c.execution_count for c in found if c.cell_type == "code"] == [None, None]


@pytest.mark.parametrize(
    ("repo", "branch"),
    [
        ("name", "main"),
        ("https://github.com/owner/name", "main"),
        ("owner/name/more", "main"),
        ("-owner/name", "main"),
        ("owner/..", "main"),
        ("owner/na me", "main"),
        ('owner/"', "main"),
        ("owner/name", ""),
        ("owner/name", "--upload-pack=x"),
        ("owner/name", 'a"b'),
        ("owner/name", "a..b"),
    ],
)
def test_what_is_no_repository_is_refused_before_anything_is_written(copies, repo, branch):
    before = bytes_of(copies)
    with pytest.raises(InputError, match=r"is no (GitHub repository|name of a branch)"):
        colab.stamp(copies, repo, branch)
    assert bytes_of(copies) == before


def test_nothing_is_written_if_one_of_the_notebooks_cannot_be_read(copies):
    copies[-1].write_text("{")
    before = bytes_of(copies)
    with pytest.raises(InputError, match="not a notebook"):
        colab.stamp(copies, "owner/name")
    assert bytes_of(copies) == before


def test_stamped_notebooks_pass_ruff(copies):
    colab.stamp(copies[:1], "owner/name")
    rules = str(FOLDER.parent / "pyproject.toml")
    for command in (["check", "--ignore", "D,E402"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", rules, str(copies[0])],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_a_stamped_notebook_runs_off_colab(tmp_path):
    shutil.copy(FOLDER / "09_results.ipynb", tmp_path)
    path = tmp_path / "09_results.ipynb"
    colab.stamp([path], "owner/name")
    run = notebooks.run(path, output_dir=tmp_path / "out", progress=False)
    assert run.ok, run.error
    cell = nbformat.read(run.path, as_version=4).cells[2]
    assert (cell.id, cell.outputs) == ("colab-cell", [])


@pytest.fixture
def on_colab(monkeypatch, tmp_path):
    """Python as on Colab; says what was called."""
    called = SimpleNamespace(commands=[], mounted=[])
    google, fake = ModuleType("google"), ModuleType("google.colab")
    fake.drive = SimpleNamespace(mount=called.mounted.append)
    google.colab = fake
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", fake)
    monkeypatch.setattr(subprocess, "run", lambda c, check: called.commands.append(c))
    monkeypatch.setenv("ENGM_DATA", "")
    monkeypatch.chdir(tmp_path)
    return called


def test_on_colab_the_cell_installs_the_kit_and_looks_for_a_gpu(
    copies, on_colab, monkeypatch, tmp_path, capsys
):
    import torch

    colab.stamp(copies[:1], "owner/name", "dev")
    for available, said in ((False, "No GPU: the digits need none"), (True, "GPU: fast one")):
        on_colab.commands.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fast one")
        exec(setup_of(copies[0]), {})
        clone, install = on_colab.commands
        assert clone[:2] == ["git", "clone"]
        assert clone[-4:] == ["--branch", "dev", "https://github.com/owner/name", clone[-1]]
        assert install == [sys.executable, "-m", "pip", "install", "--quiet", clone[-1]]
        assert said in capsys.readouterr().out
    assert on_colab.mounted == []
    assert Path.cwd() == tmp_path  # runs stay where they were


def test_on_colab_runs_lie_on_drive_if_the_reader_says_so(
    copies, on_colab, monkeypatch, tmp_path, capsys
):
    import os

    colab.stamp(copies[:1], "owner/name")
    source = setup_of(copies[0])
    assert source.count("keep_on_drive = False") == 1
    assert source.count('"/content') == 3
    here = source.replace('"/content', f'"{tmp_path}').replace(
        "keep_on_drive = False", "keep_on_drive = True"
    )
    for _ in range(2):  # and again after a disconnect
        exec(here, {})
        assert Path.cwd() == tmp_path / "drive" / "MyDrive" / "engm"
        assert os.environ["ENGM_DATA"] == str(Path.cwd() / "data")
    assert on_colab.mounted == [str(tmp_path / "drive")] * 2
    assert 'set it to "runs"' in capsys.readouterr().out
    (tmp_path / "engm-kit").mkdir()  # what is there is not fetched again
    on_colab.commands.clear()
    exec(here, {})
    assert [command[1] for command in on_colab.commands] == ["-m"]


def test_the_command_stamps_and_removes(copies):
    run = CliRunner().invoke
    where = ["colab", "--notebooks", str(copies[0].parent)]
    original = bytes_of(copies)
    done = run(main, [*where, "--repo", "owner/name"])
    assert f"{len(copies)} of {len(copies)} notebooks changed" in done.output
    assert b"owner/name/blob/main" in copies[0].read_bytes()
    assert "0 of" in run(main, [*where, "--repo", "owner/name"]).output
    assert run(main, [*where, "--remove"]).exit_code == 0
    assert bytes_of(copies) == original


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "either --repo OWNER/NAME or --remove"),
        (["--repo", "owner/name", "--remove"], "either --repo OWNER/NAME or --remove"),
        (["--repo", "name"], "write owner/name"),
        (["--repo", "owner/name"], "no notebooks in nowhere"),
    ],
)
def test_a_wrong_call_is_answered_in_a_line(copies, options, said):
    folder = "nowhere" if "nowhere" in said else str(copies[0].parent)
    done = CliRunner().invoke(main, ["colab", "--notebooks", folder, *options])
    assert done.exit_code != 0
    assert said in done.output
    assert "Traceback" not in done.output
