import json
import math
import shlex
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from engm.bench import measuring, outer_step, peers, tables
from engm.cli import main
from engm.config import RunConfig
from engm.errors import InputError

TINY = RunConfig(dataset="cifar10", model="small_cnn", width=4, batch_size=4, num_steps=2)
KITS = ("msgd", *outer_step.WAYS)
CPU = torch.device("cpu")


def run(names, **changed):
    config = RunConfig(**TINY.to_dict() | changed)
    return outer_step.run(config, image_size=8, repeats=1, names=names, device="cpu")


def call(*arguments, code=0):
    result = CliRunner().invoke(main, ["bench", *[str(a) for a in arguments]])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    small = ["--model", "small_cnn", "--width", 4, "--batch-size", 4, "--num-steps", 2]
    rows = "both,exact,exact-first,output,input,loop,vmap"
    few = ["--image-size", 8, "--repeats", 2, "--methods", rows]
    output = call(*small, *few, "--device", "cpu", "--out", out)
    return out, json.loads((out / "bench.json").read_text()), output


def test_the_command_writes_ratios_to_msgd(written):
    out, result, output = written
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"
    names = ["msgd", "exact", "exact-first", "input", "output", "both", "loop", "vmap"]
    assert list(result["methods"]) == names
    for name, entry in result["methods"].items():
        assert entry["agrees"], entry
        assert ("at" in entry) == (name in outer_step.WHOLE)
        assert f"\n| {name} | " in output
        for step in set(entry) & set(outer_step.STEPS):
            cost = entry[step]
            assert 0 < cost["low"] <= cost["ratio"] <= cost["high"]
            assert cost["peak_bytes"] > 0
            rounds = list(zip(*cost["seconds"].values(), strict=True))
            if name in ("input", "both"):
                assert list(cost["seconds"]) == ["refresh", "plain"]
                rounds = [(refresh / 20 + 19 * plain / 20,) for refresh, plain in rounds]
            ((first,), (second,)) = rounds
            assert cost["median_seconds"] == pytest.approx((first + second) / 2)
    for step in outer_step.STEPS:
        base = result["methods"]["msgd"][step]
        assert (base["ratio"], base["low"], base["high"], base["peak_ratio"]) == (1, 1, 1, 1)
    assert "| method | outer step | time | memory | AT-2 step | time | memory |" in output
    assert "the kit's goal" not in output  # it is about ten steps
    ten = result | {"settings": result["settings"] | {"num_steps": 10}}
    assert "\nthe kit's goal, AT-10 step with output at most 1.01: " in tables.table(ten)
    assert result["environment"]["threads"] == torch.get_num_threads()


def test_the_command_in_the_file_is_one_that_the_command_line_takes(written):
    out, result, _ = written
    engm, name, *arguments = shlex.split(result["command"])
    context = main.commands[name].make_context(name, arguments)
    assert engm == "engm"
    assert {name: context.params[name] for name in result["settings"]} == result["settings"]
    assert str(out) not in json.dumps(result)


def test_input_measures_the_norms_in_its_refresh_steps_alone():
    method = outer_step._Method(outer_step._Batch(TINY.resolved(), 8, CPU), "input")
    fits = {kind: one.measure.estimate.fits for kind, one in method.optimizers.items()}
    assert fits["plain"][-1].r_squared == 1.0  # trusted, whatever the images say
    before = {kind: len(of_kind) for kind, of_kind in fits.items()}
    assert method.peak(False) > 0 and len(method.seconds(False)) == 2
    after = {kind: len(of_kind) - before[kind] for kind, of_kind in fits.items()}
    assert after == {"refresh": 2 + 1, "plain": 0}  # two for the memory


def test_exact_first_checks_the_model_in_each_step_and_estimates_without_a_line_never_watch():
    batch, passes = outer_step._Batch(TINY.resolved(), 8, CPU), {}
    for name in ("msgd", "exact", "exact-first", "output", "input-only"):
        method = outer_step._Method(batch, name)

        def count(module, gradients, name=name):
            passes[name] += 1

        method.model.flatten.register_full_backward_pre_hook(count)
        for _ in range(2):  # the first looks at the graph with the hook in it
            passes[name] = 0
            method.step("step")
    # four of the check; of the inputs, and of the weighted losses
    assert passes == {"msgd": 1, "exact": 1, "exact-first": 5, "output": 1, "input-only": 2}


