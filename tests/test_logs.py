"""What the notebooks show of committed runs."""

import json

import pytest

from engm.lab import logs


def test_committed_runs_are_those_of_the_defaults():
    records = logs.committed("digits", "methods", "not there")
    assert {(r.config.scale, r.config.floor) for r in records} == {("mean", 0.05)}
    methods = {logs.method_of(r) for r in records}
    assert methods == {"PGD-AT", "TRADES", "MART", "FAST-AT", "AWP"}
    assert logs.committed("not there") == []


@pytest.mark.parametrize(
    ("chosen", "tried", "said"),
    [
        (0.3, [0.1, 0.2, 0.3], "the largest that was tried"),
        (0.1, {0.3, 0.1}, "the smallest that was tried"),
        (0.2, [0.3, 0.1, 0.2], ""),
        (0.1, [0.1], "the smallest that was tried and the largest that was tried"),
    ],
)
def test_the_ends_of_a_grid_are_named(chosen, tried, said):
    assert logs.end_of_grid(chosen, tried) == said


def test_a_verdict_is_the_newest_run_s_else_the_saved_one(tmp_path, monkeypatch):
    run, (text, source) = (
        tmp_path / "outputs",
        logs.verdict_of("08_overfitting_and_sensitivity", []),
    )
    assert source == "as saved" and "at this scale" in text
    monkeypatch.setattr(logs, "kit", lambda name: tmp_path / name)
    assert logs.verdict_of("04_convergence", [run]) == ("not run yet", "engm run 04_convergence")
    data = [{logs.RESULT_TYPE: {"verdict": word}} for word in ("first", "last")]
    cells = [{"cell_type": "markdown"}, {"outputs": [{"data": d} for d in data] + [{"text": "x"}]}]
    for folder in ("notebooks", "outputs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notebooks" / "04_convergence.ipynb").write_text(json.dumps({"cells": cells}))
    assert logs.verdict_of("04_convergence", [run]) == ("last", "as saved")
    file = run / "04_convergence.result.json"
    file.write_text('{"verdict": "of the run"}')
    assert logs.verdict_of("04_convergence", [tmp_path, run]) == ("of the run", file.name)
