"""A checkpoint is filled tensor by tensor, and nothing random is drawn for it."""

from __future__ import annotations

import subprocess
import sys

import torch

from fusion.modelpool import Checkpoint
from fusion.models import CifarResNet
from fusion.weights import save_safetensors

META = """
import sys
from fusion.modelpool.member import on_meta

model = on_meta({"_target_": "fusion.models.CifarResNet", "depth": 8})
assert all(tensor.is_meta for tensor in model.state_dict().values())
print("torch._dynamo" in sys.modules)
"""


def test_building_draws_nothing_and_gives_the_weights_in_the_architectures_dtype(tmp_path):
    network = CifarResNet(8)
    path = tmp_path / "half.safetensors"
    save_safetensors(path, network.half().state_dict())
    before = torch.get_rng_state()
    built = Checkpoint(path, architecture=lambda: CifarResNet(8)).build()
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name].to(tensor.dtype))
    assert built.conv1.weight.dtype == torch.float32
    assert built.conv1.weight.requires_grad


def test_the_meta_device_does_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", META], check=True, capture_output=True)
    assert done.stdout.split() == [b"False"]
