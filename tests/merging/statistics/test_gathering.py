"""Statistics of whole pools: each expert on its own images, in its aligned order, gathered once."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fusion.alignment import apply_permutation, permutation_spec, random_permutation
from fusion.data import ClassSubset, ImageTensors, batches, seed_from
from fusion.errors import UserError
from fusion.merging.batch_norm import Calibration
from fusion.merging.members import Members, every_layer
from fusion.merging.rules import Fisher, Mean, RegMean
from fusion.merging.statistics import Statistics, check_statistics, collect, gather
from fusion.merging.tensors import merge_parameters
from fusion.modelpool import BaseModelPool
from fusion.weights import ModuleSource

CLASSES = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9)}
SAMPLE = Calibration(images=20, batch_size=12)


@pytest.fixture(scope="module")
def data(train_digits: ImageTensors) -> dict[str, ImageTensors]:
    few = train_digits.select(torch.arange(300))
    return {name: ClassSubset(few, classes) for name, classes in CLASSES.items()}


@pytest.fixture
def modelpool(pool, data) -> BaseModelPool:
    return BaseModelPool(pool, train_datasets=data)


@pytest.fixture
def members(modelpool) -> Members:
    return Members.read(modelpool)


def everything(statistics: Statistics) -> dict[str, Tensor]:
    return {f"{name}/{key}": of[name] for key, of in statistics.items() for name in of}


def assert_same(one: Statistics, other: Statistics) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_each_expert_is_measured_on_its_own_images(modelpool, members, data) -> None:
    found = gather(modelpool, members, {"gram", "fisher"}, calibration=SAMPLE)
    for number, name in enumerate(members.names):
        images = batches(
            data[name],
            batch_size=SAMPLE.batch_size,
            shuffle=True,
            seed=seed_from(SAMPLE.seed, "statistics"),
            limit=SAMPLE.images,
        )
        network = modelpool.load_model(name)
        alone = collect(network, images, {"gram", "fisher"}, layers=members.layers)
        for key, of_tensor in found.items():
            for statistic, stacked in of_tensor.items():
                assert stacked.dtype == torch.float64
                assert torch.equal(stacked[number], alone[key][statistic])
    head = set(members.head.tensors)
    # The experts' heads differ in size: their inputs can be stacked, their gradients cannot.
    assert all(
        "fisher" in found[key]
        for key in members.network.state_dict()
        if "weight" in key and key not in head
    )
    assert set(found["linear.weight"]) == {"gram"}
    assert "linear.bias" not in found
    assert found["conv1.weight"]["gram"].shape == (2, 1, 10, 10)
    with pytest.raises(KeyError):
        found["bn1.weight"]["gram"]


def test_equal_experts_with_equal_images_have_equal_statistics(base, data) -> None:
    """So what rules make of n copies of an expert is that expert."""
    pool = BaseModelPool({"x": base, "y": base}, train_datasets={"x": data["b"], "y": data["b"]})
    members = Members.read(pool)
    found = gather(pool, members, {"gram", "fisher"}, calibration=SAMPLE)
    for tensor in everything(found).values():
        assert torch.equal(tensor[0], tensor[1])
    state = base.state_dict()
    for rule in (RegMean(), Fisher()):
        merged = merge_parameters(
            members, every_layer(members), rule, with_head=True, statistics=found
        )
        assert all(torch.equal(merged[key], state[key]) for key in merged)


@torch.no_grad()
def test_regmean_answers_more_nearly_as_the_experts_do(pool, data) -> None:
    """The first layer's outputs on each expert's images: less squared error than the mean's."""
    images = {name: of.images.float() / 16 for name, of in data.items()}
    images["a"] = (images["a"] + images["a"].roll(1, 3)) / 2  # smooth along rows
    images["b"] = (images["b"] - images["b"].roll(1, 2)).abs()  # edges between rows
    changed = {
        name: ImageTensors(
            of, data[name].labels, class_names=data[name].class_names, mean=[0], std=[1]
        )
        for name, of in images.items()
    }
    modelpool = BaseModelPool(pool, train_datasets=changed)
    members = Members.read(modelpool)
    found = gather(modelpool, members, {"gram"}, calibration=Calibration(300, 100))
    key, errors = "conv1.weight", {}
    for rule in (RegMean(off_diagonal=1.0), Mean()):
        merged = merge_parameters(
            members, every_layer(members), rule, with_head=False, statistics=found
        )
        errors[type(rule)] = sum(
            float(
                nn.functional.conv2d(of, merged[key] - members.experts[name][key], padding=1)
                .square()
                .mean()
            )
            for name, of in images.items()
        )
    assert errors[RegMean] < 0.9 * errors[Mean]


