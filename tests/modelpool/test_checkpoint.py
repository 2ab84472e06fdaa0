from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.models import CifarResNet
from fusion.weights import save_safetensors

SPEC = {
    "_target_": "fusion.models.CifarResNet",
    "depth": 8,
    "num_classes": 10,
    "in_channels": 1,
    "width": 0.5,
}


def told(member: Checkpoint) -> str:
    with pytest.raises(UserError) as caught:
        BaseModelPool({"_pretrained_": member}).preflight()
    return str(caught.value)


class Boom:
    """Leaves a file behind when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_no_code_in_a_pickled_file_is_run(tmp_path) -> None:
    torch.save({"weight": Boom(tmp_path / "boom")}, tmp_path / "evil.pt")
    assert "whose code would have to run" in told(Checkpoint(tmp_path / "evil.pt", SPEC))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_told(tmp_path, suffix) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"not a checkpoint at all")
    assert str(path) in told(Checkpoint(path, SPEC))


def test_a_file_cut_short_is_told(base, tmp_path) -> None:
    path = tmp_path / "cut.safetensors"
    save_safetensors(path, base.state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in told(Checkpoint(path, SPEC))


def test_what_is_not_there_or_no_checkpoint_is_told(tmp_path) -> None:
    assert "there is no such file" in told(Checkpoint(tmp_path / "none.pt", SPEC))
    assert "is a folder; give the file in it" in told(Checkpoint(tmp_path, SPEC))
    (tmp_path / "weights.h5").touch()
    assert "expected a .safetensors file or one of .pt" in told(
        Checkpoint(tmp_path / "weights.h5", SPEC)
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_keys_and_shapes_must_fit_strictly(base, tmp_path, suffix) -> None:
    state = dict(base.state_dict())
    first, second, *_ = state
    state["invented"] = state.pop(first)
    state[second] = torch.zeros(99)
    path = tmp_path / f"odd{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_safetensors(path, state)
    message = told(Checkpoint(path, SPEC))
    assert f"does not fit the architecture: 1 tensor is missing: {first}" in message
    assert "1 tensor is unknown to the architecture: invented" in message
    assert f"1 tensor is of another shape: {second} is (99,), the architecture has (" in message
    with pytest.raises(UserError, match="invented"):
        Checkpoint(path, SPEC).build()


def test_weights_are_read_without_building_the_network(base, tmp_path) -> None:
    def bare() -> nn.Module:
        network = CifarResNet(8, 10, 1, 0.5)
        assert all(tensor.is_meta for tensor in network.state_dict().values())
        return network

    path = tmp_path / "m.safetensors"
    save_safetensors(path, base.state_dict())
    tensors = Checkpoint(path, bare).tensors()
    assert all(torch.equal(tensors[key], value) for key, value in base.state_dict().items())
