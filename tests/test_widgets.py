import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from engm import plots
from engm.attacks import PGD
from engm.errors import InputError
from engm.widgets import EpsExplorer

PNG = b"\x89PNG\r\n\x1a\n"


def linear_model():
    # class 1 where the mean pixel is above one half
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Dropout(0.9))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 16))
        model[1].bias.copy_(torch.tensor([8.0, -8.0]))
    return model


@pytest.fixture
def explorer():
    x = torch.cat([torch.full((1, 1, 4, 4), 0.55), torch.full((1, 1, 4, 4), 0.95)])
    y = torch.ones(2, dtype=torch.int64)

    def attack_of(eps):
        assert eps > 0
        # one short step: where it leads depends on the random start
        return PGD(eps=eps, step_size=eps / 2, num_steps=1)

    return EpsExplorer(linear_model(), x, y, ["low", "high"], attack_of, largest_eps=0.2)


def test_the_eps_slider_attacks_and_redraws(explorer):
    pictures = {}
    for eps, predicted in ((0.0, 1), (0.2, 0), (0.01, 1), (0.2, 0), (0.0, 1)):
        explorer.eps.value = eps
        assert explorer.predicted == predicted
        picture = bytes(explorer.picture.value)
        assert picture.startswith(PNG)
        assert pictures.setdefault(eps, picture) == picture
    assert len(set(pictures.values())) == 3
    assert all(module.training for module in explorer._model.modules())


def test_the_title_tells_eps_and_the_answer(explorer, monkeypatch):
    titles, draw = [], plots.prediction
    monkeypatch.setattr(plots, "prediction", lambda *a: titles.append(a[-1]) or draw(*a))
    explorer.eps.value = 0.2
    explorer.eps.value = 0.01
    assert titles == ["eps 0.200: low", "eps 0.010: high"]


def test_the_image_slider_changes_the_image(explorer):
    explorer.eps.value = 0.2
    assert explorer.predicted == 0
    explorer.image.value = 1
    assert explorer.predicted == 1  # 0.95 - 0.2 is still high
    assert explorer.image.max == 1


def test_the_eps_slider_has_steps_between_its_ends(explorer):
    assert (explorer.eps.min, explorer.eps.max) == (0, 0.2)
    assert explorer.eps.max / explorer.eps.step >= 10


def test_moving_a_slider_leaves_no_figure_open(explorer):
    before = plt.get_fignums()
    explorer.eps.value = 0.2
    assert plt.get_fignums() == before


@pytest.mark.parametrize(("images", "labels", "eps"), [(0, 0, 0.1), (2, 1, 0.1), (1, 1, 0.0)])
def test_nothing_to_explore_is_refused(images, labels, eps):
    y = torch.ones(labels, dtype=torch.int64)
    with pytest.raises(InputError, match=f"got {images} images, {labels} labels"):
        EpsExplorer(linear_model(), torch.rand(images, 1, 4, 4), y, ["low", "high"], PGD, eps)