def test_statistics_follow_the_order_of_aligned_units(peers, data) -> None:
    """A permuted expert has permuted matrices, with which its weights give the same outputs."""
    pool = BaseModelPool(peers, train_datasets=dict.fromkeys(peers, data["b"]))
    members = Members.read(pool)
    first = members.names[0]
    spec = permutation_spec(peers[first], torch.zeros(1, 1, 8, 8))
    moved = apply_permutation(peers[first], spec, random_permutation(spec, seed=0))
    aligned = dataclasses.replace(members, experts={**members.experts, first: ModuleSource(moved)})
    squares: list[list[Tensor]] = []
    grams = []
    for each in (members, aligned):
        found = gather(pool, each, {"gram"}, calibration=SAMPLE)
        squares.append([])
        for piece in each.pieces(every_layer(each), with_head=True, statistics=found):
            if "gram" in piece.statistics:
                weight, gram = piece.matrices(piece.experts).double(), piece.statistics["gram"]
                outputs = (weight @ gram[..., :-1, :-1] * weight).sum(-1)
                squares[-1].append(outputs.flatten(1).sort(dim=1).values)
        grams.append(found)
    assert_close(squares[1], squares[0], rtol=1e-4, atol=1e-6)
    moved_keys = [
        key for key in grams[0] if not torch.allclose(grams[0][key]["gram"], grams[1][key]["gram"])
    ]
    assert len(moved_keys) == len(grams[0]) - 1  # all but the first layer, which reads the images
    for key in grams[0]:
        assert torch.equal(grams[0][key]["gram"][1:], grams[1][key]["gram"][1:])


def test_what_is_kept_is_found_again(
    modelpool, members, tmp_path: Path, monkeypatch, caplog
) -> None:
    names = {"gram", "fisher"}
    plain = gather(modelpool, members, names, calibration=SAMPLE)
    kept = gather(modelpool, members, names, calibration=SAMPLE, cache_dir=tmp_path)
    assert_same(kept, plain)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the network ran")

    runs = list(tmp_path.glob("*.statistics"))
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(type(members.network), "forward", forbidden)
        again = gather(modelpool, members, names, calibration=SAMPLE, cache_dir=tmp_path)
        assert_same(again, plain)
    assert caplog.text.count("found in the cache") == 2
    assert sorted(tmp_path.glob("*.statistics")) == sorted(runs)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", ["weights", "images", "names", "seed", "batch_size"])
def test_what_decides_the_statistics_decides_where_they_are_kept(
    change, modelpool, members, data, tmp_path
) -> None:
    small = Calibration(8, 4)
    names = {"gram"}
    gather(modelpool, members, names, calibration=small, cache_dir=tmp_path)
    options = {"calibration": small, "cache_dir": tmp_path}
    match change:
        case "weights":
            network = modelpool.load_model("a")
            nn.init.constant_(network.bn1.bias, 0.5)
            experts = {**members.experts, "a": ModuleSource(network)}
            members = dataclasses.replace(members, experts=experts)
        case "images":
            brighter = copy.copy(data["a"])
            brighter.images = data["a"].images.clone().add_(1).clamp_(max=16)
            models = {"_pretrained_": members.network} | {
                name: modelpool.load_model(name) for name in members.names
            }
            modelpool = BaseModelPool(models, train_datasets={**data, "a": brighter})
        case "names":
            names = {"gram", "fisher"}
        case "seed" | "batch_size":
            options["calibration"] = dataclasses.replace(small, **{change: 3})
    gather(modelpool, members, names, **options)
    folders = sorted(path.name for path in tmp_path.glob("*.statistics"))
    assert len(folders) == (3 if change in ("weights", "images") else 4), folders


