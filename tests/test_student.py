"""`engm student` writes notebooks that ask and do not tell."""

import re
from pathlib import Path

import click
import nbformat
import pytest

from engm.cli import main

FOLDER = Path(__file__).parents[1] / "notebooks"


def copy_to(out):
    main.main(["student", str(out), "--notebooks", str(FOLDER)], standalone_mode=False)


def test_the_copy_has_every_exercise_and_neither_solution_nor_output(tmp_path, capsys):
    out = tmp_path / "class"
    copy_to(out)
    originals = sorted(FOLDER.glob("[0-9]*_*.ipynb"))
    copies = sorted(out.iterdir())
    assert [path.name for path in copies] == [path.name for path in originals]
    assert capsys.readouterr().out.split() == [str(path) for path in copies]
    for original, copy in zip(originals, copies, strict=True):
        before, after = (nbformat.read(path, as_version=4).cells for path in (original, copy))
        nbformat.validate(nbformat.read(copy, as_version=4))
        told = [cell for cell in before if "<summary>Solution</summary>" in cell.source]
        assert len(told) == 3, original.name
        assert [cell.id for cell in after] == [cell.id for cell in before if cell not in told]
        assert not any("Solution</summary>" in cell.source for cell in after)
        for cell in after:
            if cell.cell_type == "code":
                assert cell.outputs == [] and cell.execution_count is None
        kept = {cell.id: (cell.source, cell.metadata.get("tags", [])) for cell in before}
        assert all((cell.source, cell.metadata.tags) == kept[cell.id] for cell in after)


def test_answers_that_are_there_are_not_overwritten(tmp_path):
    copy_to(tmp_path)
    answered = tmp_path / "09_results.ipynb"
    (tmp_path / "00_tour.ipynb").unlink()
    answered.write_text("mine")
    with pytest.raises(click.ClickException, match=r"09_results\.ipynb"):
        copy_to(tmp_path)
    assert answered.read_text() == "mine"
    assert not (tmp_path / "00_tour.ipynb").exists()
    with pytest.raises(click.ClickException, match="09_results"):  # nor the notebooks themselves
        copy_to(FOLDER)


def test_a_folder_without_notebooks_is_named(tmp_path):
    with pytest.raises(click.ClickException, match=str(tmp_path)):
        main.main(["student", "x", "--notebooks", str(tmp_path)], standalone_mode=False)


def test_the_route_for_teachers_takes_two_hours():
    text = (FOLDER / "TEACHING.md").read_text()
    minutes = re.findall(r"^\| (\d+) \|", text, re.M)
    assert sum(map(int, minutes)) == 120
    goals = set(re.findall(r"^(\d)\. ", text.split("## The route")[0], re.M))
    covered = re.findall(r"^\| \d+ \| .* \| ([\d, ]*) \| .*\|$", text, re.M)
    assert {goal for cell in covered for goal in re.findall(r"\d", cell)} == goals
