"""What the files around the package promise."""

import ast
import re
import shlex
import sys
import tomllib
from collections import Counter, defaultdict
from contextlib import suppress
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from statistics import mean

import pytest
import yaml
from scipy import stats

from engm.bench import tables
from engm.errors import InputError
from engm.lab import batch as notebooks
from engm.lab.parameters import check
from engm.report.records import collect
from engm.runs import read_json, read_metrics
from engm.sweep.plan import read_plan

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results" / "README.md").read_text()
COMMANDS = [shlex.split(c) for c in re.findall(r"`(engm report\s+results/[^`]+)`", RESULTS)]


def name_of(requirement):
    return re.match(r"[A-Za-z0-9-]+", requirement).group().lower()


def test_environment_yml_installs_this_package_with_everything_and_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, section = environment["dependencies"]
    floor = PROJECT["requires-python"].removeprefix(">=")
    newest = PROJECT["classifiers"][-1].rsplit(" ", 1)[1]
    below = f"3.{int(newest.split('.')[1]) + 1}"
    assert (python, pip) == (f"python>={floor},<{below}", "pip")
    assert section == {"pip": ["-e .[all]"]}
    extras = PROJECT["optional-dependencies"]
    named = re.search(r"\[(.*)\]", extras["all"][0]).group(1).split(",")
    # peers: only `engm bench` compares with them, and does without; cluster: for many machines
    assert set(named) == set(extras) - {"all", "peers", "cluster"}


def test_rooms_import_one_way_and_packages_only_re_export():
    arrows = defaultdict(set)
    for path in (ROOT / "engm").rglob("*.py"):
        inside = path.relative_to(ROOT / "engm").parts
        body = ast.parse(path.read_text()).body
        if path.name == "__init__.py" and len(inside) > 1:
            assert not [n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)], path
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "engm":
                _, *within = node.module.split(".")
                rooms = within[:1] or [alias.name for alias in node.names]
                arrows[inside[0].removesuffix(".py")].update(rooms)
    for room, others in arrows.items():
        others.discard(room)
    TopologicalSorter(arrows).prepare()  # raises where there is a circle


def test_everything_that_is_imported_is_declared():
    providers = {**packages_distributions(), "backpack": ["backpack-for-pytorch"]}
    extras = PROJECT["optional-dependencies"]
    used = {extra: set(map(name_of, extras[extra])) for extra in extras}
    at_work = {name_of(r) for r in PROJECT["dependencies"]}
    at_work |= used["notebooks"] | used["batch"] | used["autoattack"] | used["sweep"]
    declared = {"engm": at_work | used["peers"], "data_scripts": at_work}
    declared["notebooks/pictures"] = at_work
    declared["tests"] = at_work | used["test"]
    for folder, names in declared.items():
        files = [*(ROOT / folder).rglob("*.py")]
        scripts = ("results", "results/plans", "notebooks/pictures", "tests")
        own = {"engm"} | {p.stem for f in scripts for p in (ROOT / f).glob("*.py")}
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) else []
                for top in {module.split(".")[0] for module in modules} - own:
                    given = {name.lower().replace("_", "-") for name in providers.get(top, [top])}
                    assert top in sys.stdlib_module_names or given & names, f"{path} imports {top}"


def test_dependencies_are_floors_and_the_constraints_pin_each_of_them():
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["notebooks"], *extras["batch"], *extras["test"]]
    wanted = [r for r in wanted if not r.startswith("engm[")]
    assert all(re.fullmatch(r"[A-Za-z0-9-]+>=[0-9.]+", r) for r in wanted)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and line[0] != "#")
    for requirement in wanted:
        floor = requirement.split(">=")[1]
        pinned = pins[name_of(requirement)]
        assert tuple(map(int, pinned.split("."))) >= tuple(map(int, floor.split("."))), requirement


def test_every_command_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "help"} <= targets
    for target in re.findall(r"make ([a-z-]+)", README):
        assert target in targets, target
    from engm.cli import main

    many = (ROOT / "results" / "plans" / "README.md").read_text()
    for command in re.findall(r"^engm ([a-z]+)", README + many, re.M):
        assert command in main.commands, command


