"""The figures of the notebooks. Colours are Okabe and Ito's, which colour-blind readers tell apart.

Every function draws on a new pyplot figure and returns it; accuracies go in as fractions and are
shown in percent.
"""

from engm.plots.curves import (
    accuracy_curves,
    corrupted_steps,
    fits,
    learning_curves,
    lines,
    log_curves,
    robustness_curve,
    running_scale,
    seed_lines,
)
from engm.plots.examples import (
    adversarial_examples,
    gram_matrices,
    norms_from_inputs,
    prediction,
    pulls,
    strongest_and_weakest,
    strongest_share,
    weight_function,
    weighted_pulls,
    weights_over_epochs,
    who_pulls,
)
from engm.plots.runs import (
    accuracy_heat_maps,
    best_and_last_rows,
    best_to_last,
    cost_ratios,
    difference_intervals,
)
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
