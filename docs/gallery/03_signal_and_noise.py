"""
Signal in a layer against noise
===============================

A weight matrix that has learned nothing looks like noise, and random-matrix theory says how large
the singular values of noise get. What lies above that edge is signal.
"""

import torch

from fusion.data import digits
from fusion.figures.style import house_style, new_figure, palette
from fusion.models import CifarResNet
from fusion.spectrum import layer_snr
from fusion.training import fit

# %%
# The same layer before and after training: its kernel as a matrix with one row for each output
# channel.

torch.manual_seed(0)
model = CifarResNet(depth=8, num_classes=10, in_channels=1, width=2)
layer = model.get_submodule("layer2.0.conv2")
found = {"before training": layer_snr(layer.weight.detach())}
fit(model, digits("train"), epochs=15, lr=0.01, batch_size=64)
found["after training"] = layer_snr(layer.weight.detach())

for when, result in found.items():
    print(f"{when}: SNR {result.snr:.2f}, {result.signal_rank} directions of signal")

# %%
# The noise level comes from the median singular value, the edge from the Tracy-Widom law of the
# largest one: pure noise exceeds it in about one of a hundred layers.

with house_style():
    figure = new_figure(width=6.0, height=2.6)
    grid = figure.subplots(1, 2, sharey=True)
    for axes, (when, result), style in zip(grid, found.items(), palette(3)[1:]):
        values = (result.singular_values / result.threshold).tolist()
        axes.plot(range(1, len(values) + 1), values, "o", color=style.color, markersize=2.5)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(f"{when}: SNR {result.snr:.2f}")
        axes.set_xlabel("singular value, in descending order")
    grid[0].set_ylabel("size, relative to the edge of noise")
    largest = max(float(result.singular_values[0]) / result.threshold for result in found.values())
    grid[0].set_ylim(0, 1.1 * largest)
    grid[0].text(64, 1.03, "edge of noise", ha="right", fontsize=7)

# %%
# See :doc:`/mathematics/noise` for the model, and :doc:`/selection` for whether merging only the
# layers with the most signal helps.