def test_the_three_lines_of_the_readme_run_before_and_after():
    import torch
    from torch.nn import functional

    import engm

    before, after = re.findall(r"```python\n(.*?)```", README, re.S)
    for code in (before, after):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        start = model[1].weight.detach().clone()
        x_adv, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        names = dict(torch=torch, engm=engm, F=functional, model=model, x=x_adv, y=y)
        names["attack"] = lambda model, x, y: x
        exec(code, names)
        assert isinstance(names["optimizer"], torch.optim.SGD)
        assert not torch.equal(model[1].weight, start)
    assert "engm.ENGM" in after
    assert len(set(after.splitlines()) - set(before.splitlines())) == 2


def test_links_within_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    import nbformat

    folders = (ROOT / "notebooks", ROOT / "results" / "plans")
    pages = {path: path.read_text() for folder in folders for path in folder.glob("*.md")}
    for path in notebooks.available():
        cells = nbformat.read(path, as_version=4).cells
        pages[path] = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for path, text in pages.items():
        for target in re.findall(r"\]\((?!https?:)([^)#\s\\]+)\)", text):
            assert (path.parent / target).exists(), (path.name, target)


@pytest.mark.parametrize("path", notebooks.available(), ids=lambda path: path.stem)
def test_notebooks_state_their_parameters_and_were_run(path):
    import nbformat

    assert check(path, {}) == {}
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(cell.cell_type == "markdown" for cell in cells) >= len(code) - 3
    assert path.stat().st_size < 300_000


