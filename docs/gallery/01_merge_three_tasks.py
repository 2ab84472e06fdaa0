"""
Merge three tasks in twenty lines
=================================

A base network learns to read digits. Three experts are fine-tuned from it: one reads digits, one
says whether a digit is even, one says by how many quarter turns the image was rotated. Each has a
head of its own. Merging gives one body that answers all three questions.
"""

import torch

import fusion
from fusion.data import digits, grouped, quarter_turns
from fusion.figures.style import house_style, new_figure, palette
from fusion.models import CifarResNet
from fusion.taskpool import ClassificationTaskPool
from fusion.training import fit

# %%
# Three tasks on the same images, each with its own labels.


def tasks(split):
    images = digits(split)
    parity = grouped(images, {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]})
    return {"digit": images, "parity": parity, "quarter_turn": quarter_turns(images)}


train = tasks("train")

# %%
# The base, and an expert for each task: the base's body with a fresh head, fine-tuned.

torch.manual_seed(0)
base = CifarResNet(depth=8, num_classes=10, in_channels=1)
fit(base, train["digit"], epochs=3, lr=0.01, batch_size=64)
body = {key: value for key, value in base.state_dict().items() if not key.startswith("linear.")}

experts = {}
for name, images in train.items():
    expert = CifarResNet(depth=8, num_classes=len(images.class_names), in_channels=1)
    expert.load_state_dict(body, strict=False)
    fit(expert, images, epochs=8, lr=0.005, batch_size=64)
    experts[name] = expert

# %%
# A pool holds them with their data, and a method merges them. Labels are not used: the images
# alone tell what each layer receives.

pool = fusion.BaseModelPool(
    {"_pretrained_": base, **experts}, train_datasets={"_pretrained_": train["digit"], **train}
)
merged = fusion.merge(pool, "layerwise_least_squares")
print(type(merged).__name__, merged.tasks)

# %%
# The task pool measures each task with its own head.

measure = ClassificationTaskPool(tasks("test"), joint=None)
accuracy = {
    "its own expert": [
        measure.evaluate(expert, labels=pool.labels(name))[name]["accuracy"]
        for name, expert in experts.items()
    ],
}
for method in ("simple_average", "layerwise_least_squares"):
    results = measure.evaluate(fusion.merge(pool, method))
    accuracy[method] = [results[name]["accuracy"] for name in experts]

# %%
# One body in place of three. The plain average loses most on the third task, and least squares wins
# back about half of it.

with house_style():
    figure = new_figure(width=5.0, height=2.6)
    axes = figure.add_subplot()
    for place, ((label, values), style) in enumerate(zip(accuracy.items(), palette(3))):
        x = [task + 0.26 * (place - 1) for task in range(len(values))]
        bars = axes.bar(x, [100 * value for value in values], 0.24, color=style.color, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(experts)), list(experts))
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 110)
    figure.legend(loc="outside upper center", ncols=3)
