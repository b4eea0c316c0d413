import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from engm.attacks import PGD
from engm.lab.widgets import EpsExplorer, WeightExplorer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def model():
    # class 1 where the mean pixel is above one half
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Dropout(0.9))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 16))
        model[1].bias.copy_(torch.tensor([8.0, -8.0]))
    return model


@pytest.fixture
def explorer(model):
    x = torch.cat([torch.full((1, 1, 4, 4), 0.55), torch.full((1, 1, 4, 4), 0.95)])
    y = torch.ones(2, dtype=torch.int64)

    def attack_of(eps):
        assert eps > 0
        # one short step: where it leads depends on the random start
        return PGD(eps=eps, step_size=eps / 2, num_steps=1)

    return EpsExplorer(model, x, y, ["low", "high"], attack_of, largest_eps=0.2)


def test_the_eps_slider_attacks_and_redraws(explorer, model):
    pictures = {}
    for eps, predicted in ((0.0, 1), (0.2, 0), (0.01, 1), (0.2, 0), (0.0, 1)):
        explorer.eps.value = eps
        assert explorer.predicted == predicted
        picture = bytes(explorer.picture.value)
        assert picture.startswith(PNG)
        assert pictures.setdefault(eps, picture) == picture
    assert len(set(pictures.values())) == 3
    assert all(module.training for module in model.modules())


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


@pytest.fixture
def weights():
    return WeightExplorer(4 * torch.tensor([0.1] * 10 + [1.0] * 8 + [3.0, 8.0]))


def test_the_weights_follow_scale_and_floor(weights):
    # in units of the mean, which is 4; the two last are the strongest tenth
    for scale, floor, pulls in (
        (1.0, 0.05, 20 * [1.0]),
        (1.0, 1.0, [0.1] * 10 + [1.0] * 10),
        (1.0, 0.2, [0.5] * 10 + [1.0] * 10),
        (10.0, 1.0, [0.1] * 10 + [1.0] * 8 + [3.0, 8.0]),
        (2.0, 1.0, [0.1] * 10 + [1.0] * 8 + [2.0, 2.0]),
    ):
        weights.scale.value, weights.floor.value = scale, floor
        assert f"{sum(pulls[-2:]) / sum(pulls):.0%} under ENGM" in weights.readout.value
        assert "55% of the pull under MSGD" in weights.readout.value
    assert "weights from 0.25 to 1" in weights.readout.value


def test_the_picture_follows_both_sliders(weights):
    pictures = [bytes(weights.picture.value)]
    for slider, value in ((weights.scale, 0.5), (weights.floor, 0.5), (weights.scale, 1.0)):
        slider.value = value
        pictures.append(bytes(weights.picture.value))
    assert len(set(pictures)) == 4
    assert all(picture.startswith(PNG) for picture in pictures)


def test_the_sliders_of_the_weights_reach_from_normalisation_to_msgd(weights):
    assert (weights.scale.value, weights.floor.value) == (1.0, 0.05)
    assert (10**weights.scale.min, 10**weights.scale.max) == (0.1, 10)
    assert 0 < weights.floor.min < 0.05
    assert weights.floor.max == 1


def test_moving_a_slider_of_the_weights_leaves_no_figure_open(weights):
    before = plt.get_fignums()
    weights.floor.value = 0.5
    assert plt.get_fignums() == before
