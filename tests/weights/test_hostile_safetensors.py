"""A safetensors file is read as the library reads it, or refused in one sentence."""

from __future__ import annotations

import copy
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fusion.errors import UserError
from fusion.weights import SafetensorsSource, load_safetensors, read_metadata, save_safetensors
from fusion.weights.safetensors_file import TIED

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"w": {key: value for key, value in {**F32, **changes}.items() if value != "absent"}}


def noted(metadata: object) -> bytes:
    return file({"__metadata__": metadata, "w": F32})


def tied(text: str) -> bytes:
    return noted({TIED: text})


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of no bytes": file(b"", b""),
    "header of 2^63 bytes": file(b"{}", length=2**63),
    "header beyond the file": file(b"{}", length=100),
    "header above the limit": file(b"{}", length=100_000_001),
    "text": b"these are the weights\n" * 20,
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "no JSON": file(b"{'w'"),
    "not UTF-8": file(b'{"\xff": {}}'),
    "a list": file([]),
    "a number": file(b"7", b""),
    "null": file(b"null", b""),
    "deep nesting": file(b'{"w":' + b"[" * 200_000),
    "closed deep nesting": file(b'{"w":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "tensor is null": file({"w": None}),
    "tensor is a list": file({"w": [1]}),
    "tensor is empty": file({"w": {}}),
    "no dtype": file(entry(dtype="absent")),
    "no shape": file(entry(shape="absent")),
    "no offsets": file(entry(data_offsets="absent")),
    "dtype null": file(entry(dtype=None)),
    "dtype unknown": file(entry(dtype="F31")),
    "dtype a list": file(entry(dtype=["F32"])),
    "dtype of four bits": file(entry(dtype="F4", shape=[16])),
    "shape null": file(entry(shape=None)),
    "shape a number": file(entry(shape=2)),
    "shape negative": file(entry(shape=[-2])),
    "shape twice negative": file(entry(shape=[-2, -1])),
    "shape a fraction": file(entry(shape=[2.0])),
    "shape a string": file(entry(shape=["2"])),
    "shape a boolean": file(entry(shape=[True, 2])),
    "shape of terabytes": file(entry(shape=[10**12])),
    "shape beyond 64 bits": file(entry(shape=[2**64])),
    "shape that overflows": file(entry(shape=[2**62, 8])),
    "shape of many digits": file(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
    "offsets null": file(entry(data_offsets=None)),
    "offsets three": file(entry(data_offsets=[0, 8, 8])),
    "offsets one": file(entry(data_offsets=[0])),
    "offsets negative": file(entry(data_offsets=[-8, 0])),
    "offsets backwards": file(entry(data_offsets=[8, 0])),
    "offsets fractions": file(entry(data_offsets=[0.0, 8.0])),
    "offsets beyond": file(entry(data_offsets=[8, 16])),
    "offsets of terabytes": file(entry(data_offsets=[0, 10**13])),
    "gap before": file({"w": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12),
    "gap between": file({"w": F32, "v": {**F32, "data_offsets": [12, 20]}}, b"\0" * 20),
    "overlap": file({"w": F32, "v": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12),
    "same place": file({"w": F32, "v": F32}),
    "data too short": file({"w": F32}, b"\0" * 7),
    "data too long": file({"w": F32}, b"\0" * 9),
    "same name twice": file(b'{"w":' + json.dumps(F32).encode() + b',"w":{}}'),
    "metadata a list": noted([]),
    "metadata a string": noted("a"),
    "metadata a number": noted({"a": 1}),
    "metadata nested": noted({"a": {}}),
    "metadata null within": noted({"a": None}),
    "ties no JSON": tied("{"),
    "ties deep": tied("[" * 100_000),
    "ties a list": tied("[]"),
    "ties null": tied("null"),
    "ties to a number": tied('{"v": 1}'),
    "ties to a list": tied('{"v": ["w"]}'),
    "ties to nothing": tied('{"v": "u"}'),
    "ties in a circle": tied('{"u": "v", "v": "u"}'),
    "ties to itself": tied('{"v": "v"}'),
    "ties over a tie": tied('{"u": "w", "v": "u"}'),
    "ties what is there": tied('{"w": "w"}'),
    "ties half a character": tied('{"\\ud800": "w"}'),
    "empty beyond memory": file(
        entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), b""
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(content, tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (SafetensorsSource, load_safetensors, read_metadata):
        with pytest.raises(UserError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"'{path}'")
        assert "\n" not in message
        assert len(message) < 200 + len(str(path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "it is a text file"),
        ("web page", "it is a web page"),
        ("pointer", "git lfs pull"),
        ("empty", "it is empty"),
    ],
)
def test_what_a_file_is_instead_is_told(name, said, tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=f"is damaged or no safetensors file: .*{said}"):
        SafetensorsSource(path)


def test_what_torch_wrote_under_another_name_is_told(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    for zipped in (True, False):
        torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"torch.save wrote it; give it the ending .pt"):
            SafetensorsSource(path)


def test_what_cannot_be_opened_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        SafetensorsSource(tmp_path)


def test_strange_and_sound_files_are_read(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    sound: dict[bytes, dict[str, torch.Tensor]] = {
        file({}, b""): {},
        file(b"{}      ", b""): {},
        noted(None): {"w": torch.zeros(2)},
        file(entry(shape=[0, 7], data_offsets=[0, 0]), b""): {"w": torch.zeros(0, 7)},
        file({"": F32, "ü\n": {**F32, "shape": [1, 2], "data_offsets": [8, 16]}}, b"\0" * 16): {
            "": torch.zeros(2), "ü\n": torch.zeros(1, 2)
        },
        file(entry(shape=[], data_offsets=[0, 4]), b"\0" * 4): {"w": torch.zeros(())},
    }  # fmt: skip
    for content, tensors in sound.items():
        path.write_bytes(content)
        loaded = load_safetensors(path)
        assert loaded.keys() == tensors.keys() == load_file(path).keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor)
            assert loaded[name].shape == tensor.shape


def test_equal_input_gives_equal_bytes(network, tmp_path) -> None:
    metadata = {
        "architecture": '{"a": 1}',
        "classes": "[1]",
        "für": "日本",
        "a": '\n\x01"\\/',
        "z": "",
    }
    written = set()
    for number in range(20):
        path = tmp_path / f"{number}.safetensors"
        order = list(metadata) if number % 2 else list(reversed(metadata))
        save_safetensors(path, network.state_dict(), {key: metadata[key] for key in order})
        written.add(path.read_bytes())
    assert len(written) == 1
    assert read_metadata(path) == metadata
    assert all(torch.equal(t, network.state_dict()[k]) for k, t in load_file(path).items())


# -- files that were changed anywhere ----------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F32", "BOOL", "w", "t", TIED, "__metadata__", '{"v": "w"}', "[]"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def sound() -> tuple[dict[str, Any], bytes]:
    header = {
        "__metadata__": {"note": "x", TIED: '{"v": "w"}'},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "h": {"dtype": "F16", "shape": [], "data_offsets": [24, 26]},
        "e": {"dtype": "I64", "shape": [0, 4], "data_offsets": [26, 26]},
        "b": {"dtype": "BOOL", "shape": [3], "data_offsets": [26, 29]},
    }
    return header, bytes(range(26)) + b"\1\0\1"


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


@st.composite
def changed_headers(draw: st.DrawFn) -> bytes:
    """A file whose JSON was changed in one to three places: replaced, removed or renamed."""
    header, data = sound()
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(header)[1:] or [("w",)]))
        node: Any = header
        for key in way:
            node = node[key]
        change = draw(st.sampled_from(["replace", "remove", "add", "copy"]))
        if change == "remove":
            del node[last]
        elif change == "add" and isinstance(node, dict):
            node[draw(st.text(max_size=3) | st.sampled_from(["v", "w", TIED]))] = draw(JSON)
        elif change == "copy":
            *_, source = places(header)[draw(st.integers(0, 5)) :]
            other: Any = header
            for key in source:
                other = other[key]
            node[last] = copy.deepcopy(other)
        else:
            node[last] = draw(JSON)
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return file(text, data)


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """A file with bytes set, cut out or put in anywhere, most of them in the header."""
    header, data = sound()
    content = bytearray(file(header, data))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        piece = draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"}", b"[", b",", b"9"]))
        content[at : at + draw(st.integers(0, 3))] = piece
    if draw(st.booleans()):  # a length that is right lets the change reach the parser
        content[:8] = struct.pack("<Q", max(len(content) - 8 - len(data), 0))
    return bytes(content)


