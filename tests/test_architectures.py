"""Architectures of timm and torchvision against the loop, and the table in results/README.md."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from engm.norms.watch import Watch

ROOT = Path(__file__).parents[1]
# Small images, but for windows and pyramids more than one position in the last stage.
SMALL = {
    "timm/test_vit2": 64,  # class tokens and positions
    "timm/test_vit3": 64,  # pooled by attention
    "timm/test_convnext2": 32,  # scales of blocks
    "timm/convnextv2_atto": 32,  # normalisation by a response, in addcmul
    "timm/test_efficientnet": 32,  # a norm with its activation in one
    "timm/test_nfnet": 32,  # standardised weights
    "timm/test_resnet": 32,
    "timm/test_maxvit": 64,  # windows and grids
    "timm/test_mambaout": 32,
    "timm/xcit_nano_12_p8_224": 32,  # positions from a convolution, attention over channels
    "timm/pvt_v2_b0": 32,  # layers that are subclasses of torch's
    "torchvision/shufflenet_v2_x0_5": 32,
    "torchvision/squeezenet1_1": 32,
    "torchvision/mobilenet_v3_small": 32,
}


@pytest.fixture
def architectures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    import architectures

    return architectures


@pytest.mark.filterwarnings("error:the norms of")
@pytest.mark.parametrize("name", SMALL)
def test_norms_and_gradients_are_those_of_the_loop(architectures, name):
    if name.startswith("timm") and not find_spec("timm"):
        pytest.skip("timm is not installed")
    torch.manual_seed(0)
    model = architectures.build(name, SMALL[name]).double()
    x = torch.rand(3, 3, SMALL[name], SMALL[name], dtype=torch.float64)
    architectures.move_off(model, x)
    model.eval()
    assert architectures.agreement(model, x[:2]) == {
        "works": "exact",
        "error": pytest.approx(0, abs=1e-12),
        "warned": [],
    }
    with Watch(model) as watch:
        losses = architectures.losses_of(model, x)
    weights = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(weights @ losses, list(parameters.values()), retain_graph=True)
    watch.backward(losses)
    found = watch.weighted(weights)
    size = torch.stack([gradient.norm() for gradient in expected]).norm()
    for (parameter, own), gradient in zip(parameters.items(), expected, strict=True):
        assert (found[own] - gradient).norm() <= 1e-12 * size, parameter


class Small(nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        self.linear, self.fault = nn.Linear(12, 10), fault

    def forward(self, x):
        if self.fault:
            raise self.fault
        return self.linear(x.flatten(1))


def test_the_script_goes_on_where_it_stopped_and_past_what_fails(
    architectures, monkeypatch, tmp_path
):
    log, built = tmp_path / "log.jsonl", []

    def build(name, size):
        built.append(name)
        return Small(RuntimeError("too small for 4 stages") if name == "c" else None)

    monkeypatch.setattr(architectures, "build", build)
    monkeypatch.setattr(architectures, "SIZES", dict.fromkeys("abc", 2))
    call = ["--log", str(log), "--repeats", "1"]
    for names in (["a"], []):
        result = CliRunner().invoke(architectures.main, [*names, *call])
        assert result.exit_code == 0, result.output
    assert built == ["a", "b", "c"]
    entries = architectures.read(log)
    assert [entry["works"] for entry in entries] == ["exact", "exact", "failed"]
    assert entries[0]["environment"]["packages"]["torch"] == torch.__version__
    assert "- 3 architectures, 2 exact; failed: c." in result.output
    assert "| c |  |  | failed |  |  |  | RuntimeError: too small for 4 stages |" in result.output


def test_the_table_is_that_of_the_log(architectures):
    entries = architectures.read(architectures.LOG)
    exact = [entry for entry in entries if entry["works"].startswith("exact")]
    assert len(exact) >= 55 and {e["works"] for e in entries} <= {"exact", "exact, slow", "input"}
    assert all(entry["error"] < 1e-12 for entry in exact)
    readme = (ROOT / "results" / "README.md").read_text()
    assert architectures.summary(entries) in readme
    assert architectures.table(entries) in readme