def test_ratios_are_taken_round_by_round():
    # 1.5, 1, 2, 3, 1
    found = measuring.ratios([1.5, 2.0, 8.0, 3.0, 1.0], [1.0, 2.0, 4.0, 1.0, 1.0])
    assert found == dict(ratio=1.5, low=1.0, high=2.0)
    assert measuring.ratios([3.0], [2.0]) == dict(ratio=1.5, low=1.5, high=1.5)


def test_peak_bytes_is_what_was_held_at_one_time():
    def work():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        third = torch.ones(500, 1000)
        return second, third

    # and a few bytes for the number 1
    assert 8_000_000 <= measuring.peak_bytes(work, CPU) < 8_001_000


def test_a_peer_that_fails_or_is_missing_is_recorded_with_its_reason(monkeypatch):
    def broken(model, y, autocast):
        raise ImportError("cannot import x from 'y' (/home/someone/site/y.py)\nand more")

    def infinite(model, y, autocast):
        gradients = {p: torch.full_like(p, math.inf) for p in model.parameters()}
        return lambda closure, inputs: (closure().detach(), torch.ones(4), lambda *_: gradients)

    monkeypatch.setitem(peers.PEERS, "vmap", broken)
    monkeypatch.setitem(peers.PEERS, "backpack", infinite)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    result = run(("vmap", "opacus", "backpack"))
    methods = result["methods"]
    assert methods["vmap"] == {"reason": "ImportError: cannot import x from 'y' (y.py)"}
    assert "pip install 'engm[peers]'" in methods["opacus"]["reason"]
    assert methods["backpack"] == {"reason": "its gradient is inf or nan"}
    assert "ratio" in methods["msgd"]["at"]
    assert "\nnot able: vmap: ImportError: cannot import x" in tables.table(result)


@pytest.mark.parametrize("wrong", ["norms", "sum"])
def test_a_wrong_gradient_is_flagged(monkeypatch, wrong):
    def build(model, y, autocast):
        right = peers.vmap_measure(model, y, autocast)

        def off(closure, inputs):
            losses, norms, weighted = right(closure, inputs)
            if wrong == "norms":
                return losses, norms * torch.tensor([1.0, 1.0, 1.0, 1.05]), weighted
            return losses, norms, lambda *a: {p: 1.01 * g for p, g in weighted(*a).items()}

        return off

    monkeypatch.setitem(peers.PEERS, "vmap", build)
    result = run(("vmap", "exact"))
    entry = result["methods"]["vmap"]
    assert not entry["agrees"]
    assert 0.005 < entry["error"] < 0.05
    assert "\nWRONG GRADIENT: vmap: relative error " in tables.table(result)
    assert result["methods"]["exact"]["agrees"]


def test_with_batch_norm_the_loop_takes_the_same_step_and_vmap_is_not_able():
    methods = run((*KITS, "vmap"), model_norm="batch", batch_size=8)["methods"]
    assert all(methods[name]["agrees"] for name in KITS)
    assert methods["vmap"]["reason"].startswith("BatchNorm in train mode")


def test_bfloat16_and_channels_last_agree_within_their_tolerance():
    result = run(KITS, precision="bfloat16", channels_last=True, model_norm="group", width=8)
    assert "--channels-last " in result["command"]
    assert all(entry["agrees"] for entry in result["methods"].values()), result
    assert result["methods"]["exact"]["error"] > 1e-4  # it was bfloat16


def test_the_loop_is_left_out_where_it_would_take_too_long():
    assert "up to batch size 16" in run(("loop",), batch_size=17)["methods"]["loop"]["reason"]


def test_unknown_methods_and_bad_numbers_are_refused(tmp_path):
    output = call("--methods", "exact,functorch", "--out", tmp_path, code=1)
    assert "unknown method 'functorch'; choose one of msgd, exact, exact-first, input, " in output
    assert not list(tmp_path.iterdir())
    for counts in (dict(repeats=0), dict(image_size=0)):
        with pytest.raises(InputError):
            outer_step.run(TINY, names=("msgd",), device="cpu", **counts)
    call("--repeats", 0, code=2)


@pytest.mark.parametrize("name", ["opacus", "opacus-ghost", "backpack", "backpack-l2"])
def test_installed_peers_agree(name):
    pytest.importorskip(name.split("-")[0])
    entry = run((name,))["methods"][name]
    assert entry["agrees"], entry
    assert entry["outer"]["peak_bytes"] > 0


def test_what_a_peer_has_no_formula_for_is_its_reason():
    with pytest.raises(InputError, match="GroupNorm"):
        peers._taken(nn.GroupNorm(1, 2), "grad_batch")
