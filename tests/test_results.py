import csv
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from click.testing import CliRunner

import engm.report
from engm.attacks import PGD
from engm.cli import main
from engm.config import RunConfig
from engm.errors import InputError
from engm.evaluation.accuracy import attack_of, settings_of
from engm.evaluation.checks import Check
from engm.evaluation.suite import Accuracy, AttackResult, RobustnessReport
from engm.report import records as results
from engm.report.records import (
    Quantity,
    check_protocol,
    collect,
    costs,
    provenance,
    summarise,
    to_markdown,
)
from engm.report.run_report import build, copy_logs, labels
from engm.runs import read_json, write_json

LOGS = Path(__file__).parents[1] / "results"


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


def test_runs_on_data_that_share_only_a_title_are_not_averaged(tmp_path):
    for seed, digest in enumerate(("aa" * 32, None, "aa" * 32, "bb" * 32)):
        path = write_run(tmp_path, 0.5, seed=seed) / "result.json"
        write_json(path, read_json(path) | {"environment": {"data_sha256": digest}})
    with pytest.raises(InputError, match=r"caches of Digits .* \(data_sha256 aaaaaaaa, bbbbbbbb\)"):
        summarise(collect(tmp_path)[0])
    shutil.rmtree(path.parent)
    (row,) = summarise(collect(tmp_path)[0])
    assert row["gap"].n == 3


def test_unfinished_runs_are_left_out_and_named(tmp_path):
    write_run(tmp_path, 0.5)
    cut_off = write_run(tmp_path, None, seed=1)
    records, unfinished = collect(tmp_path)
    assert (len(records), unfinished) == (1, [cut_off])


def test_a_folder_without_runs_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="there is no run in .*engm train"):
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


def test_rows_that_differ_in_what_was_tested_alone_have_names_of_their_own(tmp_path):
    for seed, images in enumerate((797, 100)):
        add(write_run(tmp_path, 0.5, seed=seed), num_examples=images)
    done = build(records_of(tmp_path), mixed=True)
    axes = done.figures()["best_and_last"][1].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == labels(done.summary) == ["test images 100", "test images 797"]
    plt.close("all")


def test_rows_of_several_data_sets_are_not_named_by_what_goes_along_with_each():
    kinds = [("Digits", 0.15, "msgd"), ("Digits", 0.15, "engm"), ("CIFAR-10", 0.03, "engm")]
    rows = [{"dataset": d, "method": "pgd_at", "optimizer": o, "eps": e} for d, e, o in kinds]
    assert labels(rows) == ["Digits, msgd", "Digits, engm", "CIFAR-10, engm"]
    assert labels([*rows, rows[0] | {"eps": 0.1}])[-1] == "Digits, eps 0.1, msgd"
    assert labels(rows[:1]) == ["Digits, pgd_at, msgd"]  # nothing differs


def test_pages_have_no_column_of_what_goes_along_with_the_data(tmp_path):
    for data, dataset, eps in (("Digits", "digits", 0.15), ("CIFAR-10", "cifar10", 0.25)):
        for optimizer in ("msgd", "engm"):
            write_run(tmp_path, 0.5, data=data, dataset=dataset, eps=eps, optimizer=optimizer)
    done = build(records_of(tmp_path), mixed=True)
    for kind in ("html", "latex"):
        assert all(
            set(row) & {"dataset", "eps"} == {"dataset"} for row in done.parts(kind)["summary"]
        )
    (written,) = done.write(tmp_path / "r.tex")
    assert re.search("% CIFAR-10: .*eps 0.25.*\n% Digits: .*eps 0.15", written.read_text())
    assert "<li>CIFAR-10: " in done.text("html")
    assert "| eps |" in done.text("markdown") and ",eps," in done.text("csv")


