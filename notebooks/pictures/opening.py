"""The picture at the top of README.md: `python opening.py OUT.png`."""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from engm import ENGM, MSGD, PGD, PGDAT, Natural, RunConfig, data, plots
from engm.methods import Method
from engm.models import build_model
from engm.plots import BLUE, ORANGE, open_axes, sharp_png
from engm.training import train_one_epoch


def draw(epochs: int = 15) -> Figure:
    """Draws an image that fools a network, and how hard attacked images pull on another's weights.

    On the left the test image whose answer a small change turns most clearly, after natural
    training; on the right the pulls of one step, |g_i| (MSGD) and w_i |g_i| (ENGM), after
    adversarial training. Both networks are small ones on the digits, as in the tour.
    """
    config = RunConfig(dataset="digits").resolved()
    assert config.eps and config.batch_size
    batch_size = config.batch_size
    images = data.load("digits")
    x, y = next(data.batches(images.test, 200, seed=0, epoch=0))

    def trained(method: Method) -> torch.nn.Module:
        torch.manual_seed(0)
        model = build_model(config, images)
        optimizer = MSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for epoch in range(epochs):
            examples = data.batches(images.train, batch_size, seed=0, epoch=epoch)
            train_one_epoch(model, method, optimizer, examples)
        return model.eval()

    def attack(eps: float) -> PGD:
        return PGD(eps=eps, step_size=eps / 4, num_steps=10)

    figure = Figure(figsize=(9, 2.5), layout="constrained")
    places = figure.add_gridspec(1, 4, width_ratios=(1, 1, 1, 2.1))

    natural, little = trained(Natural()), 0.4 * config.eps
    x_adv = attack(little)(natural, x, y)
    before, after = (natural(pixels).detach().softmax(1) for pixels in (x, x_adv))
    turned = (before.argmax(1) == y) & (after.argmax(1) != y)
    i = int((turned * before.amax(1) * after.amax(1)).argmax())
    shown = {
        f"network: {says(before[i])}": (x[i], False),
        f"change, at most {little:.2f}": ((x_adv - x)[i] / (2 * little) + 0.5, False),
        f"network: {says(after[i])}": (x_adv[i], True),
    }
    for place, (title, (pixels, wrong)) in enumerate(shown.items()):
        plots.show_image(figure.add_subplot(places[0, place]), pixels, title, wrong)

    robust = trained(PGDAT(attack(config.eps)))
    few, labels = attack(config.eps)(robust, x[:50], y[:50]), y[:50]
    optimizer = ENGM(robust, lr=0.0)
    losses = torch.nn.functional.cross_entropy
    optimizer.zero_grad()
    optimizer.step(lambda: losses(robust(few), labels, reduction="none"))
    assert optimizer.last is not None
    norms, order = optimizer.last.norms, optimizer.last.norms.argsort()
    axes = figure.add_subplot(places[0, 3])
    axes.plot(norms[order].cpu(), "o", color=ORANGE, markersize=3, label="MSGD")
    pulls = optimizer.last.weights * norms
    axes.plot(pulls[order].cpu(), "o", color=BLUE, markersize=3, label="ENGM")
    axes.set_title("how hard each of 50 images pulls on the weights", fontsize=9)
    axes.set_xlabel("attacked images, sorted", fontsize=9)
    axes.set_xticks([])
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=9)
    open_axes(axes)
    return figure


def says(chances: torch.Tensor) -> str:
    """Returns the likeliest digit and how likely it is, as "9 (93%)"."""
    return f"{int(chances.argmax())} ({chances.max():.0%})"


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(sharp_png(draw())[0])
