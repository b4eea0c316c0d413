from dataclasses import replace
from pathlib import Path

import pytest

from engm.attacks import PGD
from engm.config import RunConfig
from engm.errors import InputError
from engm.files import read_json, write_json
from engm.results import (
    Quantity,
    check_protocol,
    collect,
    one_line_a_run,
    provenance,
    summarise,
    to_markdown,
)


def write_run(root, robust, last=None, clean=0.9, data="Digits", **settings):
    config = RunConfig(**settings).resolved()
    folder = root / config.name
    write_json(folder / "config.json", config.to_dict())
    if robust is not None:
        last = robust if last is None else last
        write_json(
            folder / "result.json",
            {
                "data": data,
                "best": {"clean_accuracy": clean, "robust_accuracy": robust},
                "last": {"clean_accuracy": clean, "robust_accuracy": last},
                "robust_overfitting_gap": robust - last,
            },
        )
    return folder


def test_seeds_share_a_row_with_mean_and_sample_deviation(tmp_path):
    for seed, robust in enumerate((0.60, 0.64, 0.68)):
        write_run(tmp_path, robust, last=robust - 0.1, seed=seed)
    write_run(tmp_path, 0.7, optimizer="engm", lr=0.2)
    records, unfinished = collect(tmp_path)
    assert (len(records), unfinished) == (4, [])
    assert [r.folder for r in records] == sorted(r.folder for r in records)
    rows = {row["optimizer"]: row for row in summarise(records)}
    assert rows["msgd"]["robust (best)"].mean == pytest.approx(0.64)
    assert rows["msgd"]["robust (best)"].deviation == pytest.approx(0.04)
    assert rows["msgd"]["robust (last)"].mean == pytest.approx(0.54)
    assert rows["msgd"]["gap"].mean == pytest.approx(0.1)
    assert rows["engm"]["robust (best)"] == Quantity(0.7, None, 1)
    assert to_markdown([rows["msgd"]]).splitlines()[2] == (
        "| Digits | pgd_at | msgd | 0.1 | 90.0 ± 0.0 | 64.0 ± 4.0 | 90.0 ± 0.0 | 54.0 ± 4.0 "
        "| 10.0 ± 0.0 | 3 |"
    )


def test_runs_that_differ_in_anything_else_are_never_averaged(tmp_path):
    for number, settings in enumerate(({}, {"eval_steps": 30}, {"epochs": 7}, {"eps": 0.1})):
        write_run(tmp_path / str(number), 0.5, **settings)
    write_run(tmp_path / "jpeg", 0.5, data="Digits (JPEG)")
    rows = summarise(collect(tmp_path)[0])
    assert len(rows) == 5
    assert {"eval_steps", "epochs", "eps"} <= set(rows[0])


def test_a_table_says_what_the_runs_are_and_in_what_they_differ(tmp_path):
    assert to_markdown([]) == "no finished run\n"
    alone = summarise(collect(write_run(tmp_path, 0.5))[0])
    assert list(alone[0])[:3] == ["dataset", "method", "optimizer"]
    write_run(tmp_path, 0.5, eps=8 / 255)
    table = to_markdown(summarise(collect(tmp_path)[0])).splitlines()
    assert "| dataset | method | eps | step_size | optimizer | clean (best) |" in table[0]
    assert sorted(line.split(" | ")[2] for line in table[2:]) == ["0.03137", "0.15"]


def test_one_run_never_counts_twice(tmp_path):
    for name in ("first", "copy"):
        write_run(tmp_path / name, 0.5)
    with pytest.raises(InputError, match="copy.* and .*first.* hold the same run"):
        summarise(collect(tmp_path)[0])


def test_unfinished_runs_are_left_out_and_named(tmp_path):
    write_run(tmp_path, 0.5)
    cut_off = write_run(tmp_path, None, seed=1)
    records, unfinished = collect(tmp_path)
    assert (len(records), unfinished) == (1, [cut_off])


def test_a_folder_without_runs_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="there is no run in .*engm train --out"):
        collect(tmp_path)


def test_rows_are_sorted_by_what_they_differ_in(tmp_path):
    for lr, scale in ((0.3, "mean"), (0.05, "mean"), (0.1, 2.0), (0.1, "mean")):
        write_run(tmp_path, 0.5, optimizer="engm", lr=lr, scale=scale)
    rows = summarise(collect(tmp_path)[0])
    assert [(row["lr"], row["scale"]) for row in rows] == [
        *((0.05, "mean"), (0.1, 2.0), (0.1, "mean"), (0.3, "mean"))
    ]


def add(folder, **facts):
    result = read_json(folder / "result.json")
    for which in ("best", "last"):
        result[which] |= facts
    write_json(folder / "result.json", result | {"environment": facts.get("environment", {})})


def records_of(root):
    return collect(root)[0]