def test_other_versions_and_machines_are_a_remark(tmp_path):
    for seed, (commit, torch) in enumerate((("a" * 40, "2.6"), ("a" * 40, "2.13"), (None, "2.6"))):
        environment = {"commit": commit, "packages": {"torch": torch, "engm": "1"}, "device": "cpu"}
        add(write_run(tmp_path, 0.5, seed=seed), environment=environment)
    assert provenance(records_of(tmp_path)) == [
        "the runs differ in commit aaaaaaaaaaaa (2 runs), unknown (1 run)",
        "the runs differ in torch 2.6 (2 runs), 2.13 (1 run)",
    ]
    check_protocol(records_of(tmp_path))


def test_a_frame_has_a_row_a_run_and_its_means_are_those_of_the_report(tmp_path):
    frame = engm.report.frame(LOGS / "digits")
    assert len(frame) == len(records_of(LOGS / "digits"))
    by = ["optimizer", "lr", "scale", "floor"]
    found = frame.groupby(frame[by].astype(str).agg(" ".join, axis=1))
    rows = summarise(records_of(LOGS / "digits"))
    assert len(rows) == len(found)
    for name in ("clean (best)", "robust (best)", "robust (last)", "gap"):
        means, deviations = found[name].mean(), found[name].std()
        for row in rows:
            unread = {"scale": "mean", "floor": 0.05}  # by MSGD; a row has None there
            key = " ".join(str(unread[name] if row[name] is None else row[name]) for name in by)
            assert row[name].mean == pytest.approx(means[key], abs=1e-12)
            assert row[name].deviation == pytest.approx(deviations[key], abs=1e-12)
    folder = evaluated(write_run(tmp_path, 0.61, last=0.6, seed=3, subset=50), 20)
    (row,) = engm.report.frame(str(tmp_path)).to_dict("records")
    assert set(RunConfig().to_dict()) <= set(row)
    assert (row["folder"], row["data"], row["subset"], row["seed"]) == (
        str(folder),
        "Digits",
        50,
        3,
    )
    assert (row["robust (best)"], row["robust (last)"]) == (0.61, 0.6)
    assert row["PGD-20 margin (best, 40 images)"] == 0.5


def test_the_logs_of_old_are_alike_with_those_of_attacks_that_have_got_settings_since(tmp_path):
    old = (
        "PGD(eps=0.1, step_size=0.05, num_steps=20, restarts=1, norm='linf', loss='ce', "
        "random_start=True, stop_early=True)"
    )
    today = PGD(eps=0.1, step_size=0.05, num_steps=20, stop_early=True)
    assert repr(today) != old
    for seed, attack in enumerate((old, repr(today), settings_of(today))):
        add(write_run(tmp_path, 0.5, seed=seed), attack=attack)
    records = collect(tmp_path)[0]
    check_protocol(records)
    (row,) = summarise(records)
    assert row["gap"].n == 3
    for stronger in (repr(replace(today, decay=True)), settings_of(replace(today, num_steps=21))):
        add(write_run(tmp_path, 0.5, seed=3), attack=stronger)
        with pytest.raises(InputError, match="attack PGD.*decay=False.* \\(3 runs\\)"):
            check_protocol(collect(tmp_path)[0])


def test_rows_that_do_no_better_than_guessing_are_marked(tmp_path):
    for seed, (best, last) in enumerate(((0.6, 0.1), (0.15, 0.12), (0.5, 0.4))):
        write_run(tmp_path, best, last=last, seed=seed)
    write_run(tmp_path, 0.0, method="natural")
    write_run(tmp_path, 0.16, optimizer="engm")
    write_run(tmp_path, 0.02, data="CIFAR-100", dataset="cifar100", eps=0.15)
    write_run(tmp_path, 0.3, data="two", dataset="cifar100", classes=2, eps=0.15)
    done = build(records_of(tmp_path), mixed=True)
    named = {(row["method"], row["optimizer"], row["dataset"]): n
             for row, n in zip(done.summary, done.notes, strict=True)}  # fmt: skip
    note = "near chance: best in 1, last in 2 of 3 seeds"
    assert named.pop(("pgd_at", "msgd", "Digits")) == note
    assert named.pop(("pgd_at", "msgd", "two")) == "near chance: best in 1, last in 1 of 1 seeds"
    assert set(named.values()) == {""}
    assert [remark for remark in done.remarks if note in remark]
    assert "near chance: a robust accuracy of at most 1.5 times" in done.remarks[-1]
    for kind in ("html", "latex", "csv"):
        assert note in done.text(kind)
    assert note not in done.text("markdown")
    done.write(tmp_path / "r.md")
    assert note in (tmp_path / "r.md").read_text()


