import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engm.errors import InputError
from engm.evaluation import checks as before
from engm.evaluation.accuracy import correct

K = 4


@pytest.fixture(scope="module")
def problem():
    """Four blobs in 16 pixels, and a linear model that tells them apart."""
    torch.manual_seed(0)
    y = torch.arange(200) % K
    x = (0.2 * torch.rand(K, 1, 4, 4)[y] + 0.02 * torch.randn(200, 1, 4, 4) + 0.4).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, K))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert correct(model, x, y).all()
    return model, x, y


class Around(nn.Module):
    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def test_what_fits_gives_its_number_of_classes(problem):
    model, x, y = problem
    assert before.num_classes(model, x, y) == K
    assert before.num_classes(model.double(), x.double(), y) == K
    model.float()


def nan_pixel(x):
    x = x.clone()
    x[5, 0, 2, 2] = float("nan")
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # the rest of what a batch may not be is in test_attacks.py
        (lambda m, x, y: (m, (x * 255).long(), y), "x is torch.int64"),
        (lambda m, x, y: (m, x.half(), y), "does not take torch.float16 images"),
        (lambda m, x, y: (m, x[:0], y[:0]), "there is no example"),
        (lambda m, x, y: (m, nan_pixel(x), y), "x goes from nan to nan"),
        (lambda m, x, y: (m, x * 1.9, y), "normalise inside the model"),
        (lambda m, x, y: (m, x, y + 1), "the model gives 4 logits, but classes go up to 4"),
        (lambda m, x, y: (m, x[..., :3], y), r"does not take torch.float32 images of shape \[2, 1"),
        (
            lambda m, x, y: (nn.Conv2d(1, 10, 4), x[:, 0], y),
            r"of shape \[2, .*\]; x\[:, None\] gives grey images",
        ),
        (lambda m, x, y: (m, x.double(), y), "does not take torch.float64 images.*dtype"),
        (lambda m, x, y: (m.to("meta"), x, y), "model and x are on cpu and meta; move"),
        (lambda m, x, y: (Around(m, after=lambda z: (z, z)), x, y), "the model gave tuple"),
        (lambda m, x, y: (Around(m, after=lambda z: z.argmax(1)), x, y), r"the model gave \[2\]"),
        (lambda m, x, y: (Around(m, after=lambda z: z[:, :1]), x, y * 0), "gives 1 logits"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(problem, change, message):
    from copy import deepcopy

    model, x, y = problem
    with pytest.raises(InputError, match=message):
        before.num_classes(*change(deepcopy(model), x, y))


def test_a_part_that_trains_itself_and_coarse_logits_are_flagged(problem):
    model, x, _ = problem
    model.eval()
    assert before.model_state(model, model(x)).passed
    assert "bfloat16" in before.model_state(model, model(x).bfloat16()).meaning
    model[1].train()
    found = before.model_state(model, model(x))
    model.eval()
    assert not found.passed and found.meaning.startswith("1 goes back to train mode")


def test_probabilities_and_nan_are_no_logits(problem):
    model, x, _ = problem
    logits = model(x).detach()
    assert before.logits_not_probabilities(logits).passed
    # log-probabilities have the gradient of logits
    assert before.logits_not_probabilities(logits.log_softmax(1)).passed
    for wrong in (logits.softmax(1), logits.sigmoid()):
        found = before.logits_not_probabilities(wrong)
        assert not found.passed and "return logits" in found.meaning
    logits[3:5, 1] = float("nan")
    found = before.logits_not_probabilities(logits)
    assert not found.passed and "2 of 200 clean images" in found.meaning
    found = before.logits_not_probabilities(0 * logits.nan_to_num() + 3)
    assert not found.passed and "All outputs are 3; the network has collapsed" in found.meaning


def test_clean_accuracy_is_held_against_always_the_same_answer():
    y = torch.tensor([0] * 140 + [1] * 60)
    assert before.clean_accuracy(torch.arange(200) < 160, y, 2).passed
    found = before.clean_accuracy(torch.arange(200) < 148, y, 2)  # 74% [67.5, 79.6] against 70%
    assert not found.passed and "74.0% of the clean images" in found.meaning
    assert "commonest class would get 70.0%" in found.meaning
    found = before.clean_accuracy(torch.arange(5) < 4, torch.arange(5) % 3, 3)
    assert not found.passed and "5 images are too few" in found.meaning


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (lambda x: x * 255, "multiplied by 255"),
        (lambda x: 2 * x - 1, r"moved to \[-1, 1\]"),
        (lambda x: (x - 0.5) / 0.075, "normalised by mean and standard deviation"),
    ],
)
def test_a_model_that_wants_other_pixels_is_flagged(problem, scale, words):
    model, x, y = problem
    # right on pixels of that scale alone: undo it before the model
    back = {"multiplied by 255": lambda x: x / 255, r"moved to \[-1, 1\]": lambda x: (x + 1) / 2}
    wants = Around(model, back.get(words, lambda x: x * 0.075 + 0.5))
    assert correct(wants, scale(x), y).float().mean() > 0.9
    standing = correct(wants, x, y)
    found = before.pixel_scale(wants, x, y, standing, 50)
    assert not found.passed
    assert before.pixel_scale(model, x, y, correct(model, x, y), 50).passed