def test_runs_that_were_evaluated_alike_are_one_protocol_whatever_else_differs(tmp_path):
    for settings in (
        {},
        {"optimizer": "engm"},
        {"lr": 0.2, "epochs": 3},
        {"subset": 50, "seed": 1},
    ):
        add(write_run(tmp_path, 0.5, **settings), num_examples=797, attack="PGD(20)")
    check_protocol(records_of(tmp_path))
    check_protocol([])


@pytest.mark.parametrize(
    ("other", "facts", "message"),
    [
        ({"eps": 0.1}, {}, r"eps 0.15 \(2 runs\), 0.1 \(1 run\)"),
        ({"norm": "l2", "eps": 0.15}, {}, r"norm linf \(2 runs\), l2 \(1 run\)"),
        ({"eval_steps": 50}, {}, r"eval_steps 20 \(2 runs\), 50 \(1 run\)"),
        ({"data": "Digits (JPEG)"}, {}, r"data Digits \(2 runs\), Digits \(JPEG\) \(1 run\)"),
        ({}, {"num_examples": 100}, r"test images 797 \(2 runs\), 100 \(1 run\)"),
        ({}, {"attack": "FGSM"}, r"attack PGD\(20\) \(2 runs\), FGSM \(1 run\)"),
        ({"eps": 0.15 + 1e-9}, {}, "eps 0.15 .*0.150000001"),
    ],
)
def test_runs_that_were_not_evaluated_alike_are_named_and_stay_apart(
    tmp_path, other, facts, message
):
    same = {"num_examples": 797, "attack": "PGD(20)"}
    for seed in (0, 1):
        add(write_run(tmp_path / "a", 0.5, seed=seed), **same)
    add(write_run(tmp_path / "b", 0.7, seed=2, **other), **same | facts)
    records = records_of(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        check_protocol(records)
    assert "--mixed" in str(caught.value)
    rows = summarise(records)
    assert sorted(row["gap"].n for row in rows) == [1, 2]
    named = {"data": "dataset", "num_examples": "test images"}
    (differing,) = {**other, **facts} if len({**other, **facts}) == 1 else {"norm"}
    name = named.get(differing, differing)
    assert len({row[name] for row in rows}) == 2


def test_an_attack_in_words_is_no_column_beside_the_setting_that_changed_it(tmp_path):
    add(write_run(tmp_path, 0.5), attack="PGD(20)")
    add(write_run(tmp_path, 0.5, eval_steps=50), attack="PGD(50)")
    with pytest.raises(InputError, match="eval_steps") as caught:
        check_protocol(records_of(tmp_path))
    assert "PGD" not in str(caught.value)
    rows = summarise(records_of(tmp_path))
    assert "eval_steps" in rows[0]
    assert "attack" not in rows[0]


def test_other_versions_and_machines_are_a_remark(tmp_path):
    for seed, (commit, torch) in enumerate((("a" * 40, "2.6"), ("a" * 40, "2.13"), (None, "2.6"))):
        environment = {"commit": commit, "packages": {"torch": torch, "engm": "1"}, "device": "cpu"}
        add(write_run(tmp_path, 0.5, seed=seed), environment=environment)
    assert provenance(records_of(tmp_path)) == [
        "the runs differ in commit aaaaaaaaaaaa (2 runs), unknown (1 run)",
        "the runs differ in torch 2.6 (2 runs), 2.13 (1 run)",
    ]
    check_protocol(records_of(tmp_path))


def test_every_run_has_a_line_with_all_of_its_settings(tmp_path):
    folder = write_run(tmp_path, 0.61, last=0.6, seed=3, lr=0.2)
    (row,) = one_line_a_run(records_of(tmp_path))
    assert row["folder"] == str(folder)
    assert set(RunConfig().to_dict()) <= set(row)
    assert (row["seed"], row["lr"], row["robust (best)"], row["robust (last)"]) == (
        3,
        0.2,
        0.61,
        0.6,
    )


def test_the_logs_of_old_are_alike_with_those_of_attacks_that_have_got_settings_since(tmp_path):
    old = (
        "PGD(eps=0.1, step_size=0.05, num_steps=20, restarts=1, norm='linf', loss='ce', "
        "random_start=True, stop_early=True)"
    )
    today = PGD(eps=0.1, step_size=0.05, num_steps=20, stop_early=True)
    assert repr(today) != old
    add(write_run(tmp_path, 0.5), attack=old)
    add(write_run(tmp_path, 0.5, seed=1), attack=repr(today))
    records = collect(tmp_path)[0]
    check_protocol(records)
    (row,) = summarise(records)
    assert row["gap"].n == 2
    stronger = repr(replace(today, decay=True))
    add(write_run(tmp_path, 0.5, seed=2), attack=stronger)
    with pytest.raises(InputError, match="attack PGD.*decay=False.* \\(2 runs\\)"):
        check_protocol(collect(tmp_path)[0])


def test_all_committed_runs_were_evaluated_alike():
    logs = Path(__file__).parents[1] / "results"
    folders = [logs / name for name in ("digits", "methods", "awp-without-warmup")]
    check_protocol([record for folder in folders for record in collect(folder)[0]])