def test_all_committed_runs_were_evaluated_alike():
    folders = [LOGS / name for name in ("digits", "methods", "awp-without-warmup")]
    check_protocol([record for folder in folders for record in collect(folder)[0]])


def evaluated(folder, margin, worst=None, which="best", autoattack=None, **other):
    """Writes what `engm evaluate` would; accuracies as counts of images."""
    config, n = RunConfig.from_dict(read_json(folder / "config.json")), other.get("images", 40)
    what = {"steps": 20, "eps": config.eps, "settings": "20 steps", "flags": ()} | other
    attacks = [("FGSM", n, "one step"), (f"PGD-{what['steps']} margin", margin, what["settings"])]
    attacks.append((f"PGD-{what['steps']} margin, 5 starts", margin, "5 starts"))
    attacks += [("AutoAttack", autoattack, "standard: apgd-ce")] * (autoattack is not None)
    report = RobustnessReport(
        eps=what["eps"],
        norm=config.norm,
        clean=Accuracy(n, n),
        attacks=tuple(AttackResult(a, Accuracy(k, n), how, 0.1, None) for a, k, how in attacks),
        worst=Accuracy(min(margin, autoattack or n) if worst is None else worst, n),
        curve={},
        along="PGD on the margin",
        checks=tuple(
            Check(c, c not in what["flags"], "")
            for c in ("large eps", "loss", "warnings of AutoAttack")
        ),
        skipped={},
        autoattack=None if autoattack is None else {},
        seed=config.seed,
        environment={},
    )
    what = {"checkpoint": which, "epoch": other.get("epoch", 1)}
    write_json(folder / f"evaluation-{which}.json", what | report.to_dict())
    return folder


def test_what_stronger_attacks_left_gets_columns_of_its_own(tmp_path):
    for seed, (margin, strong) in enumerate(((20, 16), (24, 18), (28, 20))):
        folder = evaluated(
            write_run(tmp_path, 0.6, seed=seed), margin, strong - 1, autoattack=strong
        )
        evaluated(folder, margin - 8, which="last")
    write_run(tmp_path, 0.7, optimizer="engm")
    records = records_of(tmp_path)
    done = build(records)
    engm, msgd = done.summary
    new = [name for name in msgd if name not in summarise(records)[0]]
    assert new == [
        "PGD-20 margin (best, 40 images)",
        "AutoAttack (best, 40 images)",
        "worst case with AutoAttack (best, 40 images)",
        "PGD-20 margin (last, 40 images)",
        "worst case (last, 40 images)",
        "seeds",
    ]
    assert list(msgd)[-7] == "gap"
    means = [0.6, 0.45, 0.425, 0.4, 0.4]
    assert [msgd[name].mean for name in new[:-1]] == pytest.approx(means)
    assert [msgd[name].deviation for name in new[:2]] == pytest.approx([0.1, 0.05])
    assert [engm[name] for name in new[:-1]] == ["-"] * 5
    assert not any("seeds evaluated" in r or "flag" in r for r in done.remarks)
    lines = done.text("markdown").splitlines()
    assert "| gap | PGD-20 margin (best, 40 images) | AutoAttack" in lines[0]
    assert "| - | - | - | - | - | 1 |" in lines[2]
    assert "| 60.0 ± 10.0 | 45.0 ± 5.0 |" in lines[3]
    (first, second) = csv.DictReader(done.text("csv").splitlines())
    assert first["AutoAttack (best, 40 images) mean"] == ""
    assert float(second["AutoAttack (best, 40 images) sd"]) == pytest.approx(0.05)
    done.write(tmp_path / "out")
    runs = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines()))
    assert [run["AutoAttack (best, 40 images)"] for run in runs] == ["", "0.4", "0.45", "0.5"]


