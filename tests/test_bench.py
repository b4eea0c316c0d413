import json
import math
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from engm.bench import costs, peers
from engm.bench import outer_step as bench
from engm.cli import main
from engm.config import RunConfig
from engm.errors import InputError

TINY = RunConfig(dataset="cifar10", model="small_cnn", width=4, batch_size=4, num_steps=2)
KITS = ("msgd", "exact", "input", "loop")


def measure(config=TINY, repeats=1, names=("msgd",)):
    return bench.run(config, image_size=8, repeats=repeats, names=names, device="cpu")["methods"]


def call(*arguments, code=0):
    result = CliRunner().invoke(main, ["bench", *[str(a) for a in arguments]])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    small = ["--model", "small_cnn", "--width", 4, "--batch-size", 4, "--num-steps", 2]
    few = ["--image-size", 8, "--repeats", 2, "--methods", "exact,input,loop,vmap"]
    output = call(*small, *few, "--device", "cpu", "--out", out)
    return out, json.loads((out / "bench.json").read_text()), output


def test_the_command_writes_ratios_to_msgd(written):
    out, result, output = written
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert list(result["methods"]) == ["msgd", "exact", "input", "loop", "vmap"]
    for name, entry in result["methods"].items():
        assert entry["agrees"], entry
        assert ("at" in entry) == (name in bench.WHOLE)
        for step in set(entry) & set(bench.STEPS):
            found = entry[step]
            assert 0 < found["low"] <= found["ratio"] <= found["high"]
            assert found["peak_bytes"] > 0
            assert all(len(times) == 2 for times in found["seconds"].values())
        assert f"| {name} | " in output
    assert "| method | outer step | time | memory | AT-2 step | time | memory |" in output
    for step in bench.STEPS:
        base = result["methods"]["msgd"][step]
        assert (base["ratio"], base["low"], base["high"], base["peak_ratio"]) == (1, 1, 1, 1)
    assert result["environment"]["threads"] == torch.get_num_threads()


def test_the_command_in_the_file_is_one_that_the_command_line_takes(written):
    result = written[1]
    engm, name, *arguments = result["command"].split()
    context = main.commands[name].make_context(name, arguments)
    assert engm == "engm"
    settings = {k: v for k, v in result["settings"].items() if k != "device"}
    assert {name: context.params[name] for name in settings} == settings
    assert str(written[0]) not in json.dumps(result)


def test_the_time_of_input_is_that_of_one_refresh_and_nineteen_plain_steps(written):
    for step in bench.STEPS:
        entry = written[1]["methods"]["input"][step]
        refresh, plain = entry["seconds"]["refresh"], entry["seconds"]["plain"]
        rounds = [r / 20 + 19 * p / 20 for r, p in zip(refresh, plain, strict=True)]
        assert entry["median_seconds"] == pytest.approx(sum(rounds) / 2)


def test_input_measures_the_norms_in_its_refresh_steps_alone(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() or 1.0)
    measured = []
    norms = bench.ENGM.accumulate

    def accumulate(self, closure, inputs=None):
        found = norms(self, closure, inputs)
        measured.append((self, len(self.measure.estimate.fits)))
        return found

    monkeypatch.setattr(bench.ENGM, "accumulate", accumulate)
    measure(repeats=3, names=("input",))
    counts = {}
    for optimizer, fits in measured:
        counts.setdefault(id(optimizer), []).append(fits)
    refreshing, plain = sorted(counts.values(), key=max, reverse=True)
    assert refreshing == list(range(1, 1 + len(refreshing)))
    assert plain == [2] * len(plain)


def test_ratios_are_taken_round_by_round():
    seconds = {"msgd": [1.0, 2.0, 4.0, 1.0, 1.0], "exact": [1.5, 2.0, 8.0, 3.0, 1.0]}
    found = costs.summarise(seconds, {"msgd": 100, "exact": 150})
    # 1.5, 1, 2, 3, 1
    assert found["exact"] == dict(
        median_seconds=2.0, ratio=1.5, low=1.0, high=2.0, peak_bytes=150, peak_ratio=1.5
    )
    assert found["msgd"]["ratio"] == found["msgd"]["low"] == found["msgd"]["high"] == 1.0
    (once,) = costs.summarise({"msgd": [3.0]}, {"msgd": 1}).values()
    assert (once["ratio"], once["low"], once["high"]) == (1.0, 1.0, 1.0)


def test_peak_bytes_is_what_was_held_at_one_time():
    def work():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        third = torch.ones(500, 1000)
        return second, third

    # and a few bytes for the number 1
    assert 8_000_000 <= costs.peak_bytes(work, torch.device("cpu")) < 8_001_000


