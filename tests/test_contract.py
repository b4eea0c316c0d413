"""What others rely on: public names, the command line, a run's settings, the notebooks' imports.

After a change that is meant, `python tests/test_contract.py` writes contract.txt anew.
"""

import ast
import importlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import engm
from engm.cli import main
from engm.config import RunConfig

CONTRACT = Path(__file__).parent / "contract.txt"
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def helps(command: click.Command, words: tuple[str, ...]) -> list[str]:
    shown = CliRunner().invoke(main, [*words, "--help"], prog_name="engm", terminal_width=80)
    texts = [f"$ {' '.join(('engm', *words))} --help\n{shown.output}"]
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            texts += helps(command.commands[name], (*words, name))
    return texts


def contract() -> str:
    names = ["public: " + " ".join(sorted(engm.__all__))]
    settings = [f"setting: {name} = {value!r}" for name, value in RunConfig().to_dict().items()]
    return "\n\n".join(["\n".join(names + settings), *helps(main, ())]) + "\n"


def test_public_names_settings_and_options_are_those_that_people_use():
    assert contract() == CONTRACT.read_text()
    assert set(engm.__all__) <= set(dir(engm))  # what completion offers
    for name in engm.__all__:
        assert getattr(engm, name).__doc__


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_that_a_notebook_imports_is_there(path):
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    wanted = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "engm"
        for alias in node.names
    ]
    assert wanted
    for module, name in wanted:
        found = importlib.import_module(module)
        if not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")


if __name__ == "__main__":
    CONTRACT.write_text(contract())