def test_pixels_that_were_divided_twice_are_flagged(problem):
    model, x, y = problem
    found = before.pixel_scale(model, x / 255, y, correct(model, x, y), 50)
    assert not found.passed and "divided by 255 twice" in found.meaning


def seeded_noise(x):
    return x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_models_that_answer_otherwise_the_next_time_are_flagged(problem):
    model, x, _ = problem
    assert before.repeatable(model, x).passed
    assert before.repeatable(model, x[:1]).passed
    # logits that are not finite are no noise
    assert before.repeatable(Around(model, after=lambda z: (1e3 * z).softmax(1).log()), x).passed
    assert before.repeatable(nn.Sequential(model, nn.Dropout(0.5)).train(), x).passed
    shared = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), model)
    for wrong in (
        Around(model, lambda x: x + 0.01 * torch.randn_like(x)),
        Around(model, seeded_noise),  # the same draws, but for other images
        shared,
        Around(model, after=lambda z: F.dropout(z, 0.5, training=True)),
    ):
        found = before.repeatable(wrong, x)
        assert not found.passed and "Logits move by up to" in found.meaning


def test_zero_gradients_are_told_apart_by_where_they_come_from(problem):
    model, x, y = problem
    hidden, _, saturated = before.gradients(model, x, y)
    assert hidden.passed and saturated.passed
    hidden, _, saturated = before.gradients(Around(model, lambda x: (x * 50).round() / 50), x, y)
    assert not hidden.passed and "no gradient at 200 of 200" in hidden.meaning
    assert saturated.passed
    hidden, _, saturated = before.gradients(Around(model, after=lambda z: z * 1e4), x, y)
    assert hidden.passed
    assert not saturated.passed and "leads by" in saturated.meaning
    (found,) = before.gradients(model, x[:0], y[:0])
    assert not found.passed and "No image is classified rightly" in found.meaning


def test_a_few_images_without_a_gradient_are_no_reason(problem):
    model, x, y = problem

    def some(count):
        mask = (torch.arange(200) >= count).float().view(-1, 1, 1, 1)
        return Around(model, lambda x: x * mask + x.detach() * (1 - mask))

    assert before.gradients(some(2), x, y)[0].passed
    assert not before.gradients(some(3), x, y)[0].passed


def test_the_model_is_left_as_it_was(problem):
    model, x, y = problem
    model.train()
    model.zero_grad()
    before.num_classes(model, x, y)
    before.repeatable(model, x)
    before.gradients(model, x, y)
    before.pixel_scale(model, x, y, correct(model, x, y), 50)
    assert model.training and model[1].training
    assert all(p.grad is None for p in model.parameters())


class Counts(nn.Module):
    """Right on the first `usual` images, or on the first `scaled` where pixels leave [0, 1]."""

    def __init__(self, usual, scaled):
        super().__init__()
        self.usual, self.scaled = usual, scaled

    def forward(self, x):
        outside = x.min() < 0 or x.max() > 1
        right = torch.arange(len(x)) < (self.scaled if outside else self.usual)
        return torch.stack([~right, right], 1).float()


@pytest.mark.parametrize(("scaled", "passed"), [(770, True), (800, True), (900, False)])
def test_a_network_that_does_a_little_better_on_other_pixels_is_not_flagged(scaled, passed):
    x, y = torch.rand(1000, 1, 2, 2), torch.ones(1000, dtype=torch.long)
    model = Counts(770, scaled)
    assert before.pixel_scale(model, x, y, correct(model, x, y, 1000), 1000).passed is passed
