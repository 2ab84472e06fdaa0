"""Running statistics from Gram matrices are those that a pass over the images measures."""

from __future__ import annotations

import torch
from torch import nn

from fusion.merging.gram_statistics import statistics_from_grams
from fusion.merging.members import LayerChoice, Members, every_layer
from fusion.merging.statistics import gather
from fusion.modelpool import BaseModelPool


class PreActivation(nn.Module):
    """A norm that no layer stands right before, a bias, groups, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=True)
        self.first = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.before = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        found = self.first(self.stem(images)).relu()
        found = self.before(found + self.inner(found)).relu()
        return self.head(found.mean((2, 3)))


def made(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PreActivation().eval()


def test_one_expert_keeps_the_statistics_that_its_images_have(train_digits) -> None:
    few = train_digits.select(torch.arange(200))
    pool = BaseModelPool({"x": made(0)}, train_datasets={"x": few})
    members = Members.read(pool)
    measured = gather(pool, members, {"gram", "moments"})
    found = statistics_from_grams(members, every_layer(members), made(0), measured)
    assert set(found) == {f"{n}.running_{w}" for n in ("first", "before") for w in ("mean", "var")}
    for norm in ("first", "before"):
        mean, variance = measured[f"{norm}.running_mean"]["moments"][0]
        torch.testing.assert_close(
            found[f"{norm}.running_mean"].double(), mean, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            found[f"{norm}.running_var"].double(), variance, rtol=1e-4, atol=1e-6
        )


def test_a_merged_first_layer_has_the_statistics_of_the_mixture(train_digits) -> None:
    """Its inputs are the images themselves: the result is exact, by shares."""
    few = train_digits.select(torch.arange(200))
    parts = {"x": few.select(torch.arange(50)), "y": few.select(torch.arange(50, 200))}
    pool = BaseModelPool({"x": made(0), "y": made(1)}, train_datasets=parts)
    members = Members.read(pool)
    measured = gather(pool, members, {"gram", "moments"})
    choice = LayerChoice({"stem": (0.25, 0.75)})
    found = statistics_from_grams(members, choice, made(2), measured)
    assert set(found) == {"first.running_mean", "first.running_var"}
    with torch.no_grad():
        values = made(2).stem(torch.stack([image for image, _ in few])).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["first.running_mean"], values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found["first.running_var"], values.var(1, unbiased=False), rtol=1e-4, atol=1e-6
    )