def law(content: bytes, path: Path) -> None:
    """What is read is what the library's own reader finds; anything else is a ``UserError``."""
    path.write_bytes(content)
    refused = ""
    try:
        source = SafetensorsSource(path)
        loaded = load_safetensors(path)
    except UserError as error:
        refused = str(error)
    event("refused" if refused else "read")
    if refused:
        assert refused.startswith(f"'{path}'")
        assert refused.isprintable()
        return
    expected = load_file(path)
    assert set(loaded) - set(source.tied) == set(expected)
    for name, tensor in loaded.items():
        twin = expected[source.tied.get(name, name)]
        assert (tensor.shape, tensor.dtype) == (twin.shape, twin.dtype)
        assert math.prod(tensor.shape) == source.info(name).numel
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), twin.reshape(-1).view(torch.uint8))


def test_the_file_that_is_changed_is_sound(tmp_path) -> None:
    header, data = sound()
    (tmp_path / "x.safetensors").write_bytes(file(header, data))
    loaded = load_safetensors(tmp_path / "x.safetensors")
    assert list(loaded) == ["w", "h", "e", "b", "v"]


FEW = settings(
    max_examples=300, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
MANY = settings(FEW, max_examples=20_000, derandomize=False)


@FEW
@given(content=changed_headers())
def test_a_changed_header_is_read_right_or_refused(content, tmp_path) -> None:
    law(content, tmp_path / "x.safetensors")


@FEW
@given(content=changed_bytes())
def test_changed_bytes_are_read_right_or_refused(content, tmp_path) -> None:
    law(content, tmp_path / "x.safetensors")


@pytest.mark.slow
@MANY
@given(content=changed_headers() | changed_bytes())
def test_many_changed_files_are_read_right_or_refused(content, tmp_path) -> None:
    law(content, tmp_path / "x.safetensors")
