"""
Save, load, export
==================

A merged network is one safetensors file that says how it is built and which tasks it has. Any task
of it can be written as a plain network, for use without this package.
"""

import tempfile
from pathlib import Path

import torch

import fusion
from fusion.export import export
from fusion.figures.style import house_style, new_figure
from fusion.models import CifarResNet

pool = fusion.load_modelpool("digits_tasks")
tasks = fusion.load_taskpool("digits_tasks")

# %%
# The file needs nothing beside it.

folder = Path(tempfile.mkdtemp())
pool.save_model(fusion.merge(pool, "layerwise_least_squares"), folder / "merged.safetensors")
model = fusion.load(folder / "merged.safetensors").eval()
print(model.tasks)

# %%
# One task as a state dict of the original class; ``to=….onnx`` writes ONNX.

export(folder / "merged.safetensors", folder / "parity.pt", task="parity")
parity = CifarResNet(depth=8, num_classes=2, in_channels=1)
parity.load_state_dict(torch.load(folder / "parity.pt", weights_only=True))

# %%
# Four answers about each image, from one body.

data = tasks.load_dataset("quarter_turn")
images = torch.stack([data[i][0] for i in range(8)])
with torch.no_grad():
    answers = {
        task: [tasks.load_dataset(task).class_names[i] for i in model(images, task=task).argmax(1)]
        for task in model.tasks
    }
    same = torch.equal(parity.eval()(images).argmax(1), model(images, task="parity").argmax(1))
print("the exported network answers alike:", same)

with house_style():
    figure = new_figure(width=7.0, height=1.9)
    for number, axes in enumerate(figure.subplots(1, len(images))):
        axes.imshow(images[number, 0], cmap="gray_r")
        axes.set_axis_off()
        axes.set_title("\n".join(values[number] for values in answers.values()), fontsize=7)
