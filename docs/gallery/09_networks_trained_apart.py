"""
Two networks trained apart
==========================

Without a common base there are no task vectors. Two networks from different initialisations can
still be merged: aligned first, then averaged, or solved layer by layer on a few hundred images.
"""

import fusion
from fusion.figures.style import COLORS, house_style, new_figure

pool = fusion.load_modelpool("digits_pair")
tasks = fusion.load_taskpool("digits")

# %%
# The networks themselves, and four ways to make one of them.

labels = pool.labels("first")
ways = {
    "average": ("simple_average", {}),
    "Git Re-Basin, by weights": ("git_rebasin", {"by": "weights"}),
    "Git Re-Basin, by activations": ("git_rebasin", {"by": "activations"}),
    "least squares": ("layerwise_least_squares", {}),
    "least squares, aligned": ("layerwise_least_squares", {"align": "activations"}),
}
accuracy = {name: tasks.evaluate(pool.load_model(name), labels=labels) for name in pool.model_names}
for way, (method, options) in ways.items():
    accuracy[way] = tasks.evaluate(fusion.merge(pool, method, **options), labels=labels)
errors = {way: 100 - 100 * found["digits"]["accuracy"] for way, found in accuracy.items()}

# %%

with house_style():
    figure = new_figure(width=5.0, height=2.6)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="y")
    colors = [COLORS[0]] * len(pool) + [COLORS[1]] * len(ways)
    bars = axes.barh(list(errors), list(errors.values()), 0.6, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("test error (%)")