@pytest.mark.parametrize(
    ("other", "head"),
    [
        ({"images": 80}, "PGD-20 margin (best, 80 images)"),
        ({"eps": 0.1}, "PGD-20 margin (best, 40 images, linf eps 0.1)"),
        ({"steps": 50}, "PGD-50 margin (best, 40 images)"),
        ({"steps": 50}, "worst case (best, 40 images, PGD-50)"),
        ({"autoattack": 20}, "worst case with AutoAttack (best, 40 images)"),
    ],
)
def test_accuracies_of_different_things_are_in_no_mean_together(tmp_path, other, head):
    for seed in (0, 1):
        evaluated(write_run(tmp_path, 0.6, seed=seed), 20 + 4 * seed)
    evaluated(write_run(tmp_path, 0.6, seed=2), 40, **other)
    rows, remarks = results.evaluated(records_of(tmp_path))
    (row,) = rows
    kind = "worst case" if "worst" in head else "PGD-20 margin"
    assert row[head].n == 1
    assert row[f"{kind} (best, 40 images)"] == Quantity.of([0.5, 0.6])
    assert any("1 of 3 seeds evaluated for" in r and head in r for r in remarks)


def test_settings_that_a_head_does_not_tell_are_refused(tmp_path):
    evaluated(write_run(tmp_path, 0.6), 20)
    evaluated(write_run(tmp_path, 0.6, optimizer="engm"), 20, settings="20 constant steps")
    records = records_of(tmp_path)
    with pytest.raises(
        InputError, match="not attacked alike for PGD-20 margin .*20 constant steps"
    ):
        build(records)
    # rows of their own are no mean
    assert len(build(records, mixed=True).summary) == 2
    evaluated(write_run(tmp_path, 0.6, seed=1), 20, settings="20 constant steps")
    with pytest.raises(InputError, match=r"linf eps 0.15; PGD-20 margin: 20 steps against"):
        build(records_of(tmp_path), mixed=True)


def test_seeds_that_were_not_evaluated_and_flags_are_said(tmp_path):
    for seed in range(3):
        folder = write_run(tmp_path, 0.6, seed=seed)
        if seed == 1:
            evaluated(folder, 20, flags=("large eps",))
        if seed == 2:
            evaluated(folder, 20, autoattack=12, flags=("large eps", "warnings of AutoAttack"))
    _, remarks = results.evaluated(records_of(tmp_path))
    assert remarks[1:] == [
        "Digits, pgd_at, msgd: 2 of 3 seeds evaluated for PGD-20 margin (best, 40 images)",
        "Digits, pgd_at, msgd: 1 of 3 seeds evaluated for AutoAttack (best, 40 images), worst case "
        "(best, 40 images), worst case with AutoAttack (best, 40 images)",
        "evaluations in which a check raised a flag: large eps (2), warnings of AutoAttack (1)",
    ]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("worst", {"count": 10, "accuracy": 0.5}),
        ("worst", {"count": 80, "accuracy": 2.0}),
        ("worst", 0.5),
        ("num_examples", 0),
        ("num_examples", "40"),
        ("attacks", {"FGSM": {"settings": ""}}),
        ("attacks", []),
        ("checks", None),
        ("eps", None),
    ],
)
def test_a_file_that_is_no_evaluation_is_named(tmp_path, part, value):
    path = evaluated(write_run(tmp_path, 0.6), 20) / "evaluation-best.json"
    write_json(path, read_json(path) | {part: value})
    with pytest.raises(
        InputError, match=r"evaluation-best.json is not what .engm evaluate. writes"
    ):
        build(records_of(tmp_path))
    path.write_text("[]")
    with pytest.raises(InputError, match="delete it, and evaluate the run again"):
        build(records_of(tmp_path))


