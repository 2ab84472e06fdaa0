"""
A rule of your own
==================

A merging rule is a frozen dataclass with one method: it receives one tensor of one layer, in the
base and in every expert, and returns the merged tensor. Here, the median of the experts, which a
single damaged expert cannot move far.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import fusion
from fusion.data import digits
from fusion.figures.style import house_style, new_figure, palette
from fusion.merging import Piece, Rule, merge_tensor
from fusion.merging.rules import Mean
from fusion.method import Merge
from fusion.models import CifarResNet
from fusion.taskpool import ClassificationTaskPool
from fusion.training import fit


@dataclass(frozen=True, kw_only=True)
class Median(Rule):
    """The median of the experts, entry by entry."""

    elementwise = True

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor."""
        return piece.experts.median(0).values


# %%
# On one tensor:

experts = [torch.tensor([1.0, 2.0]), torch.tensor([1.2, 2.2]), torch.tensor([9.0, -9.0])]
print("mean  ", merge_tensor(Mean(), experts))
print("median", merge_tensor(Median(), experts))

# %%
# On networks: five experts of one base, of which one is damaged by noise of growing strength.

train, test = digits("train"), digits("test")
torch.manual_seed(0)
base = CifarResNet(depth=8, num_classes=10, in_channels=1)
fit(base, train, epochs=2, lr=0.01, batch_size=64)
experts = []
for seed in range(5):
    expert = copy.deepcopy(base)
    fit(expert, train, epochs=3, lr=0.002, batch_size=64, seed=seed)
    experts.append(expert)

measure = ClassificationTaskPool({"digits": test})
strengths = (0.0, 1.0, 2.0, 4.0, 8.0)
accuracy = {"Mean": [], "Median": []}
for strength in strengths:
    damaged = copy.deepcopy(experts[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in damaged.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.square().mean().sqrt(), alpha=strength)
    pool = fusion.BaseModelPool(
        {"_pretrained_": base, **{f"expert {i}": e for i, e in enumerate([damaged, *experts[1:]])}},
        train_datasets={"_pretrained_": train},
    )
    for rule in (Mean(), Median()):
        merged = Merge(rule=rule).run(pool)
        results = measure.evaluate(merged, labels=pool.labels("_pretrained_"))
        accuracy[type(rule).__name__].append(100 * results["digits"]["accuracy"])

# %%
# The pipeline did everything else: heads, batch norm, checks.

with house_style():
    figure = new_figure(width=4.5, height=2.6)
    axes = figure.add_subplot()
    for (name, values), style in zip(accuracy.items(), palette(3)[1:]):
        axes.plot(
            strengths,
            values,
            label=name,
            color=style.color,
            marker=style.marker,
            linestyle=style.linestyle,
        )
    axes.set_xlabel("noise on one of five experts, relative to its weights")
    axes.set_ylabel("test accuracy (%)")
    axes.legend()
