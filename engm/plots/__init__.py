"""The figures of the notebooks. Colours are Okabe and Ito's, which colour-blind readers tell apart.

Every function draws on a new pyplot figure and returns it; accuracies go in as fractions and are
shown in percent.
"""

from engm.plots.accuracy import accuracy_curves, best_and_last, learning_curves, lines
from engm.plots.costs import cost_ratios
from engm.plots.images import adversarial_examples, prediction
from engm.plots.norms import fits, norms_from_inputs, pulls
from engm.plots.style import BLUE, COLOURS, GREEN, ORANGE, PINK, RED, SKY, show_image, to_png

__all__ = [
    "BLUE",
    "COLOURS",
    "GREEN",
    "ORANGE",
    "PINK",
    "RED",
    "SKY",
    "accuracy_curves",
    "adversarial_examples",
    "best_and_last",
    "cost_ratios",
    "fits",
    "learning_curves",
    "lines",
    "norms_from_inputs",
    "prediction",
    "pulls",
    "show_image",
    "to_png",
]
