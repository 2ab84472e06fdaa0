"""
Batch norm decides
==================

Running means and variances describe the inputs of a layer. After a merge these inputs are others,
so the statistics must be, too. The same merged weights with each treatment:
"""

import fusion
from fusion.figures.style import COLORS, house_style, new_figure

pool = fusion.load_modelpool("digits_tasks")
tasks = fusion.load_taskpool("digits_tasks")

# %%
# The mean of four experts with heads of their own. ``recalibrate`` measures the statistics on
# training images of all tasks; ``recalibrate_per_task`` keeps a set for each task.

treatments = {
    "pretrained": "the base's",
    "interpolate": "mean of the experts'",
    "merge": "mixture of the experts'",
    "repair": "REPAIR",
    "recalibrate": "measured again",
    "recalibrate_per_task": "measured again, per task",
}
mean = {}
for treatment in treatments:
    merged = fusion.merge(pool, "simple_average", batch_norm=treatment)
    results = tasks.evaluate(merged)
    mean[treatment] = sum(100 * result["accuracy"] for result in results.values()) / len(results)
    print(f"{treatment:22}{mean[treatment]:.1f} %")

# %%

with house_style():
    figure = new_figure(width=5.0, height=2.4)
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="y")
    bars = axes.barh(list(treatments.values()), list(mean.values()), 0.6, color=COLORS[1])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("mean test accuracy over four tasks (%)")

# %%
# See :doc:`/concepts/batch_norm` for why.