def test_what_engm_evaluate_writes_is_read(tmp_path):
    from engm import data
    from engm.evaluation.suite import evaluate_checkpoint
    from engm.training import fit

    found = []
    for seed in (0, 1):
        small = dict(subset=40, width=4, epochs=1, eval_steps=2, seed=seed)
        run = fit(RunConfig(**small), tmp_path, device="cpu", progress=False)
        found.append(evaluate_checkpoint(run.folder, "last", data.load("digits"), images=30))
    tested = read_json(run.folder / "result.json")["last"]
    assert tested["attack"] == {"kind": "PGD", **asdict(attack_of(run.config))}
    done = build(records_of(tmp_path))
    (row,) = done.summary
    for head, of in (
        ("worst case (last, 30 images)", lambda report: report.worst),
        ("PGD-2 margin (last, 30 images)", lambda report: report.attacks[2].accuracy),
    ):
        assert row[head] == Quantity.of([of(report).fraction for report in found])
    flagged = {check.name for report in found for check in report.flags}
    assert all(name in "".join(done.remarks) for name in flagged)


def test_costs_are_medians_over_epochs_and_seeds_with_where_it_ran(tmp_path):
    times = {("msgd", 0): [9.0, 2.0, 4.0], ("msgd", 1): [3.0, 1.0, 8.0], ("engm", 0): None}
    for (optimizer, seed), seconds in times.items():
        commit = "a" * 40 if seed == 0 else "b" * 40 + "-dirty"
        machine = {"commit": commit, "packages": {"torch": "2.13"}, "device": "GPU"}
        folder = write_run(tmp_path, 0.5, optimizer=optimizer, precision="bfloat16", seed=seed)
        add(folder, environment=machine)
        lines = [{"epoch": i, "seconds": s} for i, s in enumerate(seconds or [])]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert costs(records_of(tmp_path)) == [
        {
            **{"dataset": "Digits", "method": "pgd_at", "optimizer": "engm"},
            **{"seconds an epoch": "", "epochs an hour": "", "device": "GPU", "torch": "2.13"},
            **{"commit": "a" * 12, "seeds": 1},
        },
        {
            **{"dataset": "Digits", "method": "pgd_at", "optimizer": "msgd"},
            **{"seconds an epoch": 3.5, "epochs an hour": 3600 / 3.5, "device": "GPU"},
            **{"torch": "2.13", "commit": "a" * 12 + ", " + "b" * 12 + "-dirty", "seeds": 2},
        },
    ]
    write_run(tmp_path, 0.5, optimizer="msgd")
    assert [row["precision"] for row in costs(records_of(tmp_path))] == [
        *("bfloat16", "bfloat16", "float32")
    ]
    done = build(records_of(tmp_path), compare="precision=float32", costs=True)
    text = done.text("markdown")
    assert text.count("\n\n| dataset |") == 2
    assert text.index("| outcome |") < text.index("| seconds an epoch |")
    assert "| 3.5 | 1029 | GPU |" in text
    for kind in ("latex", "html", "csv"):
        assert "seconds an epoch" in done.text(kind)
    names = [path.name for path in done.write(tmp_path / "table.csv")]
    assert names == ["table.csv", "table-differences.csv", "table-costs.csv"]
    written = list(csv.DictReader((tmp_path / "table-costs.csv").read_text().splitlines()))
    assert float(written[1]["epochs an hour"]) == 3600 / 3.5
    assert "What the runs took" in done.text("html")
    assert any(remark.startswith("seconds an epoch") for remark in done.remarks)
    assert "seconds" not in build(records_of(tmp_path)).text("markdown")


