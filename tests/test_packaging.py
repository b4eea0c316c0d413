"""What `pip install` makes of the repository, away from it."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from engm.lab import logs
from engm.runs import read_json

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta as b; print(b.build_{}(sys.argv[1]))"


def call(*command, **options):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """A folder that is not the repository, and the environment of a kit that pip installed.

    Its wheel is made from the sdist, which is made from nothing but the named files and folders.
    """
    folder = tmp_path_factory.mktemp("away")
    source, target = folder / "source", folder / "site"
    for name in ("engm", "notebooks", "results"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    *_, name = call("-c", BUILD.format("sdist"), folder, cwd=source).split()
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / name.removesuffix(".tar.gz")
    *_, name = call("-c", BUILD.format("wheel"), folder, cwd=unpacked).split()
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target)
    call(*pip, folder / name)
    shutil.rmtree(source), shutil.rmtree(unpacked)
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    return {"cwd": folder, "env": environment}


def test_an_installed_kit_is_whole(away):
    site = away["cwd"] / "site"
    where = call("-c", "import engm; print(engm.__file__)", **away).strip()
    assert Path(where) == site / "engm" / "__init__.py"
    there, ours = (
        {
            p.relative_to(root)
            for kind in ("py", "css", "html")
            for p in root.glob(f"engm/**/*.{kind}")
        }
        for root in (site, ROOT)
    )
    assert {path for path in there if path.parts[1] != "results"} == ours  # its script comes along
    for folder, pattern in (("notebooks", "*.ipynb"), ("results", "*/*/*.json*")):
        assert {p.relative_to(ROOT) for p in (ROOT / folder).glob(pattern)} == {
            p.relative_to(site / "engm") for p in (site / "engm" / folder).glob(pattern)
        }
    assert "tiny-imagenet" in call("-m", "engm", "prepare", **away)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert declared in call("-m", "engm", "--version", **away)
    assert len(call("-m", "engm", "student", "class", **away).split()) == 10


def test_notebooks_run_from_an_installed_kit(away):
    call("-m", "engm", "run", "--out", "outputs", "09_results", **away)
    result = read_json(away["cwd"] / "outputs" / "09_results.result.json")
    verdict, source = logs.verdict_of("09_results", [])
    assert (result["verdict"], source) == (verdict, "as saved")  # of the same logs: the same
    # by plain papermill, too
    notebook, out = away["cwd"] / "site/engm/notebooks/01_attacks.ipynb", away["cwd"] / "out.ipynb"
    values = ("-p", "epochs", 5, "-p", "eps", 0.2, "-k", "python3", "--no-progress-bar")
    call("-m", "papermill", notebook, out, *values, **away)
    assert "eps 0.200" in out.read_text()


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="about the environment of make")
def test_a_script_beside_the_clone_finds_the_package_and_not_its_folder(tmp_path):
    (tmp_path / "engm").mkdir()
    call("-c", "import engm; engm.ENGM", cwd=tmp_path)
