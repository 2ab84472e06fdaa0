"""Checkpoints that come back as they were saved, whole or in parts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fusion.errors import UserError
from fusion.weights import (
    ConvertedSource,
    RenamedSource,
    SafetensorsSource,
    load_safetensors,
    read_metadata,
    safetensors_header,
    save_safetensors,
)

DTYPES = [
    torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "model.safetensors"


def test_a_network_comes_back(network, path):
    tensors = network.to(memory_format=torch.channels_last).state_dict()
    save_safetensors(path, tensors, {"architecture": "SkipNet", "für": "日本"})
    loaded = load_safetensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert read_metadata(path) == {"architecture": "SkipNet", "für": "日本"}
    network.load_state_dict(loaded)


def test_tied_tensors_are_written_once_and_tied_again(network, path):
    save_safetensors(path, network.state_dict(), {})
    assert "again.weight" not in load_file(path)
    loaded = load_safetensors(path)
    assert loaded["again.weight"] is loaded["conv.weight"]
    source = SafetensorsSource(path)
    assert torch.equal(source["again.weight"], network.conv.weight)
    assert source.info("again.weight") == source.info("conv.weight")


def test_views_of_one_storage_are_tensors_of_their_own(path):
    storage = torch.arange(12.0)
    tensors = {
        "head": storage[:4],
        "overlap": storage[2:6],
        "table": storage.reshape(3, 4),
        "transposed": storage.reshape(3, 4).T,
        "one for all": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 3),
        "also empty": torch.zeros(0, 3),
    }
    save_safetensors(path, tensors)
    loaded = load_safetensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    loaded["head"].zero_()
    assert torch.equal(loaded["table"], tensors["table"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_are_read_in_c_order(dtype, path, make):
    tensor = (make(0, 5, 7) * 3).to(dtype)
    save_safetensors(path, {"a": make(1, 3), "t": tensor, "z": make(2, 3)})
    source = SafetensorsSource(path)
    assert source.info("t").dtype == dtype
    assert source.info("t").nbytes == tensor.nbytes
    flat = tensor.reshape(-1)
    for start, stop in [(0, 35), (0, 1), (3, 17), (30, 99), (35, 40)]:
        part = source.read("t", start, stop)
        assert part.dtype == dtype
        assert torch.equal(part.view(torch.uint8), flat[start:stop].view(torch.uint8))


def test_scalars_have_no_dimension(path):
    save_safetensors(path, {"n": torch.tensor(7)})
    assert SafetensorsSource(path)["n"].shape == ()
    assert SafetensorsSource(path)["n"] == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_part_is_read_into_a_vector_of_any_type(dtype, path, make):
    tensor = make(0, 4, 3, 5)
    save_safetensors(path, {"w": tensor})
    stored = SafetensorsSource(path)
    as_half = ConvertedSource(stored, {"w": torch.float16})
    for source in (stored, RenamedSource(stored, {"w": "w"}), as_half):
        part = torch.zeros(9, dtype=dtype)
        source.read_into(part, "w", 7)
        assert torch.equal(part, source.read("w", 7, 16).to(dtype))


def test_a_header_is_parsed_once_until_the_file_changes(path, make, monkeypatch):
    parsed = []
    library = safetensors_header.safe_open
    monkeypatch.setattr(
        safetensors_header, "safe_open", lambda *a, **k: parsed.append(a) or library(*a, **k)
    )
    for note in ("first", "other"):
        save_safetensors(path, {"w": make(0, 4)}, {"note": note})
        read_metadata(path)["note"] = "a copy"
        assert [read_metadata(path)["note"] for _ in range(3)] == [note] * 3
    assert len(parsed) == 2


def test_asking_for_a_name_reads_nothing(path, make, monkeypatch):
    save_safetensors(path, {"w": make(0)})
    monkeypatch.setattr(SafetensorsSource, "read", None)
    assert "w" in SafetensorsSource(path)
    assert "v" not in SafetensorsSource(path)


def test_a_source_can_be_saved(network, path, tmp_path):
    save_safetensors(path, network.state_dict())
    again = tmp_path / "again.safetensors"
    save_safetensors(again, SafetensorsSource(path))
    for name, tensor in network.state_dict().items():
        assert torch.equal(load_safetensors(again)[name], tensor)


def test_a_failed_save_leaves_the_old_file(path, make):
    save_safetensors(path, {"w": make(0)})
    before = path.read_bytes()
    with pytest.raises(UserError, match="metadata 'epochs'"):
        save_safetensors(path, {"w": make(1)}, {"epochs": 3})
    with pytest.raises(UserError, match="meta device"):
        save_safetensors(path, {"w": torch.zeros(3, device="meta")})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_damaged_files_are_named(path, make):
    with pytest.raises(UserError, match="no file"):
        SafetensorsSource(path)
    save_safetensors(path, {"w": make(0)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:40], whole[:-1], whole + b"x", b"PK\x03\x04" * 50):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            SafetensorsSource(path)
