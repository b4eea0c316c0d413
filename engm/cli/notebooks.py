"""The commands `run`, `demo`, `colab` and `student`."""

import sys
from pathlib import Path

import click

from engm.cli.options import (
    PathType,
    main,
    notebooks_option,
    once,
    quoted,
    say,
    stoppable,
    warn_of_hours,
)
from engm.errors import InputError


@main.command()
@click.argument("notebook")
@click.option("-p", "values", nargs=2, multiple=True, metavar="NAME VALUE",
              help="set a parameter of the notebook, an unknown name lists them; may be "
              "repeated")  # fmt: skip
@click.option("--out", type=PathType(), default=Path("outputs"), show_default=True,
              help="folder of the executed notebook and its result")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True),
              help="seconds the notebook may take; default: no limit")  # fmt: skip
def run(
    notebook: str, values: tuple[tuple[str, str], ...], out: Path, timeout: float | None
) -> None:
    """Run NOTEBOOK, a name such as 06_cifar or a path, with parameters.

    Unknown names and wrong values are refused before anything runs.

    \b
    engm run 06_cifar -p dataset cifar10 -p eps 8/255
    """
    from engm.data import load, recorded_digest
    from engm.device import pick_device
    from engm.lab import batch, parameters

    path = batch.find(notebook)
    given = parameters.parse(path, once(values, "leave one of them out"))
    for name in {"runs", "outputs"} & given.keys():  # the notebook works in another folder
        if given[name] and isinstance(given[name], str):  # a count in a notebook of one's own
            given[name] = str(Path(given[name]).resolve())
    config = parameters.check_ranges(given)
    if config.dataset != "digits" and recorded_digest(config.dataset) is None:
        load(config.dataset)  # says how to prepare it
    shown = ", ".join(f"{name} = {value!r}" for name, value in given.items())
    folder = out.resolve()
    say(f"running {path.stem} with {shown or 'its defaults'}, in {quoted(folder)}")
    then = f"{quoted(folder / path.name)} has what ran; the same command runs it from the start"
    if "out" in parameters.parameters(path):
        if given.get("out"):  # the notebook works in the folder `out` of the command
            kept = f"kept in {quoted(folder / given['out'])}, and the same command takes them up"
            say(f"runs that it trains are {kept}")
            then = f"runs that it has trained are {kept}"
        elif "epochs" in parameters.parameters(path):
            say("the runs that it trains are not kept: -p out FOLDER keeps them, and goes on")
            then += ", with -p out FOLDER it keeps the runs that it trains and goes on with them"
    if config.model != "small_cnn" and "width" not in given and pick_device("auto").type == "cpu":
        quicker = "; -p width 8 is quicker" if "width" in parameters.parameters(path) else ""
        say(f"its network, {config.model}, takes long on a CPU{quicker}")
    small = {"subset": 500, "width": 8, "epochs": 1, "eval_steps": 5}
    small = {name: n for name, n in small.items() if name in parameters.parameters(path)}
    warn_of_hours(config, "auto", " ".join(f"-p {name} {n}" for name, n in small.items()))
    with stoppable(then):
        done = batch.run(path, given, output_dir=out, timeout=timeout)
    if done.earlier is not None:
        say(f"another {path.name} was there; it is {quoted(done.earlier)} now")
    click.echo(click.format_filename(done.path))
    if done.error is not None:
        raise click.ClickException(f"{notebook} failed in {done.error}")
    say(f"next: jupyter lab {quoted(done.path)}")


@main.command()
@click.option("--out", type=PathType(), default=Path("outputs"), show_default=True,
              help="folder of the executed notebooks and the report")  # fmt: skip
def demo(out: Path) -> None:
    """Run every notebook with its own defaults and build one report, OUT/index.html.

    A notebook that fails is named with the cell and the reason; the others still run.
    """
    from engm.lab import page as html

    each = "about a minute each on two CPU cores"
    say(f"running the notebooks with their defaults, {each}, in {quoted(out.resolve())}")
    kept = f"the notebooks that it ran are kept in {quoted(out.resolve())}"
    with stoppable(f"{kept}; the same command runs all of them again, engm run NAME one of them"):
        runs = html.demo(out)
    if not all(done.ok for done in runs):
        sys.exit(1)
    say(f"next: open {quoted(out / 'index.html')} in a browser")


@main.command()
@click.option("--repo", metavar="OWNER/NAME", help="your repository on GitHub, a public one")
@click.option("--branch", default="main", show_default=True, help="its branch")
@click.option("--remove", is_flag=True, help="take badge and cell out again")
@notebooks_option
def colab(repo: str | None, branch: str, remove: bool, folder: Path) -> None:
    """Let the notebooks open in Google Colab, from a repository of yours.

    Each gets a badge that opens it there, and a first cell that installs the kit, looks for a GPU
    and, if you like, keeps runs on Google Drive. Off Colab the cell does nothing. The same command
    again changes nothing; another repository takes the place of the first.

    \b
    engm colab --repo owner/name
    """
    from engm.lab import colab as stamps

    if (repo is None) != remove:
        raise click.UsageError("give either --repo OWNER/NAME or --remove")
    paths = _numbered(folder)
    changed = stamps.stamp(paths, repo, branch) if repo is not None else stamps.remove(paths)
    for path in changed:
        click.echo(click.format_filename(path))
    click.echo(f"{len(changed)} of {len(paths)} notebooks changed")
    if changed and repo is not None:
        say(f"next: commit and push them to {repo}; then each badge opens its notebook")


@main.command()
@click.argument("out", type=PathType())
@notebooks_option
def student(out: Path, folder: Path) -> None:
    """Write a copy of the notebooks into OUT for a class, without solutions and outputs.

    The checks of the exercises still work: what they compare with is in the package. Copies that
    exist are left alone, since they may hold answers.

    \b
    engm student class
    """
    from engm.lab.batch import kit
    from engm.lab.parameters import blank, library, read_notebook
    from engm.runs import make_folder, write_text

    nbformat = library()
    if folder == Path("notebooks") and not folder.exists():
        folder = kit("notebooks")
    paths = _numbered(folder)
    if there := [path.name for path in paths if (out / path.name).exists()]:
        raise InputError(
            f"{out} has {', '.join(there)} already, perhaps with somebody's answers; choose "
            "another folder, or take them away"
        )
    make_folder(out, "choose another folder")
    for path in paths:
        notebook = read_notebook(path)
        solution = "<details><summary>Solution</summary>"
        notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith(solution)]
        blank(notebook)
        write_text(out / path.name, nbformat.writes(notebook) + "\n")
        click.echo(click.format_filename(out / path.name))


def _numbered(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("[0-9]*_*.ipynb"))
    if not paths:
        raise InputError(f"there are no notebooks in {folder}; --notebooks says where they are")
    return paths
