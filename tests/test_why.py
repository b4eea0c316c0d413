"""The page "Why" of the results: its tables and figures, and the looks that they come from."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from engm.norms import loop_norms
from engm.runs import read_metrics, read_result

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture
def why(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    import why

    return why


def test_its_tables_are_what_the_logs_give(why):
    page = (RESULTS / "README.md").read_text()
    for table in why.TABLES:
        assert f"\n\n{table().strip()}\n\n" in page, table.__name__


def test_its_sentences_have_the_numbers_of_the_logs(why):
    page = " ".join((RESULTS / "README.md").read_text().split())
    noisy = [look["train"] for s in why.looks("pgd_at", "msgd", 0.1) for look in s
             if look["epoch"] == 15]  # fmt: skip
    pulls = sorted(100 * mode["groups"]["wrong label"]["of_pull_msgd"] for mode in noisy)
    assert "have {:.1f}, {:.1f} and {:.1f}% of MSGD's pull".format(*pulls) in page
    kinds = (("natural", "msgd"), ("pgd_at", "msgd"), ("pgd_at", "engm"))
    first = [seed[0] for kind in kinds for seed in why.looks(*kind, 0.0)]
    lag = [look["eval"]["mean_norm"] / look["train"]["mean_norm"] for look in first]
    assert f"norms are {min(lag):.0f} to {max(lag):.0f} times those of train mode" in page
    explained = [np.median([b[0] for look in seed[1:] for b in look[mode]["proxy"]])
                 for mode in ("train", "eval") for kind in kinds[1:]
                 for seed in why.looks(*kind, 0.0)]  # fmt: skip
    low, high = 100 * min(explained), 100 * max(explained)
    assert f"explain {low:.0f} to {high:.0f}% of the variance" in page


def test_msgd_trained_again_for_the_later_rows_is_the_same_run():
    [again] = (RESULTS / "cifar10-cpu-repeat").iterdir()
    first = RESULTS / "cifar10-cpu" / again.name
    for key in ("best", "last"):
        ours, theirs = (read_result(folder)[key] for folder in (again, first))
        assert ours | {"attack": 0} == theirs | {"attack": 0}  # which newer code writes otherwise
    for ours, theirs in zip(read_metrics(again), read_metrics(first), strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_its_figures_are_drawn_from_the_logs(why):
    page = (RESULTS / "README.md").read_text()
    for draw in why.FIGURES:
        figure = draw()
        assert all(axes.has_data() for axes in figure.axes)
        plt.close(figure)
        assert (RESULTS / "pictures" / f"{draw.__name__}.png").is_file()
        assert f"](pictures/{draw.__name__}.png)" in page


def test_a_look_sees_what_a_loop_sees(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS / "plans")
    import cifar10_cpu_why as looks

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    x, y = torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    seen = looks.see(net, x, y)
    pixels = x.clone().requires_grad_()
    logits = net(pixels)
    losses = nn.functional.cross_entropy(logits, y, reduction="none")
    norms = loop_norms(losses, list(net.parameters()))
    torch.testing.assert_close(seen.norms, norms)
    for i, loss in enumerate(losses):
        others = [logits[i, k].item() for k in range(3) if k != y[i]]
        assert float(seen.margins[i]) == pytest.approx(logits[i, y[i]].item() - max(others))
        (image,) = torch.autograd.grad(loss, pixels, retain_graph=True)
        assert float(seen.inputs[i]) == pytest.approx(float(image.norm()))
    parameters = list(net.parameters())
    weights = norms.mean() / norms.clamp(min=0.05 * norms.mean())
    gradient, weighted = (
        torch.cat([g.flatten() for g in torch.autograd.grad(
            (factor * losses).mean(), parameters, retain_graph=True)])
        for factor in (torch.ones(5), weights)
    )  # fmt: skip
    # the parameters come in another order
    torch.testing.assert_close(seen.gradient.norm(), gradient.norm())
    torch.testing.assert_close(seen.weighted.norm(), weighted.norm())
    torch.testing.assert_close(seen.gradient @ seen.weighted, gradient @ weighted)