def test_a_peer_that_fails_or_is_missing_is_recorded_with_its_reason(monkeypatch):
    def broken(model, y, autocast):
        raise ImportError("cannot import x from 'y' (/home/someone/site/y.py)\nand more")

    def infinite(model, y, autocast):
        gradients = {p: torch.full_like(p, math.inf) for p in model.parameters()}
        return lambda closure, inputs: (closure(), torch.ones(4), lambda *weights: gradients)

    monkeypatch.setitem(peers.PEERS, "vmap", broken)
    monkeypatch.setitem(peers.PEERS, "backpack", infinite)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    names = ("vmap", "opacus", "backpack")
    found = bench.run(TINY, image_size=8, repeats=1, names=names, device="cpu")
    assert found["methods"]["vmap"] == {"reason": "ImportError: cannot import x from 'y' (y.py)"}
    assert "pip install 'engm[peers]'" in found["methods"]["opacus"]["reason"]
    assert found["methods"]["backpack"] == {"reason": "its gradient is inf or nan"}
    assert "ratio" in found["methods"]["msgd"]["at"]
    assert "not able: vmap: ImportError: cannot import x" in costs.table(found)


@pytest.mark.parametrize("kind", ["sum", "weighted"])
def test_a_wrong_gradient_is_flagged(monkeypatch, kind):
    right = peers.vmap_measure

    def wrong(model, y, autocast):
        measure = right(model, y, autocast)

        def scaled(closure, inputs):
            losses, norms, weighted = measure(closure, inputs)
            if kind == "weighted":
                return losses, norms * 1.01, weighted
            return losses, norms, lambda *a: {p: 1.01 * g for p, g in weighted(*a).items()}

        return scaled

    monkeypatch.setitem(peers.PEERS, "vmap", wrong)
    found = bench.run(TINY, image_size=8, repeats=1, names=("vmap", "exact"), device="cpu")
    entry = found["methods"]["vmap"]
    assert not entry["agrees"]
    assert entry["errors"][kind] == pytest.approx(0.01, rel=0.1)
    assert "WRONG GRADIENT: vmap" in costs.table(found)
    assert found["methods"]["exact"]["agrees"]


def test_with_batch_norm_the_loop_takes_the_same_step_and_vmap_is_not_able():
    config = RunConfig(**{**TINY.to_dict(), "model_norm": "batch", "batch_size": 8})
    found = measure(config, names=(*KITS, "vmap"))
    assert all(found[name]["agrees"] for name in KITS)
    assert all(
        list(found[name]["errors"]) == ["sum", "weighted"] for name in KITS if name != "msgd"
    )
    assert found["vmap"]["reason"].startswith("BatchNorm in train mode")


def test_bfloat16_and_channels_last_agree_within_their_tolerance():
    changed = dict(precision="bfloat16", channels_last=True, model_norm="group", width=8)
    config = RunConfig(**TINY.to_dict() | changed)
    result = bench.run(config, image_size=8, repeats=1, names=KITS, device="cpu")
    assert "--channels-last --device" in result["command"]
    found = result["methods"]
    errors = found["loop"]["errors"]
    assert all(entry["agrees"] for entry in found.values()), found
    assert errors["weighted"] > 1e-4  # it was bfloat16


def test_the_loop_is_left_out_where_it_would_take_too_long():
    config = RunConfig(**TINY.to_dict() | {"batch_size": 17})
    assert "up to batch size 16" in measure(config, names=("loop",))["loop"]["reason"]


def test_unknown_methods_and_bad_numbers_are_refused(tmp_path):
    message = "unknown method 'functorch'; choose from msgd, exact, input, loop, vmap, opacus"
    assert message in call("--methods", "exact,functorch", "--out", tmp_path, code=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="repeats must be a whole number, 1 or more; got 0"):
        measure(repeats=0)
    assert "0 is not in the range x>=1" in call("--repeats", 0, code=2)


@pytest.mark.parametrize("name", ["opacus", "opacus-ghost", "backpack", "backpack-l2"])
def test_installed_peers_agree(name):
    pytest.importorskip(name.split("-")[0])
    entry = measure(names=(name,))[name]
    assert entry["agrees"], entry
    assert entry["outer"]["peak_bytes"] > 0


def test_what_a_peer_has_no_formula_for_is_its_reason():
    parameter = nn.GroupNorm(1, 2)
    with pytest.raises(InputError, match="no formula for GroupNorm"):
        peers._taken(parameter, "grad_batch")
