"""Files as training loops leave them: unwrapped where they fit exactly, else told in one line."""

from __future__ import annotations

import argparse
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion
from fusion.errors import UserError
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.modelpool.fitting import find_fit
from fusion.modelpool.member import on_meta
from fusion.weights import load_pickled, save_safetensors

RESNET = {"_target_": "torchvision.models.resnet18", "num_classes": 3}

CIFAR = {"_target_": "fusion.models.CifarResNet", "depth": 8, "width": 0.5, "in_channels": 1}

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """A ResNet-18 of torchvision whose statistics are not those of a fresh one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=3)
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return network


@pytest.fixture(scope="module")
def state(resnet: nn.Module) -> State:
    return dict(resnet.state_dict())


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: Mapping[str, Tensor]) -> State:
    """Weights of the same shapes that are not the same weights."""
    return {key: value + 1 for key, value in state.items()}


def inside_wrapped(state: Mapping[str, Tensor]) -> State:
    """The names of a network one block of which was compiled and wrapped by itself."""
    return {key.replace("layer1.", "layer1.module._orig_mod."): v for key, v in state.items()}


WRAPPED: dict[str, Callable[[State], object]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "best_acc1": torch.tensor(7.0)},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "model_state": lambda s: {"model_state": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.1},
    "ema": lambda s: {"ema": s},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "net": lambda s: {"net": s},
    "weights": lambda s: {"weights": s},
    "params": lambda s: {"params": s},
    "two entries deep": lambda s: {"checkpoint": {"model": s, "args": [1]}},
    "arguments of a script": lambda s: {"model": s, "args": argparse.Namespace(out=Path("x"))},
    "beside an epoch": lambda s: {"epoch": 3, **s},
    "data parallel": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "all at once": lambda s: {"state_dict": under("model.module._orig_mod.", s)},
    "a part compiled": inside_wrapped,
    "the whole and a part": lambda s: under("module.", inside_wrapped(s)),
    "lightning": lambda s: {
        "state_dict": {**under("model.", s), "criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.6.1",
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "loops": {},
    },
    "lightning's backbone": lambda s: {"state_dict": under("backbone.", s)},
    "one under two names": lambda s: {"model": s, "state_dict": s},
    "before counters": lambda s: {
        k: v for k, v in s.items() if not k.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_wherever_they_fit(make, resnet, state, tmp_path, equal) -> None:
    path = tmp_path / "m.pth.tar"
    torch.save(make(state), path)
    member = Checkpoint(path, RESNET)
    BaseModelPool({"_pretrained_": member}).preflight()
    assert equal(member.build(), resnet)
    stored = member.stored()
    for key in stored:
        assert torch.equal(stored[key], state[key])


@pytest.mark.parametrize("name", ["data parallel", "all at once", "plain", "a part compiled"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_every_kind_of_file_is_unwrapped(name, suffix, base, tmp_path, equal) -> None:
    path = tmp_path / f"m{suffix}"
    made = WRAPPED[name](dict(base.state_dict()))
    if suffix == ".safetensors":
        save_safetensors(path, made.get("state_dict", made))
    else:  # the format before torch 1.6 and the one since then
        torch.save(made, path, _use_new_zipfile_serialization=suffix in (".pt", ".ckpt"))
    assert equal(Checkpoint(path, CIFAR).build(), base)


def test_what_was_taken_off_is_logged_once(state, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    torch.save(WRAPPED["lightning"](state), tmp_path / "m.ckpt")
    member = Checkpoint(tmp_path / "m.ckpt", RESNET)
    BaseModelPool({"_pretrained_": member}).preflight()
    member.build()
    (line,) = caplog.messages
    assert line.endswith(
        "took 122 tensors of its entry 'state_dict', whose names begin with 'model.'; "
        "1 outside were left aside"
    )
    caplog.clear()
    torch.save(state, tmp_path / "m.ckpt")
    Checkpoint(tmp_path / "m.ckpt", RESNET).build()
    assert caplog.messages == []


AMBIGUOUS = {
    "two entries": (
        lambda s: {"state_dict": s, "state_dict_ema": other(s)},
        {"state_dict": 0, "state_dict_ema": 1},
    ),
    "two prefixes": (
        lambda s: {"state_dict": {**under("model.", s), **under("ema.module.", other(s))}},
        {"state_dict.model": 0, "state_dict.ema.module": 1, "state_dict.ema": 1},
    ),
    "two of safetensors": (
        lambda s: {**under("student.", s), **under("teacher.", other(s))},
        {"student": 0, "teacher": 1},
    ),
    "torchvision's script": (
        lambda s: {
            "model": s,
            "model_ema": {"n_averaged": torch.tensor(3), **under("module.", other(s))},
        },
        {"model": 0, "model_ema": 1, "model_ema.module": 1},
    ),
    "the file itself": (lambda s: {**s, "ema": other(s)}, {"": 0, "ema": 1}),
    "a part of the other": (
        lambda s: {"a": {**s}, "a.b": other(s)},
        {"a": 0, "a.b": 1},
    ),
}


@pytest.mark.parametrize(("make", "keys"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_fits_twice_is_chosen_by_key(make, keys, state, tmp_path) -> None:
    suffix = ".safetensors" if "student" in keys else ".pt"
    path = tmp_path / f"m{suffix}"
    made = make(state)
    (save_safetensors if suffix == ".safetensors" else lambda p, m: torch.save(m, p))(path, made)
    with pytest.raises(UserError) as caught:
        Checkpoint(path, RESNET).build()
    message = str(caught.value)
    assert "holds 2 state dicts that fit; choose one with key=" in message
    for key, shift in keys.items():
        weight = Checkpoint(path, RESNET, key=key).build().fc.weight
        assert torch.equal(weight, state["fc.weight"] + shift), key
    for choice in message.partition("choose one with ")[2].split(", "):
        Checkpoint(path, RESNET, key=choice.removeprefix("key=").strip("'")).build()
    with pytest.raises(UserError, match="has no entry with tensors named 'nothing'"):
        Checkpoint(path, RESNET, key="nothing").build()


def test_a_prefix_is_taken_off_only_where_all_fits(state, tmp_path) -> None:
    def said(made: object) -> str:
        torch.save(made, tmp_path / "m.pt")
        with pytest.raises(UserError) as caught:
            Checkpoint(tmp_path / "m.pt", RESNET).build()
        text = str(caught.value)
        assert len(text) < 300 + len(str(tmp_path / "m.pt")) + len("checkpoint '' ")
        assert text.isprintable()
        return text

    inner = under("model.", state)
    assert "1 tensor is unknown to the architecture: extra" in said(
        {**inner, "model.extra": torch.ones(1)}
    )
    assert "all 121 keys begin with 'model.'; 1 tensor is missing: fc.bias" in said(
        {key: value for key, value in inner.items() if key != "model.fc.bias"}
    )
    head = {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    assert (
        "2 tensors are of another shape, the first: fc.weight is (1000, 512), the architecture "
        "has (3, 512)"
    ) in said({**state, **head})
    assert "all 122 keys begin with 'model.'" in said(under("model.", {**state, **head}))
    assert "its entry 'state_dict' does not fit" in said({"state_dict": {**state, **head}})
    renamed = {f"x{number}": value for number, value in enumerate(state.values())}
    assert "122 of 122 keys differ; the first: the file has 'x0', the architecture 'conv1" in said(
        renamed
    )
    assert "122 of 122 keys differ; the first: the file has 'x0" in said(under("net.", renamed))
    assert "has no state dict in it (it holds epoch, args)" in said({"epoch": 3, "args": {}})
    assert "has no state dict in it (it holds a list)" in said([state])
    assert "has no state dict in it (it holds nothing)" in said({})
    long = {"very_" * 1000 + key: value for key, value in state.items()}
    said({f"{'ü' * 500}\n{number}": v for number, v in enumerate(state.values())})
    said({**long, "z": torch.ones([1] * 60)})
    said({**state, "fc.weight": torch.ones([1] * 60), "b" * 400: torch.ones(1)})


def test_extra_tensors_outside_a_prefix_do_not_excuse_those_inside(state) -> None:
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    with_loss = {**{f"model.{key}": shape for key, shape in shapes.items()}, "loss.weight": (3,)}
    fit = find_fit({"": with_loss}, shapes)
    assert (fit.prefix, fit.aside, fit.key) == ("model.", 1, "model")
    with pytest.raises(UserError, match=r"unknown to the architecture: loss.weight"):
        find_fit({"": {**shapes, "loss.weight": (3,)}}, shapes)


# -- files that are something else -------------------------------------------------------------


def whole_module(path: Path, state: State) -> None:
    torch.save(torchvision.models.resnet18(num_classes=3), path)


def old_whole_module(path: Path, state: State) -> None:
    network = torchvision.models.squeezenet1_1()
    torch.save({"model": network}, path, _use_new_zipfile_serialization=False)


def torchscript(path: Path, state: State) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # torch.jit.save is deprecated; its layout is this
        for name in ("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl", "m/version"):
            archive.writestr(name, b"\x80\x02}.")


def cut_short(path: Path, state: State) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])


def old_cut_short(path: Path, state: State) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5000])


def sparse(path: Path, state: State) -> None:
    torch.save({**state, "fc.weight": state["fc.weight"].to_sparse()}, path)


def without_values(path: Path, state: State) -> None:
    torch.save({**state, "fc.weight": state["fc.weight"].to("meta")}, path)


def content(data: bytes) -> Callable[[Path, State], None]:
    return lambda path, state: path.write_bytes(data) and None


OTHERS: dict[str, tuple[Callable[[Path, State], object], str]] = {
    "empty": (content(b""), "it is empty"),
    "web page": (content(b"\n<!DOCTYPE html><html>"), "it is a web page"),
    "pointer": (content(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "text": (content(b"epoch 1: 93.2 %\n"), "it is a text file"),
    "noise": (content(bytes(range(7, 256)) * 9), "its content is not that of torch.save"),
    "npy": (lambda p, s: np.save(p.open("wb"), np.ones(3)), r"NumPy array \(.npy\)"),
    "npz": (lambda p, s: np.savez(p.open("wb"), w=np.ones(3)), r"NumPy archive \(.npz\)"),
    "onnx": (content(b"\x08\x07\x12\x07pytorch\x1a\x051.9.0:\xd6\x0a"), "it is an ONNX model"),
    "hdf5": (content(b"\x89HDF\r\n\x1a\n" + b"\0" * 90), "it is an HDF5 file"),
    "gzip": (content(b"\x1f\x8b\x08" + b"\0" * 90), "it is compressed"),
    "tar": (content(b"a" * 257 + b"ustar" + b"\0" * 250), "it is a tar archive"),
    "zip": (lambda p, s: zipfile.ZipFile(p, "w").writestr("a.txt", "b"), "a zip archive of a.txt"),
    "safetensors": (lambda p, s: save_safetensors(p, s), "give it the ending .safetensors"),
    "torchscript": (torchscript, "it is a TorchScript archive; read it with torch.jit.load"),
    "whole module": (whole_module, r"whole pickled network \(torchvision.models.resnet.ResNet\)"),
    "old whole module": (old_whole_module, "holds a whole pickled network"),
    "numpy inside": (lambda p, s: torch.save({**s, "a": np.float64(1)}, p), "numpy.* besides ten"),
    "plain pickle": (lambda p, s: p.write_bytes(pickle.dumps({"a": 1}, 4)), "another protocol"),
    "cut short": (cut_short, "it is cut short"),
    "old and cut short": (old_cut_short, r"is cut short or damaged \("),
    "sparse": (sparse, "fc.weight is sparse or quantized"),
    "without values": (without_values, "fc.weight is on the meta device"),
}


@pytest.mark.parametrize(("write", "said"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_state_dict_is_told_apart_in_a_sentence(write, said, state, tmp_path) -> None:
    path = tmp_path / "m.pt"
    write(path, state)
    with pytest.raises(UserError, match=said) as caught:
        BaseModelPool({"_pretrained_": Checkpoint(path, RESNET)}).preflight()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_real_torchscript_archive_is_told(tmp_path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "m.pt")
    with pytest.raises(UserError, match="it is a TorchScript archive"):
        Checkpoint(tmp_path / "m.pt", RESNET).build()


FEW = settings(
    max_examples=80, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@FEW
@given(data=st.data())
def test_a_changed_file_is_read_or_told(data, zipped, tmp_path) -> None:
    path = tmp_path / "m.pt"
    layer = nn.BatchNorm2d(2)
    torch.save({"model": layer.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    written = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(written) - 1))
        written[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(bytes(written))
    told = ""
    try:
        Checkpoint(path, lambda: nn.BatchNorm2d(2)).build()
    except UserError as error:
        told = str(error)
    assert told.isprintable()
    assert len(told) < 400 + len(str(path))


# -- what is read, and what is not ------------------------------------------------------------


def test_pickled_weights_are_checked_for_nan_before_any_work(state, tmp_path) -> None:
    broken = {**state, "fc.bias": torch.tensor([1.0, float("nan"), 2.0])}
    for zipped in (True, False):
        torch.save({"model": broken}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"fc.bias has 1 of 3 entries that are NaN or infinite"):
            BaseModelPool({"_pretrained_": Checkpoint(tmp_path / "m.pt", RESNET)}).preflight()


def test_tensors_of_a_zip_archive_are_mapped_and_never_written(
    base, tmp_path, monkeypatch, equal
) -> None:
    path, packed, old = (tmp_path / f"{name}.pt" for name in ("m", "packed", "old"))
    torch.save(base.state_dict(), path)
    torch.save(base.state_dict(), old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in plain.infolist():
            new.writestr(info.filename, plain.read(info))
    mapped = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: mapped.append(k["mmap"]) or load(*a, **k))
    for file in (path, packed, old):
        before = file.read_bytes()
        Checkpoint(file, CIFAR).stored()["linear.weight"].zero_()
        network = Checkpoint(file, CIFAR).build()
        assert equal(network, base)
        network.linear.weight.data.zero_()
        assert file.read_bytes() == before
    # Compressed tensors, and those of the format before torch 1.6, cannot be mapped.
    assert mapped == [True, True, False, False, False, False]


def test_half_precision_fills_single(state, tmp_path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(half, tmp_path / "m.pt")
    network = Checkpoint(tmp_path / "m.pt", RESNET).build()
    assert network.fc.weight.dtype == torch.float32
    assert torch.equal(network.fc.weight, half["fc.weight"].float())


def test_quantized_numbers_do_not_pass_for_weights(base, tmp_path, equal) -> None:
    state = dict(base.state_dict())
    bytes_of = {**state, "linear.weight": (state["linear.weight"] * 100).to(torch.int8)}
    torch.save(bytes_of, tmp_path / "m.pt")
    save_safetensors(tmp_path / "m.safetensors", bytes_of)
    for name in ("m.pt", "m.safetensors"):
        with pytest.raises(UserError, match=r"linear.weight is torch.int8, the architecture has"):
            BaseModelPool({"_pretrained_": Checkpoint(tmp_path / name, CIFAR)}).preflight()
    # Averages of several networks have counters that are floating-point numbers.
    averaged = {key: value.float() for key, value in state.items()}
    torch.save(averaged, tmp_path / "m.pt")
    assert equal(Checkpoint(tmp_path / "m.pt", CIFAR).build(), base)


def test_the_state_of_the_file_is_plain(state, tmp_path) -> None:
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "m.pt")
    loaded = load_pickled(tmp_path / "m.pt")
    assert loaded["args"].lr == 0.1
    with pytest.raises(pickle.UnpicklingError):  # the allowance ends with the call
        torch.load(tmp_path / "m.pt", weights_only=True)


@pytest.fixture
def no_downloads(monkeypatch) -> None:
    def fetch(*args: object, **options: object) -> None:
        raise AssertionError(f"a download was tried: {args}")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    hub = pytest.importorskip("timm.models._builder")
    for name in ("load_state_dict_from_url", "load_state_dict_from_hf", "load_custom_from_hf"):
        monkeypatch.setattr(hub, name, fetch)


@pytest.mark.parametrize(
    "spec",
    [
        {**RESNET, "num_classes": 1000, "weights": "DEFAULT"},
        {"_target_": RESNET["_target_"], "pretrained": True},
        {"_target_": "timm.create_model", "model_name": "resnet10t", "pretrained": True},
        {"_target_": "timm.create_model", "_args_": ["resnet10t", True]},
    ],
    ids=str,
)
def test_published_weights_are_never_fetched_for_a_checkpoint(
    spec, no_downloads, tmp_path, equal
) -> None:
    import timm

    is_timm = spec["_target_"].startswith("timm")
    network = timm.create_model("resnet10t") if is_timm else torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "m.pt")
    member = Checkpoint(tmp_path / "m.pt", spec)
    assert member.architecture().fc.weight.is_meta
    assert equal(member.build(), network)
    BaseModelPool({"_pretrained_": member}).save_model(network, tmp_path / "m.safetensors")
    assert equal(fusion.load(tmp_path / "m.safetensors"), network)


def test_what_published_weights_imply_is_kept(no_downloads, tmp_path) -> None:
    spec = {"_target_": "torchvision.models.googlenet", "weights": "DEFAULT"}
    bare = {**spec, "weights": None, "transform_input": True, "aux_logits": False}
    with torch.device("meta"):
        state = on_meta({**bare, "init_weights": False}).state_dict()
    torch.save({key: torch.zeros(t.shape, dtype=t.dtype) for key, t in state.items()},
               tmp_path / "m.pt")  # fmt: skip
    assert Checkpoint(tmp_path / "m.pt", {**spec, "init_weights": False}).build().transform_input
    segmenting = {"_target_": "torchvision.models.segmentation.fcn_resnet50", "weights": "DEFAULT"}
    with pytest.raises(UserError, match="would change the structure of the network"):
        Checkpoint(tmp_path / "m.pt", segmenting).build()


def test_the_backbone_of_a_network_is_not_fetched(no_downloads, tmp_path) -> None:
    spec = {"_target_": "torchvision.models.segmentation.lraspp_mobilenet_v3_large"}
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    assert all(t.is_meta for t in Checkpoint(tmp_path / "m.pt", spec).architecture().parameters())


def test_load_builds_what_this_package_wrote(base, tmp_path, equal) -> None:
    pool = BaseModelPool({"_pretrained_": CIFAR})
    pool.save_model(base, tmp_path / "m.safetensors")
    assert equal(fusion.load(tmp_path / "m.safetensors"), base)
    torch.save({"state_dict": base.state_dict()}, tmp_path / "m.ckpt")
    assert equal(fusion.load(tmp_path / "m.ckpt", CIFAR), base)
    with pytest.raises(UserError, match="does not say which architecture"):
        fusion.load(tmp_path / "m.ckpt")