def test_logs_are_copied_without_what_is_large_and_give_the_same_report(tmp_path):
    for seed in (0, 1):
        folder = evaluated(write_run(tmp_path / "runs", 0.5, seed=seed), 20)
        (folder / "metrics.jsonl").write_text(
            '{"epoch": 1, "seconds": 1.0, "validation_robust_accuracy": 0.5}\n'
        )
        (folder / "checkpoint-best.pt").write_bytes(b"weights")
        (folder / "evaluation-best").mkdir()
        (folder / "robustness-best.png").write_bytes(b"picture")
    write_run(tmp_path / "runs", None, seed=2)
    command = ["report", str(tmp_path / "runs"), "--costs", "--logs", str(tmp_path / "logs")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    folders = sorted((tmp_path / "logs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == [
            *("config.json", "evaluation-best.json", "metrics.jsonl", "result.json")
        ]
        assert f"written to {folder}" in result.output
        for path in folder.iterdir():
            own = tmp_path / "runs" / folder.name / path.name
            assert path.read_bytes() == own.read_bytes()
    texts = [build(records_of(tmp_path / name), costs=True).text("markdown")
             for name in ("runs", "logs")]  # fmt: skip
    assert texts[0] == texts[1]


def test_logs_go_over_no_other_run(tmp_path):
    runs, logs = tmp_path / "runs", tmp_path / "logs"
    first, second = (write_run(runs, 0.5, seed=seed) for seed in (0, 1))
    (first / "metrics.jsonl").write_text("{}\n")
    copy_logs(records_of(runs)[:1], logs)
    # the same run again: what is new comes along, and the copy of a copy is the copy
    evaluated(first, 20)
    copy_logs(records_of(runs)[:1], logs)
    evaluated(first, 24)
    copy_logs(records_of(runs)[:1], logs)
    there = logs / first.name
    copy_logs(records_of(logs), logs)
    assert (there / "evaluation-best.json").read_bytes() == (
        (first / "evaluation-best.json").read_bytes()
    )
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    for name in ("config.json", "metrics.jsonl", "result.json"):
        own = first / name
        kept = own.read_bytes()
        own.write_bytes(kept + b" \n" if name != "metrics.jsonl" else b'{"epoch": 1}\n')
        with pytest.raises(InputError, match=f"{first.name} is, or would be, the place of another"):
            copy_logs(records_of(runs), logs)
        assert {path.name: path.read_bytes() for path in there.iterdir()} == before
        assert not (logs / second.name).exists()
        own.write_bytes(kept)
    (first / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="choose another folder for the logs"):
        copy_logs(records_of(runs), logs)
    # other data under the same config would share the folder
    write_run(tmp_path / "jpeg", 0.5, data="Digits (JPEG)")
    with pytest.raises(InputError, match="place of another"):
        copy_logs([*records_of(runs)[:1], *records_of(tmp_path / "jpeg")], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_evaluation_of_a_run_that_went_on_afterwards_is_left_out(tmp_path):
    folder = write_run(tmp_path, 0.6)
    scores = enumerate((0.3, 0.5, 0.5, 0.4), start=1)
    lines = [json.dumps({"epoch": e, "validation_robust_accuracy": r}) for e, r in scores]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    evaluated(folder, 20, epoch=2)
    evaluated(folder, 28, epoch=2, which="last")
    done = build(records_of(tmp_path))
    assert "PGD-20 margin (best, 40 images)" in done.summary[0]
    assert not any("(last, 40 images" in name for name in done.summary[0])
    (remark,) = [remark for remark in done.remarks if "left out" in remark]
    assert "evaluation-last.json is of epoch 2, and the last checkpoint of epoch 4" in remark
    evaluated(folder, 28, epoch=4, which="last")
    shutil.copy(folder / "evaluation-last.json", folder / "evaluation-last-2.json")
    done = build(records_of(tmp_path))
    assert "PGD-20 margin (last, 40 images)" in done.summary[0]
    (remark,) = [remark for remark in done.remarks if "left out" in remark]
    assert "evaluation-last-2.json, beside evaluation-last.json, which has something" in remark
