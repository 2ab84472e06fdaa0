"""
Least squares against the number of images
==========================================

Rules such as RegMean and layerwise least squares look at what each layer receives. How many images
do they need? The labels are not used.
"""

import fusion
from fusion.figures.style import house_style, new_figure, palette

pool = fusion.load_modelpool("digits_tasks")
tasks = fusion.load_taskpool("digits_tasks")


def mean_accuracy(model):
    results = tasks.evaluate(model)
    return sum(100 * result["accuracy"] for result in results.values()) / len(results)


# %%
# The statistics are measured on so many images of each of the four experts. Batch norm of RegMean
# and of the average is measured on the same number of images, of all experts together.

counts = (4, 8, 16, 32, 64, 125, 250, 500)
found = {"simple_average": [], "regmean": [], "layerwise_least_squares": []}
for count in counts:
    for method, values in found.items():
        merged = fusion.merge(
            pool, method, statistics_images=count, calibration_images=max(count, 16)
        )
        values.append(mean_accuracy(merged))

# %%

with house_style():
    figure = new_figure(width=5.0, height=2.8)
    axes = figure.add_subplot()
    for (method, values), style in zip(found.items(), palette(3)):
        axes.plot(
            counts,
            values,
            label=method,
            color=style.color,
            marker=style.marker,
            linestyle=style.linestyle,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("images of each expert")
    axes.set_ylabel("mean test accuracy (%)")
    axes.legend()
