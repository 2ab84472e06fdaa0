"""A network that is cut computes what it did, with one trunk for several tails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from fusion.errors import UserError
from fusion.models import CutNetwork, MultiTaskNetwork, SeparableResNet
from fusion.models.cut import find_cuts

NETWORKS = {
    "separable": lambda: SeparableResNet(4, in_channels=3, width=0.1),
    "dense": lambda: models.DenseNet(8, (2, 2), 8, num_classes=4),
    "squeeze and excitation": lambda: models.mobilenet_v3_small(num_classes=4, width_mult=0.25),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_changes_nothing(name, equal) -> None:
    network = NETWORKS[name]().eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
        cuts = find_cuts(network)
        assert len(cuts) > 5
        for cut in cuts[:: len(cuts) // 5]:
            made = CutNetwork(network, cut.layer)
            assert torch.equal(made(images), expected)
            assert torch.equal(copy.deepcopy(made)(images), expected)
            own = {k: v for k, v in made.state_dict().items() if not k.startswith("unmerge.")}
            assert list(own) == list(network.state_dict())


def test_the_values_at_a_cut_inside_a_block_are_the_branch_and_the_shortcut(base) -> None:
    cuts = {cut.layer: cut for cut in find_cuts(base)}
    inside = cuts["layer2.0.conv2"].crossings
    assert {one.source for one in inside} == {"layer1.0.bn2", "layer2.0.bn1"}
    (whole,) = cuts["layer2.0.conv1"].crossings
    assert whole.source == "layer1.0.bn2"
    assert whole.channels == base.bn1.num_features
    assert "layer1.0.bn2.weight" in cuts["layer2.0.conv1"].trunk
    assert "layer2.0.conv1.weight" not in cuts["layer2.0.conv1"].trunk


def test_in_training_the_trunk_sees_all_images_and_a_tail_those_of_its_task(
    base, test_digits
) -> None:
    images = test_digits.normalise(test_digits.images[:48])
    batches = {"a": images[:32] * 2 + 1, "b": images[32:]}
    cut = CutNetwork(base, "layer3.0.conv1")
    state = {k: v for k, v in base.state_dict().items() if k not in cut.cut.trunk}
    own = {task: {k: v.clone() for k, v in state.items()} for task in batches}
    network = MultiTaskNetwork.assemble(cut, own).train()
    mixture, alone = copy.deepcopy(network), copy.deepcopy(network)
    together = network(batches)
    values = mixture.networks[0].trunk(torch.cat(list(batches.values())))
    parts = {"a": [v[:32] for v in values], "b": [v[32:] for v in values]}
    for task, part in parts.items():
        assert torch.equal(together[task], alone.for_task(task).tail(part))
    for expected in (mixture.for_task("a").bn1, network.for_task("b").bn1):
        assert torch.equal(network.for_task("a").bn1.running_var, expected.running_var)
    for task in batches:
        tail, expected = (each.for_task(task).layer3[0].bn1 for each in (network, alone))
        assert torch.equal(tail.running_var, expected.running_var)


def test_the_trunk_runs_once_for_all_tasks(base, test_digits) -> None:
    images = test_digits.normalise(test_digits.images[:8])
    cut = CutNetwork(base, "layer3.0.conv1")
    tail = {k: v for k, v in base.state_dict().items() if k not in cut.cut.trunk}
    network = MultiTaskNetwork.assemble(cut, {"a": tail, "b": {**tail}}).eval()
    runs = []
    network.networks[0].conv1.register_forward_hook(lambda *_: runs.append(1))
    found = network.outputs(images)
    assert len(runs) == 1
    for task in ("a", "b"):
        assert torch.equal(found[task], network.for_task(task)(images))
        assert torch.equal(found[task], base(images))


def test_features_are_read_by_index_or_matrix(base, test_digits) -> None:
    images = test_digits.normalise(test_digits.images[:8])
    for dense in (False, True):
        cut = CutNetwork(copy.deepcopy(base), "layer2.0.conv1", dense=dense).eval()
        (values,) = cut.trunk(images)
        order = torch.randperm(values.shape[1])
        reader = cut.unmerge[0]
        if dense:
            reader.matrix.copy_(torch.eye(len(order))[order])
        else:
            reader.index.copy_(order)
        torch.testing.assert_close(reader(values), values[:, order])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def test_mistakes_are_named(base) -> None:
    with pytest.raises(UserError, match=r"cannot be cut before 'layer2.0.conv9'.*layer2.0.conv"):
        CutNetwork(base, "layer2.0.conv9")
    with pytest.raises(UserError, match="Branching cannot be cut into trunk and tails"):
        find_cuts(Branching().eval())
