"""The diffs of PORTING.md are run, before and after, and its table quotes messages that exist."""

import ast
import copy
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

import engm
from engm import ENGM
from engm.training import train_one_epoch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "PORTING.md").read_text()
DIFFS = dict(
    zip(
        ["trades", "robust_overfitting", "awp", "engm.AWP"],
        re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL),
        strict=True,
    )
)


def side(diff, sign):
    return "".join(line[1:] or "\n" for line in diff.splitlines(True) if line[0] in f"{sign} \n")


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).double()


def attack_pgd(model, x, y):
    """As the scripts have it: in the mode that the model is in, by `backward`."""
    delta = torch.full_like(x, 0.01).requires_grad_()
    F.cross_entropy(model(x + delta), y).backward()
    return (delta + 0.1 * delta.grad.sign()).clamp(-0.1, 0.1)


def perturbed(model, x, way):
    """The attack of TRADES: one step in eval mode; its l2 kind calls `backward`."""
    model.eval()
    x_adv = (x + 0.01).requires_grad_()
    loss = F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="sum")
    if way == "backward":
        loss.backward()
    gradient = x_adv.grad if way == "backward" else torch.autograd.grad(loss, x_adv)[0]
    model.train()
    return (x_adv + 0.1 * gradient.sign()).detach()


class AdvWeightPerturb:
    """Does what the script's class of that name does."""

    def __init__(self, model, proxy, proxy_optim, gamma):
        self.model, self.proxy, self.optim, self.gamma = model, proxy, proxy_optim, gamma

    def calc_awp(self, inputs_adv, targets):
        self.proxy.load_state_dict(self.model.state_dict())
        self.optim.zero_grad()
        (-F.cross_entropy(self.proxy(inputs_adv), targets)).backward()
        self.optim.step()
        pairs = zip(self.model.named_parameters(), self.proxy.parameters(), strict=True)
        moves = {name: (p, (q - p).detach()) for (name, p), q in pairs if p.ndim > 1}
        return {name: p.detach().norm() / d.norm() * d for name, (p, d) in moves.items()}

    def perturb(self, moves, sign=1):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter += sign * self.gamma * moves.get(name, 0)

    def restore(self, moves):
        self.perturb(moves, -1)


def run(source, way="grad"):
    """Runs a script of two batches; returns its names."""
    x = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = list(zip(x.split(6), (torch.arange(12) % 3).split(6), strict=True)) * 2
    model = network()
    names = dict(
        torch=torch, nn=nn, optim=optim, F=F, model=model, proxy=copy.deepcopy(model),
        device="cpu", args=SimpleNamespace(
            lr=0.1, lr_max=0.1, momentum=0.9, weight_decay=2e-4, beta=6.0, l1=1e-3, awp_gamma=0.01,
        ),
        train_loader=batches, train_batches=batches, criterion=nn.CrossEntropyLoss(),
        criterion_kl=nn.KLDivLoss(reduction="sum"), normalize=lambda x: (x - 0.5) / 0.25,
        perturbed=partial(perturbed, way=way), attack_pgd=attack_pgd, train_robust_acc=0,
        penalised=[p for p in model.parameters() if p.ndim > 1],
        AdvWeightPerturb=AdvWeightPerturb,
    )  # fmt: skip
    exec(compile(source, "PORTING.md", "exec"), names)
    return names


def values_of(names):
    return {k.removeprefix("module."): v for k, v in names["model"].state_dict().items()}


@pytest.mark.parametrize("way", ["grad", "backward"])
@pytest.mark.parametrize("name", DIFFS)
def test_a_ported_script_does_what_it_did_but_for_the_weights(name, way, monkeypatch):
    before, after = side(DIFFS[name], "-"), side(DIFFS[name], "+")
    plain = run(before, way)
    monkeypatch.setattr(engm, "ENGM", partial(ENGM, scale=1e9, floor=1.0), raising=False)
    ported = run(after, way)
    assert not torch.equal(plain["model"].state_dict().popitem()[1], network()[4].bias)
    torch.testing.assert_close(values_of(ported), values_of(plain), rtol=1e-7, atol=1e-9)
    assert ported["train_robust_acc"] == plain["train_robust_acc"]
    monkeypatch.undo()
    weighed = run(after, way)
    optimizer = weighed.get("opt", weighed.get("optimizer"))
    assert not torch.equal(weighed["model"][4].bias, ported["model"][4].bias)
    assert optimizer.last.excluded == 0 and optimizer.last.weights.std() > 0.01


def test_the_loop_with_the_kits_methods_is_that_of_engm_train(monkeypatch):
    (loop,) = [s for s in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "TRADES" in s]
    monkeypatch.setattr(engm, "ENGM", partial(ENGM, scale=1e9, floor=1.0), raising=False)
    ours = run(f"torch.manual_seed(2)\n{loop}")
    model = network()
    msgd = engm.MSGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(2)
    train_one_epoch(model, ours["method"], msgd, ours["train_batches"], awp=ours["awp"])
    torch.testing.assert_close(values_of(ours), values_of({"model": model}), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(DIFFS)[:3])
def test_ten_lines_are_enough(name):
    changes = [line[0] for line in DIFFS[name].splitlines() if line]
    assert changes.count("+") <= 10 and changes.count("-") <= 10


def test_the_messages_of_the_table_are_those_of_the_code():
    parts = [ROOT / "engm" / "optim.py", ROOT / "engm" / "methods.py"]
    said = [
        node.value
        for path in [*parts, *(ROOT / "engm" / "norms").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = re.findall(r'^\| "(.*?)" \|', PAGE, re.MULTILINE)
    assert len(quoted) > 15
    assert [q for q in quoted if not any(q in message for message in said)] == []