def test_the_claims_stand_as_the_notebooks_left_them():
    import nbformat

    outcomes = ("the claim does not hold here", "the claim holds here", "not settled at this scale")
    for claim, numbers in {"C1": "02", "C2": "04", "C3": "05", "C4": "06 07", "C5": "08"}.items():
        found = set()
        for number in numbers.split():
            (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
            cells = nbformat.read(path, as_version=4).cells
            outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
            results = [o.data[notebooks.RESULT_TYPE] for o in outputs
                       if notebooks.RESULT_TYPE in o.get("data", {})]  # fmt: skip
            verdict = results[-1]["verdict"]  # may judge parts first
            found.add(max(outcomes, key=verdict.rfind))
        (outcome,) = found
        short = outcome.removeprefix("the claim ").removesuffix(" here").split(" at ")[0]
        assert re.search(rf"^\| {claim} \|.*\| \*\*{short}\*\*", README, re.M), (claim, short)


# a folder of runs with the commands of results/README.md that are about it
LOGS = {
    folder: [c for c in COMMANDS if Path(c[2]).parts[:2] == ("results", folder.name)]
    for folder in sorted((ROOT / "results").iterdir())
    if folder.is_dir() and next(folder.rglob("config.json"), None)
}


@pytest.mark.parametrize("folder", LOGS, ids=lambda folder: folder.name)
def test_the_tables_of_the_results_are_what_the_logs_give(folder, monkeypatch, capsys):
    from engm.cli import main

    monkeypatch.chdir(ROOT)
    shown = [ROOT / command[2] for command in LOGS[folder]]
    for config in folder.rglob("config.json"):
        assert any(config.is_relative_to(root) for root in shown), f"{config} is in no table"
    for command in LOGS[folder]:
        assert not {"--out", "--figures", "--logs"} & set(command), "a test writes nothing"
        main.main(command[1:], standalone_mode=False)
        printed = capsys.readouterr()
        assert "not finished" not in printed.err
        assert f"\n\n{printed.out.strip()}\n\n" in RESULTS + "\n", shlex.join(command)


def test_the_results_name_runs_that_are_there():
    assert LOGS
    assert sum(map(len, LOGS.values())) == len(COMMANDS)


def test_the_rows_that_are_ahead_or_behind_are_as_many_as_the_text_counts():
    from engm.report import run_report

    found = Counter()
    for folder in LOGS:
        with suppress(InputError):  # one without MSGD, or without all seeds
            built = run_report.build(collect(folder)[0], compare="msgd", choose=["lr"])
            for line in built.text("markdown").splitlines():
                cells = [cell.strip() for cell in line.strip("| ").split("|")]
                if cells[-1] in ("ahead", "behind"):
                    (which,) = {"robust (best)", "robust (last)"} & set(cells)
                    found[which, cells[-1]] += 1
    assert found == {
        ("robust (last)", "ahead"): 3,
        ("robust (last)", "behind"): 3,
        ("robust (best)", "behind"): 4,
    }
    text = " ".join(RESULTS.split())
    pairs = defaultdict(dict)
    for record in collect(ROOT / "results" / "cifar10-cpu")[0]:
        row = record.config.optimizer, record.config.lr
        if row in {("engm-input-only", 0.03), ("msgd", 0.3)} and record.config.seed:
            for at in ("last", "best"):
                pairs[at, record.config.seed][row[0]] = record.result[at]["robust_accuracy"]
    for at in ("last", "best"):
        found = [p["engm-input-only"] - p["msgd"] for (of, _), p in pairs.items() if of == at]
        low, high = stats.t.interval(0.95, 4, mean(found), stats.sem(found))
        assert len(found) == 5
        assert f"{100 * low:+.1f} to {100 * high:+.1f}" in text
    assert "At the last one, three of all the rows" in text and "are ahead of MSGD" in text
    assert "three others are behind, and at the best checkpoint four rows are behind" in text


def test_the_learning_rates_of_the_text_are_those_that_the_validation_images_choose():
    accuracies = defaultdict(list)
    for record in collect(ROOT / "results" / "digits")[0]:
        config = record.config
        if (config.scale, config.floor) == ("mean", 0.05):
            lines = read_metrics(record.folder)
            best = max(line["validation_robust_accuracy"] for line in lines)
            accuracies[config.optimizer, config.lr].append(best)
    chosen = {
        optimizer: max((mean(v), lr) for (name, lr), v in accuracies.items() if name == optimizer)[
            1
        ]
        for optimizer, _ in accuracies
    }
    assert chosen == {"msgd": 0.2, "msgd-clip": 0.3, "engm": 0.3, "engm-input": 0.3}
    assert "(0.2 for\nMSGD, 0.3 for ENGM)" in README


def test_verdicts_of_other_runs_of_notebooks_are_as_published():
    studies = sorted((ROOT / "results" / "studies").glob("*.result.json"))
    assert studies
    for path in studies:
        assert f'"{read_json(path)["verdict"]}"' in RESULTS, path


def test_the_plans_are_ready_to_run():
    counts = {}
    for path in (ROOT / "results" / "plans").glob("*.yaml"):
        tasks, out = read_plan(path)
        assert out.parent == Path("runs") and path.stem.startswith(out.name)
        counts[path.stem] = len(tasks)
        step = 4 / 255 if "cpu" in path.stem else 2 / 255  # of 5 steps, of 10
        assert all(task.settings["step_size"] == pytest.approx(step) for task in tasks)
    assert counts == {
        "cifar10-search": 20, "cifar10": 15, "cifar10-long": 6, "cifar10-methods": 12,
        "cifar10-precision": 12, "cifar100": 6, "tiny-imagenet": 4, "cifar10-cpu-rates": 20,
        "cifar10-cpu-more-rates": 5, "cifar10-cpu": 25, "cifar10-cpu-noise": 12,
        "cifar10-cpu-more-rows": 11, "cifar10-cpu-more-main": 10,
        "cifar10-cpu-augmented": 12, "tiny-imagenet-cpu": 12,
    }  # fmt: skip


def test_the_cost_tables_are_what_the_logs_give():
    written = (ROOT / "results" / "README.md").read_text()
    logs = sorted((ROOT / "results" / "bench").glob("*/bench.json"))
    assert logs
    for log in logs:
        assert tables.table(read_json(log)) in written, log
    shown = ROOT / "results" / "bench" / "cpu-group-width32" / "bench.json"
    (exact,) = [row for row in tables.table(read_json(shown)).splitlines() if "| exact |" in row]
    ratio = exact.split("|")[6].split()[0]  # of an AT-10 step
    assert f"takes {ratio} times as long" in README
