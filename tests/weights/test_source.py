"""A module as a source of tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion.weights import ModuleSource


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_parts_in_c_order_make_up_each_tensor(network, memory_format):
    network = network.to(memory_format=memory_format)
    source = ModuleSource(network)
    assert dict(source).keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        parts = [source.read(name, start, start + 7) for start in range(0, tensor.numel(), 7)]
        assert torch.equal(torch.cat(parts), tensor.contiguous().reshape(-1))


def test_a_transposed_view_is_read_in_c_order():
    module = nn.Linear(5, 3)
    module.weight = nn.Parameter(torch.arange(15.0).reshape(5, 3).T)
    assert torch.equal(ModuleSource(module).read("weight", 4, 11), module.weight.reshape(-1)[4:11])


def test_what_is_known_before_reading(network):
    with torch.device("meta"):
        source = ModuleSource(type(network)())
    info = source.info("stem.weight")
    assert (info.shape, info.dtype, info.numel, info.nbytes) == (
        (6, 1, 3, 3),
        torch.float32,
        54,
        216,
    )
    assert source.info("norm.num_batches_tracked").shape == ()
    with pytest.raises(KeyError):
        source.info("nothing")


def test_extra_state_stays_with_the_module():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

    assert set(Odd(2, 2).state_dict()) == {"weight", "bias", "_extra_state"}
    assert set(ModuleSource(Odd(2, 2))) == {"weight", "bias"}
