"""What the notebooks show of committed runs."""

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
