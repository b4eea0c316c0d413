"""The figures of the notebooks. Colours are Okabe and Ito's, which colour-blind readers tell apart.

Every function draws on a new pyplot figure and returns it; accuracies go in as fractions and are
shown in percent.
"""

from engm.plots.accuracy import accuracy_curves, learning_curves, lines
from engm.plots.comparison import best_and_last_rows, difference_intervals
from engm.plots.convergence import log_curves
from engm.plots.costs import cost_ratios
from engm.plots.images import adversarial_examples, prediction
from engm.plots.live import training_view
from engm.plots.norms import fits, norms_from_inputs, pulls
from engm.plots.robustness import robustness_curve
from engm.plots.sensitivity import accuracy_heat_maps, best_to_last
from engm.plots.style import (
    BLUE,
    COLOURS,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    sharp_figures,
    show_image,
    to_png,
)
from engm.plots.variance import against_loss, batch_variance, layer_bars, seed_lines
from engm.plots.weights import (
    corrupted_steps,
    gram_matrices,
    running_scale,
    strongest_and_weakest,
    strongest_share,
    weight_function,
    weighted_pulls,
    weights_over_epochs,
    who_pulls,
)

__all__ = [
    "BLUE",
    "COLOURS",
    "GREEN",
    "ORANGE",
    "PINK",
    "RED",
    "SKY",
    "accuracy_curves",
    "accuracy_heat_maps",
    "adversarial_examples",
    "against_loss",
    "batch_variance",
    "best_and_last_rows",
    "best_to_last",
    "corrupted_steps",
    "cost_ratios",
    "difference_intervals",
    "fits",
    "gram_matrices",
    "layer_bars",
    "learning_curves",
    "lines",
    "log_curves",
    "norms_from_inputs",
    "prediction",
    "pulls",
    "robustness_curve",
    "running_scale",
    "seed_lines",
    "sharp_figures",
    "show_image",
    "strongest_and_weakest",
    "strongest_share",
    "to_png",
    "training_view",
    "weight_function",
    "weighted_pulls",
    "weights_over_epochs",
    "who_pulls",
]
