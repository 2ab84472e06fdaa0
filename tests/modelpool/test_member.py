from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion.modelpool.member import FactoryMember, ModuleMember, on_meta


class ComputesOnItsWeights(nn.Module):
    """What the meta device cannot construct: it looks at the values of its fresh weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        if self.layer.weight.abs().max().item() == 0:
            raise AssertionError


@pytest.mark.parametrize("architecture", [ComputesOnItsWeights, nn.LazyConv2d])
def test_a_bare_structure_has_no_values(architecture) -> None:
    if architecture is nn.LazyConv2d:
        architecture = {"_target_": "torch.nn.Conv2d", "_args_": [1, 2, 3]}
    assert all(p.is_meta for p in on_meta(architecture).parameters())


def test_a_bare_structure_downloads_no_weights() -> None:
    spec = {"_target_": "torchvision.models.resnet18", "weights": "IMAGENET1K_V1"}
    assert all(p.is_meta for p in FactoryMember(spec).architecture().parameters())


def test_a_module_is_not_touched_by_asking_for_its_structure(base, net, equal) -> None:
    bare = ModuleMember(base).architecture()
    assert {k: t.shape for k, t in bare.state_dict().items()} == {
        k: t.shape for k, t in base.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in bare.state_dict().values())
    assert equal(base, net())


def test_equal_weights_have_equal_fingerprints(base, net) -> None:
    assert ModuleMember(base).fingerprint() == ModuleMember(net()).fingerprint()
    other = net()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert ModuleMember(other).fingerprint() != ModuleMember(base).fingerprint()


def test_what_a_callable_holds_on_to_is_not_handed_out(base, net, equal) -> None:
    member = FactoryMember(lambda: base)
    with torch.no_grad():
        next(member.build().parameters()).zero_()
    assert all(tensor.is_meta for tensor in member.architecture().state_dict().values())
    assert equal(base, net())
