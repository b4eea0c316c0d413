import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from test_results import write_run

from engm.config import OF_OPTIMIZERS, READ_BY, TYPES, choices
from engm.errors import InputError
from engm.report import run_report
from engm.report.comparisons import choose, compare
from engm.report.records import collect, groups_of
from engm.report.statistics import paired_differences

DIGITS = Path(__file__).parents[1] / "results" / "digits"


def add_run(root, robust, validation, **settings):
    folder = write_run(root, robust, **settings)
    lines = [
        {"epoch": i + 1, "validation_clean_accuracy": 0.9, "validation_robust_accuracy": value}
        for i, value in enumerate([validation - 0.2, validation, validation - 0.1])
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Validation prefers lr 0.1 for MSGD and 0.2 for ENGM; the test images say the opposite."""
    for seed in (0, 1, 2):
        for optimizer, good in (("msgd", 0.1), ("engm", 0.2)):
            for lr in (0.1, 0.2):
                chosen = lr == good
                robust = 0.5 + 0.02 * seed - 0.1 * chosen + 0.03 * (optimizer == "engm")
                own = dict(optimizer=optimizer, lr=lr, seed=seed)
                add_run(tmp_path, robust, 0.6 + 0.05 * chosen + 0.01 * seed, **own)
    return tmp_path


def test_every_optimizer_of_the_kit_has_its_settings_told(tmp_path):
    assert set(READ_BY) == set(choices(TYPES["optimizer"]))
    assert {name for names in READ_BY.values() for name in names} == set(OF_OPTIMIZERS)


def test_a_setting_that_is_not_read_is_shown_only_where_nothing_else_tells_rows_apart(tmp_path):
    for seed in (0, 1):
        add_run(tmp_path, 0.5, 0.4, optimizer="msgd", seed=seed)
        add_run(tmp_path, 0.6, 0.4, optimizer="engm", floor=0.5, seed=seed)
    rows = [settings for settings, _ in groups_of(collect(tmp_path)[0])]
    assert {(row["optimizer"], row["floor"]) for row in rows} == {("msgd", None), ("engm", 0.5)}
    add_run(tmp_path, 0.7, 0.4, optimizer="msgd", floor=0.9, seed=0)
    rows = [settings for settings, _ in groups_of(collect(tmp_path)[0])]
    assert {row["floor"] for row in rows if row["optimizer"] == "msgd"} == {0.05, 0.9}


def test_the_validation_images_choose_and_the_test_images_do_not(sweep):
    kept, remarks = choose(collect(sweep)[0], ["lr"])
    assert {(r.config.optimizer, r.config.lr) for r in kept} == {("msgd", 0.1), ("engm", 0.2)}
    assert len(kept) == 6
    assert remarks == [
        f"Digits, pgd_at, {chosen}: lr at an end of its grid; what lies beyond was not tried"
        for chosen in ("engm, lr 0.2", "msgd, lr 0.1")
    ]


def test_a_choice_within_its_grid_is_not_marked_and_one_at_an_end_is(sweep):
    for seed in (0, 1, 2):
        for lr in (0.05, 0.4):
            add_run(sweep, 0.5, 0.4, optimizer="msgd", lr=lr, seed=seed)
            add_run(sweep, 0.5, 0.4, optimizer="engm", lr=lr / 4, seed=seed)
    records = collect(sweep)[0]
    done = run_report.build(records, choose=["lr", "scale"])
    assert [row["lr"] for row in done.summary] == [0.2, 0.1]
    assert done.notes == ["lr at an end of its grid", ""]
    assert [remark for remark in done.remarks if "end of its grid" in remark] == [
        "Digits, pgd_at, engm, lr 0.2: lr at an end of its grid; what lies beyond was not tried"
    ]
    assert done.text("latex").count("lr at an end of its grid") == 1
    assert set(run_report.build(records).notes) == {""}


def test_a_setting_that_lacks_a_seed_cannot_be_chosen_and_an_unequal_search_is_said(sweep):
    add_run(sweep, 0.9, 0.99, optimizer="engm", lr=0.5, seed=0)
    for seed in (0, 1, 2):
        add_run(sweep, 0.4, 0.4, optimizer="msgd", lr=0.5, seed=seed)
    kept, remarks = choose(collect(sweep)[0], ["lr"])
    assert {(r.config.optimizer, r.config.lr) for r in kept} == {("msgd", 0.1), ("engm", 0.2)}
    assert remarks == [
        "not chosen from, of engm: lr 0.5 (no seed 1, 2)",
        "unequal search: settings were chosen for engm from 2, msgd from 3",
        "Digits, pgd_at, msgd, lr 0.1: lr at an end of its grid; what lies beyond was not tried",
    ]


@pytest.mark.parametrize("name", ["eps", "seed", "optimizer", "eval_steps", "size"])
def test_what_is_no_matter_of_choice_is_refused(sweep, name):
    with pytest.raises(InputError, match=f"cannot choose {name}.*; choose of .*subset, .*model"):
        choose(collect(sweep)[0], [name])


def test_runs_without_metrics_or_without_a_common_seed_cannot_be_chosen_from(tmp_path):
    apart = tmp_path / "apart"
    for seed, lr in ((0, 0.1), (1, 0.2)):
        add_run(apart, 0.5, 0.5, lr=lr, seed=seed)
    with pytest.raises(InputError, match="no setting of lr has all of the seeds 0, 1"):
        choose(collect(apart)[0], ["lr"])
    bare = write_run(tmp_path / "bare", 0.5)
    with pytest.raises(InputError, match="bare.* has no metrics to choose by"):
        choose(collect(bare)[0], ["lr"])


def test_runs_are_paired_by_seed_where_all_else_is_the_same(sweep):
    write_run(sweep, 0.99, optimizer="engm", lr=0.1, seed=7)  # no partner
    found, alone = compare(collect(sweep)[0], "msgd")
    assert alone == []
    assert [(c.settings["lr"], c.quantity) for c in found] == [
        *((0.1, "robust (best)"), (0.1, "robust (last)")),
        *((0.2, "robust (best)"), (0.2, "robust (last)")),
    ]
    assert found[0].paired.seeds == (0, 1, 2)
    # msgd at 0.1 was chosen by validation, and lost 0.1 by it; engm has 0.03 more
    assert found[0].paired.differences == pytest.approx([0.13] * 3)
    assert found[2].paired.differences == pytest.approx([-0.07] * 3)
    found, _ = compare(collect(sweep)[0], "engm")
    assert found[0].paired.differences == pytest.approx([-0.13] * 3)


def test_chosen_settings_may_differ_within_a_pair(sweep):
    kept, _ = choose(collect(sweep)[0], ["lr"])
    found, alone = compare(kept, "msgd", chosen=["lr"])
    assert (len(found), alone) == (2, [])
    assert found[0].paired.differences == pytest.approx([0.03] * 3)
    assert (found[0].baseline, found[0].settings["lr"]) == ("msgd, lr 0.1", 0.2)
    with pytest.raises(InputError, match=r"lr 0.1, 0.2; which is the baseline\? --choose lr"):
        compare(collect(sweep)[0], "msgd", chosen=["lr"])


def test_what_a_baseline_does_not_read_makes_no_other_baseline(tmp_path):
    for seed in (0, 1, 2):
        for floor in (0.05, 1.0):
            write_run(tmp_path, 0.5, optimizer="msgd", floor=floor, seed=seed)
            write_run(tmp_path, 0.5 + floor / 10, optimizer="engm", floor=floor, seed=seed)
    records = collect(tmp_path)[0]
    found, _ = compare(records, "msgd")
    assert [c.paired.differences[0] for c in found[::2]] == pytest.approx([0.005, 0.1])
    with pytest.raises(InputError, match="engm was run with floor 0.05, 1; which is the baseline"):
        compare(records, "engm")
    # a chosen setting that the baseline does not read, or that nobody varied, is not told of it
    found, _ = compare(records, "msgd", chosen=["floor", "lr"])
    assert {c.baseline for c in found} == {"msgd"}


def test_runs_are_compared_by_any_setting_where_all_else_is_the_same(tmp_path):
    for seed in (0, 1, 2):
        for optimizer, ahead in (("msgd", 0.01), ("engm", -0.02)):
            own = dict(optimizer=optimizer, seed=seed)
            robust = 0.5 + 0.03 * seed
            write_run(tmp_path, robust, **own)
            write_run(tmp_path, robust + ahead, last=robust, **own, precision="bfloat16")
    write_run(tmp_path, 0.9, precision="bfloat16", channels_last=True)  # no partner
    records = collect(tmp_path)[0]
    found, alone = compare(records, "precision=float32")
    assert [(c.settings["optimizer"], c.quantity) for c in found] == [
        *(("engm", "robust (best)"), ("engm", "robust (last)")),
        *(("msgd", "robust (best)"), ("msgd", "robust (last)")),
    ]
    assert {c.baseline for c in found} == {"precision float32"}
    assert {c.settings["precision"] for c in found} == {"bfloat16"}
    for comparison, by in zip(found, (-0.02, 0, 0.01, 0), strict=True):
        assert comparison.paired.differences == pytest.approx([by] * 3)
        assert comparison.paired.seeds == (0, 1, 2)
    assert alone == [
        "Digits, pgd_at, msgd, precision bfloat16, channels_last True: no run of precision float32 "
        "to pair with, of which a seed and all other settings are the same"
    ]
    backwards, _ = compare(records, "precision=bfloat16")
    assert backwards[0].paired.differences == pytest.approx([0.02] * 3)
    figure = run_report.build(records, compare="precision=float32").figures()["differences"]
    assert figure[0].startswith("Robust accuracy minus that of precision float32")
    assert figure[1].axes[0].get_xlabel() == "points above precision float32"
    # an optimizer is a setting like others
    for_short = compare(records, "msgd")
    assert compare(records, "optimizer=msgd") == for_short
    assert for_short[0][0].paired.differences == pytest.approx([-0.03] * 3)
    paired, alone = compare(records, "channels-last=TRUE")
    assert paired[0].paired.differences == pytest.approx([0.51 - 0.9])
    assert len(alone) == 3


def test_values_are_named_as_on_the_command_line_and_take_along_what_belongs_to_them(tmp_path):
    settings = [
        *(dict(lr=0.1), dict(lr=0.1, subset=50), dict(lr=0.1, awp=0.01, awp_warmup=10)),
        *(dict(lr=0.2), dict(method="trades"), dict(num_steps=10), dict(scale=2.0)),
        dict(model="preact_resnet18"),
    ]
    for number, one in enumerate(settings):
        write_run(tmp_path, 0.5 + 0.01 * number, **one)
    records = collect(tmp_path)[0]
    for baseline, differences in {
        "lr=0.1": [0.03],
        "lr = 1/10": [0.03],
        "subset=none": [0.01],
        "awp=0": [0.02],
        "method=pgd_at": [0.04],
        "num-steps=5": [0.05],
        "scale=mean": [0.06],
        "model=small_cnn": [0.07],
    }.items():
        found, _ = compare(records, baseline)
        best = [c.paired.differences[0] for c in found if c.quantity == "robust (best)"]
        assert best == pytest.approx(differences), baseline
    write_run(tmp_path, 0.5, num_steps=5, step_size=0.01)
    with pytest.raises(InputError, match=r"num_steps 5 was run with step_size 0.075, 0.01; which"):
        compare(collect(tmp_path)[0], "num_steps=5")


def test_each_value_of_the_compared_setting_has_its_own_choice(tmp_path):
    for seed in (0, 1, 2):
        for precision, good in (("float32", 0.1), ("bfloat16", 0.2)):
            for lr in (0.1, 0.2):
                own = dict(precision=precision, lr=lr, seed=seed)
                robust = 0.5 + 0.02 * seed - 0.1 * (lr == good) + 0.01 * (precision == "bfloat16")
                add_run(tmp_path, robust, 0.6 + 0.1 * (lr == good), **own)
        add_run(tmp_path, 0.1, 0.1, precision="float32", lr=0.3, seed=seed)
    done = run_report.build(collect(tmp_path)[0], compare="precision=float32", choose=["lr"])
    assert len(done.records) == 6
    assert [c.baseline for c in done.compared] == ["precision float32, lr 0.1"] * 2
    assert done.compared[0].paired.differences == pytest.approx([0.01] * 3)
    assert done.compared[0].settings["lr"] == 0.2
    assert (
        "unequal search: settings were chosen for msgd, precision bfloat16 from 2, msgd, "
        "precision float32 from 3"
    ) in done.remarks
    with pytest.raises(
        InputError,
        match="cannot choose precision .precision is what is compared.; choose of .*subset",
    ):
        choose(collect(tmp_path)[0], ["precision"], compared="precision")


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("size=3", "cannot compare by 'size'; compare by .*subset, .*model, .*optimizer, lr"),
        ("eps=0.15", "cannot compare by 'eps'"),
        ("seed=0", "cannot compare by 'seed'"),
        ("lr=0.3", "no run has lr '0.3' to compare with; there is 0.1, 0.2$"),
        ("lr=low", "no run has lr 'low' to compare with"),
        ("lr=", "no run has lr '' to compare with"),
        ("channels_last=1", "no run has channels_last '1' to compare with; there is False"),
        (
            "precision=float32",
            "all finished runs have precision float32; there is none",
        ),
        ("adam", "no run has optimizer 'adam' to compare with; there is engm, msgd$"),
        ("lr", r"no run has optimizer 'lr' .* \(another setting: lr=VALUE\)$"),
    ],
)
def test_what_cannot_be_compared_by_is_refused_with_what_can(sweep, baseline, message):
    with pytest.raises(InputError, match=message):
        run_report.build(collect(sweep)[0], compare=baseline, choose=["floor"])


def test_what_has_no_partner_is_said(sweep):
    write_run(sweep, 0.5, optimizer="engm", epochs=7)
    found, alone = compare(collect(sweep)[0], "msgd")
    assert len(found) == 4
    assert len(alone) == 1
    assert "no run of msgd to pair with" in alone[0]
    assert "epochs 7" in alone[0]
    with pytest.raises(InputError, match="no run has optimizer 'engm-input'.* engm, msgd"):
        compare(collect(sweep)[0], "engm-input")


def test_the_committed_logs_are_one_protocol_and_can_be_compared(tmp_path):
    records, _ = collect(DIGITS)
    done = run_report.build(records, compare="msgd", choose=["lr"])
    assert len(done.compared) == 10
    by_hand = {r.config.seed: r.result["best"]["robust_accuracy"] for r in records
               if (r.config.optimizer, r.config.lr) == ("msgd", 0.2)}  # fmt: skip
    own = {r.config.seed: r.result["best"]["robust_accuracy"] for r in records
           if (r.config.optimizer, r.config.lr) == ("engm-input", 0.3)}  # fmt: skip
    (found,) = (c for c in done.compared if c.quantity == "robust (best)"
                and c.settings["optimizer"] == "engm-input")  # fmt: skip
    assert found.paired == paired_differences(own, by_hand)
    assert any("10 comparisons" in remark for remark in done.remarks)


def test_a_report_in_a_folder_has_every_format_and_in_a_file_that_of_its_name(sweep, tmp_path):
    done = run_report.build(collect(sweep)[0], compare="msgd", choose=["lr", "floor"])
    folder = tmp_path / "out"
    names = [path.name for path in done.write(folder)]
    assert names == ["report.md", "report.csv", "report-differences.csv", "report.tex",
                     "report.html", "runs.csv"]  # fmt: skip
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    rows = list(csv.DictReader((folder / "report-differences.csv").read_text().splitlines()))
    assert float(rows[0]["difference mean"]) == pytest.approx(0.03)
    assert rows[0]["outcome"] == "ahead"
    runs = list(csv.DictReader((folder / "runs.csv").read_text().splitlines()))
    assert len(runs) == 6
    assert len((folder / "report.html").read_text().split("<img")) == 4
    for text in ((folder / "report.md").read_text(), (folder / "report.tex").read_text()):
        assert (
            "lr chosen on the validation images; floor not chosen (one value in each row)" in text
        )
        assert "+3.0" in text
    assert [p.name for p in done.write(tmp_path / "x.tex")] == ["x.tex"]
    assert "\\begin{tabular}" in (tmp_path / "x.tex").read_text()
    assert [p.name for p in done.write(tmp_path / "y", "csv")] == [
        *("report.csv", "report-differences.csv", "runs.csv")
    ]
    with pytest.raises(InputError, match=r"x.txt is no folder, .* \.md, \.csv, \.tex, \.html"):
        done.write(tmp_path / "x.txt")
    with pytest.raises(InputError, match="x.tex would be latex, but --format says csv"):
        done.write(tmp_path / "x.tex", "csv")


def test_figures_name_rows_by_what_counts_for_them(sweep, tmp_path):
    for seed in (0, 1, 2):
        add_run(sweep, 0.6, 0.6, optimizer="engm", floor=1.0, lr=0.2, seed=seed)
    done = run_report.build(collect(sweep)[0], compare="msgd")
    drawn = done.figures()
    assert list(drawn) == ["best_and_last", "differences", "learning_curves"]
    labels = [label.get_text() for label in drawn["best_and_last"][1].axes[0].get_yticklabels()]
    assert labels[0] == "engm, lr 0.1, floor 0.05"
    assert labels[-1] == "msgd, lr 0.2"
    written = done.write_figures(tmp_path / "f")
    assert [p.name for p in written] == [f"{name}.png" for name in drawn]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    (next(sweep.glob("*-msgd-*")) / "metrics.jsonl").unlink()
    assert list(done.figures()) == ["best_and_last", "differences"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")
