"""
Batch norm decides
==================

Running means and variances describe the inputs of a layer. After a merge these inputs are others,
so the statistics must be, too. The same merged weights with each treatment:
"""

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import fusion
from fusion.cli.job import register_resolvers
from fusion.config_folder import config_folder
from fusion.figures.style import COLORS, house_style, new_figure
from fusion.target import build

register_resolvers()
with initialize_config_dir(str(config_folder()), version_base="1.3"):
    choices = ["modelpool=digits_tasks", "taskpool=digits_tasks"]
    config = compose("fusion_bench", overrides=choices)
pool, tasks = (
    build(OmegaConf.to_container(config[key], resolve=True)) for key in ("modelpool", "taskpool")
)

# %%
# The mean of four experts with heads of their own. ``recalibrate`` measures the statistics on
# training images of all tasks; ``recalibrate_per_task`` keeps a set for each task.

treatments = {
    "pretrained": "the base's",
    "interpolate": "mean of the experts'",
    "merge": "mixture of the experts'",
    "repair": "REPAIR",
    "recalibrate": "measured anew",
    "recalibrate_per_task": "measured anew, per task",
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
