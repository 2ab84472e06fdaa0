"""
Alignment and the barrier
=========================

Two networks that were trained from different initialisations do the same work with their units in
different orders. On the straight line between their weights the accuracy collapses. Permuting the
units of one network into the order of the other, which leaves its outputs unchanged, brings the
line back; new statistics for batch norm do the rest.
"""

import torch

import fusion
from fusion.alignment import align, permutation_spec
from fusion.data import digits
from fusion.figures.barrier import barrier_figure
from fusion.method import InterpolationBarrier
from fusion.models import CifarResNet
from fusion.training import fit

# %%
# The networks differ in their initial weights and in the order of the images.

train, test = digits("train"), digits("test")


def trained(seed):
    torch.manual_seed(seed)
    model = CifarResNet(depth=8, num_classes=10, in_channels=1, width=2)
    fit(model, train, epochs=12, lr=0.01, batch_size=64, seed=seed)
    return model.eval()


first, second = trained(1), trained(2)

# %%
# Which units may be permuted follows from the operations of the forward pass. The aligned network
# computes what the second one computes.

images = torch.stack([test[i][0] for i in range(8)])
spec = permutation_spec(second, images[:1])
aligned = align(second, first, spec=spec, by="activations", data=[images])
with torch.no_grad():
    change = (aligned.model(images) - second(images)).abs().max()
print(f"largest change of an output: {change:.1e}")
print("units in", len(spec.groups), "groups;", sum(g.moved for g in aligned.groups), "moved")

# %%
# The line between them, measured at nine points for each alignment and each treatment of batch
# norm.

pool = fusion.BaseModelPool(
    {"first": first, "second": second},
    train_datasets={"first": train, "second": train},
    test_datasets={"first": test, "second": test},
)
barrier = InterpolationBarrier(points=9, plot=False)
barrier.run(pool)
figure = barrier_figure(barrier.table)
