"""
Methods side by side
====================

Methods are called by the names that the command line uses. Four experts on handwritten digits, and
their accuracy after merging as a share of the accuracy that each expert has alone.
"""

import fusion
from fusion.figures.style import COLORS, house_style, new_figure

pool = fusion.load_modelpool("digits_tasks")
tasks = fusion.load_taskpool("digits_tasks")

# %%

alone = {
    name: tasks.evaluate(pool.load_model(name), labels=pool.labels(name))[name]["accuracy"]
    for name in pool.model_names
}
names = [
    "simple_average",
    "task_arithmetic",
    "ties_merging",
    "task_singular_vectors",
    "iso_c",
    "emr_merging",
    "regmean",
    "layerwise_least_squares",
]
shares = {}
for name in names:
    results = tasks.evaluate(fusion.merge(pool, name))
    shares[name] = [100 * results[task]["accuracy"] / alone[task] for task in alone]

# %%
# A bar is the mean over the tasks, a dot one task. The default options of each method are used;
# ``emr_merging`` keeps a mask for each task, the others return one body.

with house_style():
    figure = new_figure(width=5.5, height=3.0)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="y")
    order = sorted(shares, key=lambda name: sum(shares[name]))
    means = [sum(shares[name]) / len(alone) for name in order]
    axes.barh(order, means, 0.6, color=COLORS[5])
    for row, name in enumerate(order):
        axes.plot(shares[name], [row] * len(alone), "o", color="black", markersize=2.5)
        axes.text(103, row, f"{means[row]:.0f}", va="center")
    axes.set_xlim(0, 102)
    axes.set_xlabel("accuracy as a share of the expert's own (%); right: mean")

# %%
# One pool, one seed: see :doc:`/methods` for measured tables.
