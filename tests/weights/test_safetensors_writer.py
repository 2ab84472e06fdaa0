"""A file that is written part by part is the file of the whole tensors, or none."""

from __future__ import annotations

import pytest
import torch

from fusion.errors import UserError
from fusion.weights import (
    TensorInfo,
    load_safetensors,
    map_safetensors,
    save_safetensors,
    writing_safetensors,
)
from fusion.weights.safetensors_header import TIED

TENSORS = {
    "b.weight": torch.arange(30.0).view(5, 6),
    "a.half": torch.arange(7, dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "ä": torch.rand(3, dtype=torch.float64),
}
INFOS = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
NOTES = {"z": "last", "a": "{}"}


def test_parts_in_any_order_make_the_file_of_the_whole(tmp_path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_safetensors(whole, {**TENSORS, "tied": TENSORS["b.weight"]}, NOTES)
    parts = tmp_path / "folder" / "parts.safetensors"
    with writing_safetensors(parts, INFOS, NOTES, tied={"tied": "b.weight"}) as writer:
        for name in reversed(TENSORS):
            flat = TENSORS[name].reshape(-1)
            for start in reversed(range(0, len(flat), 4)):
                writer.write(name, start, flat[start : start + 4])
        assert not parts.exists()
    assert parts.read_bytes() == whole.read_bytes()


def test_a_file_that_is_not_whole_does_not_appear(tmp_path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"before")
    with (
        pytest.raises(RuntimeError, match=r"bytes .* were not written"),
        writing_safetensors(path, INFOS) as writer,
    ):
        writer.write("count", 0, TENSORS["count"].reshape(-1))
    with pytest.raises(KeyboardInterrupt), writing_safetensors(path, INFOS):
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("start", "part"), [(28, torch.zeros(3)), (0, torch.zeros(3, dtype=torch.float64))]
)
def test_what_does_not_fit_its_place_is_refused(start, part, tmp_path) -> None:
    with (
        pytest.raises(ValueError, match=r"are not 'b\.weight'"),
        writing_safetensors(tmp_path / "file.safetensors", INFOS) as writer,
    ):
        writer.write("b.weight", start, part)


def test_reserved_metadata_is_refused(tmp_path) -> None:
    with (
        pytest.raises(UserError, match="keep strings"),
        writing_safetensors(tmp_path / "file.safetensors", INFOS, {TIED: "{}"}),
    ):
        pass


def test_mapped_tensors_are_the_files_and_writing_to_them_is_private(tmp_path) -> None:
    path = tmp_path / "file.safetensors"
    save_safetensors(path, {**TENSORS, "tied": TENSORS["b.weight"]})
    mapped = map_safetensors(path)
    assert mapped.keys() == {*TENSORS, "tied"}
    assert all(torch.equal(mapped[name], tensor) for name, tensor in TENSORS.items())
    assert mapped["tied"] is mapped["b.weight"]
    mapped["b.weight"].zero_()
    assert torch.equal(load_safetensors(path)["b.weight"], TENSORS["b.weight"])
    path.unlink()
    assert mapped["ä"].sum() == TENSORS["ä"].sum()
