from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engm.config import RunConfig
from engm.errors import InputError
from engm.runs import write_json
from engm.sweep.plan import TRAIN, parse_grid, plan, read_plan


def notebook(folder, *cells):
    tags = [["parameters"]] + [[]] * len(cells)
    path = folder / "toy.ipynb"
    content = [
        {
            "cell_type": "code",
            "id": f"c{index}",
            "metadata": {"tags": tags[index]},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for index, source in enumerate(cells)
    ]
    write_json(path, {"cells": content, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    return path


def test_a_grid_makes_one_task_for_each_combination_and_seed():
    grid = {"optimizer": ["msgd", "engm"], "lr": ["0.1", "1e-2"], "eps": ["8/255"]}
    tasks = plan(TRAIN, grid, settings={"epochs": "3", "compile": "false"}, seeds=2)
    assert len(tasks) == len({task.name for task in tasks}) == 8
    first = RunConfig(optimizer="msgd", lr=0.1, eps=8 / 255, epochs=3, seed=0)
    assert tasks[0].settings == first.resolved().to_dict()
    assert tasks[0].name == first.name
    assert [task.settings["seed"] for task in tasks] == [0, 1] * 4


def test_a_setting_that_one_grid_of_a_plan_reads_may_be_that_of_all(tmp_path):
    path = tmp_path / "plan.yaml"
    text = "run: train\nsettings: {floor: 1}\ngrid: [{optimizer: msgd}, {optimizer: %s}]\n"
    path.write_text(text % "engm")
    assert [task.settings["floor"] for task in read_plan(path)[0]] == [0.05, 1.0]
    path.write_text(text % "msgd-clip")
    with pytest.raises(InputError, match=r"\(msgd, msgd-clip\) reads floor; leave it out"):
        read_plan(path)


def test_the_same_run_is_one_task_whatever_way_it_is_written():
    assert len(plan(TRAIN, {"lr": ["0.1", "1e-1", 0.1]})) == 1
    assert len(plan(TRAIN, {"subset": ["none", 5]})) == 2
    # MSGD does not read a floor
    tasks = plan(TRAIN, {"optimizer": ["msgd", "engm"], "floor": [0.05, 1]})
    assert [(t.settings["optimizer"], t.settings["floor"]) for t in tasks] == [
        ("msgd", 0.05),
        ("engm", 0.05),
        ("engm", 1.0),
    ]
    words = {"model_norm": "none", "augment": "none", "subset": "none", "scale": "mean"}
    [task] = plan(TRAIN, {}, settings={"model": "preact_resnet18"} | words)
    assert {name: task.settings[name] for name in words} == words | {"subset": None}


@pytest.mark.parametrize(
    ("grid", "more", "reason"),
    [
        ({"lrr": ["0.1"]}, {}, "did you mean lr"),
        ({"lr": ["fast"]}, {}, "lr must be a finite number, got 'fast'"),
        ({"optimizer": ["adam"]}, {}, "one of msgd"),
        ({"epochs": ["2.5"]}, {}, "epochs must be a whole number"),
        ({"lr": []}, {}, "the grid has no value for lr"),
        ({"lr": ["0.1"]}, {"settings": {"lr": 0.2}}, "in the grid and fixed as well"),
        ({"seed": ["1"]}, {"seeds": 3}, "seed is given twice"),
        ({}, {"seeds": True}, "seeds must be a whole number"),
        ({}, {"seeds": 0}, "seeds must be a whole number, 1 or more"),
        ({"method": ["pgd_at", "trades"]}, {"settings": {"beta": 6}}, "pgd_at has none"),
        ({"max_norm": ["1", "2"]}, {"settings": {"optimizer": "engm"}}, "no optimizer .* max_norm"),
        ({"lr": ["1", "2"]}, {"settings": {"scale": "2"}}, r"no optimizer .*\(msgd\) reads scale"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(grid, more, reason):
    with pytest.raises(InputError, match=reason):
        plan(TRAIN, grid, **more)


def test_a_notebook_that_takes_seeds_gets_them_all_and_one_that_takes_a_seed_runs_for_each(
    tmp_path,
):
    path = notebook(tmp_path, 'lr: float = 0.1\nseeds: list[int] = [0]\nkind: str = "a"')
    tasks = plan(str(path), {"lr": ["0.1", "1/4"]}, seeds=3)
    assert [t.settings for t in tasks] == [
        {"lr": 0.1, "seeds": [0, 1, 2]},
        {"lr": 0.25, "seeds": [0, 1, 2]},
    ]
    assert all(task.name.startswith("toy-") for task in tasks)
    path = notebook(tmp_path, "seed: int = 0")
    assert [t.settings for t in plan(str(path), {}, seeds=2)] == [{"seed": 0}, {"seed": 1}]


def test_another_notebook_is_another_task(tmp_path):
    path = notebook(tmp_path, "lr: float = 0.1")
    before = plan(str(path), {"lr": [0.2]})
    assert plan(str(path), {"lr": ["0.2"]}) == before
    notebook(tmp_path, "lr: float = 0.1\nmore: int = 1")
    assert plan(str(path), {"lr": [0.2]})[0].name != before[0].name
    with pytest.raises(InputError, match="there is no parameter 'rate'"):
        plan(str(path), {"rate": ["0.2"]})


def test_a_grid_is_read_from_texts():
    found = parse_grid(["optimizer=msgd, engm", "seeds=[0, 1],[2]", "eps=8/255"])
    assert found == {"optimizer": ["msgd", "engm"], "seeds": ["[0, 1]", "[2]"], "eps": ["8/255"]}


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["lr"], "write NAME=VALUE"),
        (["=3"], "write NAME"),
        (["a=1", "a=2"], "a is in the grid twice"),
    ],
)
def test_a_text_that_is_no_grid_is_refused(texts, reason):
    with pytest.raises(InputError, match=reason):
        parse_grid(texts)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        grid = parse_grid([text])
    except InputError:
        return
    assert all(isinstance(value, str) and value for values in grid.values() for value in values)


def test_a_plan_is_read_from_a_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "run: train\nout: runs/x\nseeds: 2\nsettings: {epochs: 4, subset: none}\n"
        "grid:\n  lr: [0.1, 1e-2]\n  eps: 8/255\n"
    )
    tasks, out = read_plan(path)
    assert out == Path("runs/x")
    grid = {"lr": [0.1, 0.01], "eps": [8 / 255]}
    assert tasks == plan(TRAIN, grid, settings=dict(epochs=4), seeds=2)


def test_a_plan_may_have_several_grids(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "run: train\nseeds: 2\ngrid:\n- {optimizer: [msgd, engm], lr: 0.1}\n"
        "- {optimizer: engm, lr: [0.1, 0.3]}\n"
    )
    tasks, _ = read_plan(path)
    found = [tuple(task.settings[k] for k in ("optimizer", "lr", "seed")) for task in tasks]
    wanted = [("msgd", 0.1), ("engm", 0.1), ("engm", 0.3)]  # each of them once
    assert found == [(*pair, seed) for pair in wanted for seed in (0, 1)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- 1", "must say `run: train`"),
        ("run: 3", "must say `run: train`"),
        ("run: train\nseed: 3", "a plan has run, out, seeds, settings, grid"),
        ("run: train\nseeds: many", "seeds in .* must be a whole number, got 'many'"),
        ("run: train\nseeds: yes", "seeds in .* must be a whole number, got True"),
        ("run: train\nseeds: 1\nseeds: 2", "has 'seeds' twice; leave one of them out"),
        ("run: train\ngrid: {lr: 0.1, eps: 0.1, lr: 0.2}", "has 'lr' twice"),
        ("run: train\ngrid: [{lr: 0.1}, 1]", "grid in .* must be names and values"),
        ("run: train\nout: [1]", "out in .* must be text"),
        ("run: [", "is not YAML"),
        ("run: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("run: train\ngrid: {lr: [slow]}", "lr must be a finite number"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, reason):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_plan(path)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_file_is_read_or_refused(content):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.yaml")
        path.write_bytes(content)
        with pytest.raises(InputError):
            read_plan(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no file .*plan.yaml"):
        read_plan(tmp_path / "plan.yaml")