@pytest.mark.parametrize("damage", ["byte", "missing", "index"])
def test_damaged_statistics_are_gathered_again(
    damage, modelpool, members, tmp_path, caplog
) -> None:
    small = Calibration(8, 4)
    plain = gather(modelpool, members, {"gram"}, calibration=small, cache_dir=tmp_path)
    before = everything(plain)
    folder = sorted(tmp_path.glob("a-*.statistics"))[0]
    match damage:
        case "byte":
            file = folder / "3.safetensors"
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)
        case "missing":
            (folder / "3.safetensors").unlink()
        case "index":
            index = (folder / "index.json").read_text()
            (folder / "index.json").write_text(
                index.replace('"symmetric": true', '"symmetric": false', 1)
            )
    again = gather(modelpool, members, {"gram"}, calibration=small, cache_dir=tmp_path)
    assert caplog.text.count("is damaged") == 1
    after = everything(again)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_pass_that_breaks_off_leaves_nothing(modelpool, members, tmp_path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusion.merging.statistics.store.save_safetensors", broken)
    with pytest.raises(KeyboardInterrupt):
        gather(modelpool, members, {"gram"}, calibration=Calibration(8, 4), cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_stored_statistics_are_read_one_at_a_time(
    modelpool, members, tmp_path, monkeypatch
) -> None:
    found = gather(modelpool, members, {"gram"}, calibration=Calibration(8, 4), cache_dir=tmp_path)
    read: list[str] = []
    original = Statistics._stacked

    def watched(self: Statistics, full: str) -> Tensor:
        read.append(full)
        return original(self, full)

    monkeypatch.setattr(Statistics, "_stacked", watched)
    pieces = members.pieces(every_layer(members), with_head=False, statistics=found)
    for piece in pieces:
        assert read == []  # a piece is made without reading its statistics
        if "gram" in piece.statistics:
            assert read == []
            assert piece.statistics["gram"].shape[0] == 2
            assert read.pop() == f"gram/{piece.key}"


def test_true_labels_are_numbers_of_outputs(pool, data) -> None:
    """Expert b's outputs stand for its classes in another order than its data lists them."""
    classes = {"a": list(CLASSES["a"]), "b": list(reversed(CLASSES["b"]))}
    straight = BaseModelPool(pool, train_datasets=data)
    turned = BaseModelPool(pool, train_datasets=data, classes=classes)
    small = Calibration(20, 10)
    fishers = []
    for modelpool in (straight, turned):
        found = gather(modelpool, Members.read(modelpool), {"empirical_fisher"}, calibration=small)
        fishers.append(found["conv1.weight"]["empirical_fisher"])
    assert torch.equal(fishers[0][0], fishers[1][0])
    assert not torch.allclose(fishers[0][1], fishers[1][1], rtol=0.1)
    stranger = BaseModelPool(
        pool, train_datasets={**data, "b": data["a"]}, classes={"b": list(CLASSES["b"])}
    )
    with pytest.raises(UserError, match="training data of 'b'"):
        check_statistics(stranger, {"empirical_fisher"})


def test_what_is_missing_is_said_before_any_work(pool, data) -> None:
    lacking = BaseModelPool(pool, train_datasets={"a": data["a"]})
    with pytest.raises(UserError, match=r"has none of b; add them to train_datasets"):
        gather(lacking, Members.read(lacking), {"gram"})
    with pytest.raises(UserError, match=r"no 'grams'.*gram"):
        check_statistics(lacking, {"grams"})
