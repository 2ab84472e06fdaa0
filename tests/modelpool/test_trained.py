from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool import BaseModelPool, TrainedModel
from fusion.modelpool.fingerprint import digest_tensors
from fusion.modelpool.fixed_head import placed, simplex_vertices
from fusion.weights import load_safetensors, read_metadata, save_safetensors

NET = {"_target_": "fusion.models.CifarResNet", "depth": 8, "in_channels": 1, "width": 0.5}
DIGITS = {"_target_": "fusion.data.digits", "split": "val"}


def recipe(classes: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "_target_": "fusion.modelpool.TrainedModel",
        "architecture": {**NET, "num_classes": len(classes) if classes else 10},
        "dataset": DIGITS,
        "classes": classes,
        "epochs": 1,
        "batch_size": 64,
        "accelerator": "cpu",
        **more,
    }


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """The labels of the trainings that ran."""
    from fusion.modelpool import trained

    ran: list[str] = []
    real = trained.fit

    def counted(*args: Any, **options: Any) -> Any:
        ran.append(options["label"])
        return real(*args, **options)

    monkeypatch.setattr(trained, "fit", counted)
    return ran


def make_pool(cache: Path, **models: Any) -> BaseModelPool:
    return BaseModelPool({name: {**spec, "cache_dir": cache} for name, spec in models.items()})


def path_of(pool: BaseModelPool, name: str) -> Path:
    entry = pool.entry(name)
    assert isinstance(entry.member, TrainedModel)
    return entry.member.path(entry)


def test_trained_once_and_kept_bit_for_bit(tmp_path, trainings, equal) -> None:
    pool = make_pool(tmp_path, x=recipe())
    assert trainings == []
    assert not list(tmp_path.iterdir())
    first = pool.load_model("x")
    second = pool.load_model("x")
    third = make_pool(tmp_path, x=recipe()).load_model("x")
    assert trainings == ["x"]
    assert equal(first, second)
    assert equal(first, third)
    assert first is not second
    afresh = make_pool(tmp_path / "elsewhere", x=recipe()).load_model("x")
    assert trainings == ["x", "x"]
    assert equal(first, afresh)


def test_the_file_says_how_it_came_about(tmp_path) -> None:
    pool = make_pool(tmp_path, x=recipe([7, 2]))
    pool.load_model("x")
    metadata = read_metadata(path_of(pool, "x"))
    assert LabelSpace.from_json(metadata["labels"]) == LabelSpace((7, 2), ("7", "2"))
    assert json.loads(metadata["architecture"]) == {**NET, "num_classes": 2}
    assert json.loads(metadata["recipe"])["epochs"] == 1
    assert len(json.loads(metadata["history"])) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 2},
        {"lr": 0.5},
        {"weight_decay": 0.1},
        {"batch_size": 32},
        {"schedule": "constant"},
        {"augment": True},
        {"channels_last": False},
        {"precision": "bf16-mixed"},
        {"seed": 1},
        {"fast_dev_run": True},
        {"classes": [0, 1]},
        {"dataset": {**DIGITS, "split": "train"}},
        {"architecture": {**NET, "num_classes": 10, "shortcut": "B"}},
    ],
)
def test_any_change_of_the_recipe_gives_another_file(tmp_path, change) -> None:
    one = path_of(make_pool(tmp_path, x=recipe()), "x")
    other = path_of(make_pool(tmp_path, x={**recipe(), **change}), "x")
    assert one != other


def test_a_change_of_the_parents_recipe_gives_another_file(tmp_path) -> None:
    child = recipe([0, 1], init_from="x")
    paths = {
        path_of(make_pool(tmp_path, x=recipe(seed=seed), child=child), "child") for seed in (0, 1)
    }
    assert len(paths) == 2


def test_the_order_of_the_options_does_not_matter(tmp_path) -> None:
    backwards = dict(reversed(recipe().items()))
    backwards["architecture"] = dict(reversed(backwards["architecture"].items()))
    assert path_of(make_pool(tmp_path, x=recipe()), "x") == path_of(
        make_pool(tmp_path, x=backwards), "x"
    )


def test_training_starts_from_the_parents_rows_for_the_kept_classes(tmp_path, base) -> None:
    still = {"lr": 1e-12, "weight_decay": 0.0}
    pool = BaseModelPool(
        {
            "_pretrained_": base,
            "child": {
                **recipe([7, 2, 5], init_from="_pretrained_", **still),
                "cache_dir": tmp_path,
            },
        },
        classes={"_pretrained_": range(10)},
    )
    child, parent = pool.load_model("child").state_dict(), base.state_dict()
    for key in ("linear.weight", "linear.bias"):
        torch.testing.assert_close(child[key], parent[key][[7, 2, 5]], rtol=0, atol=1e-6)
    torch.testing.assert_close(child["conv1.weight"], parent["conv1.weight"], rtol=0, atol=1e-6)


def test_a_grandchild_takes_rows_by_the_original_labels(tmp_path, base) -> None:
    still = {"lr": 1e-12, "weight_decay": 0.0, "cache_dir": tmp_path}
    pool = BaseModelPool(
        {
            "_pretrained_": base,
            "child": recipe([7, 2, 5], init_from="_pretrained_", **still),
            "grandchild": recipe([5, 7], init_from="child", **still),
        },
        classes={"_pretrained_": range(10)},
    )
    torch.testing.assert_close(
        pool.load_model("grandchild").linear.bias, base.linear.bias[[5, 7]], rtol=0, atol=1e-6
    )


PARITY = {
    "_target_": "fusion.data.grouped",
    "dataset": DIGITS,
    "groups": {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]},
}


def test_classes_that_the_parent_does_not_know_get_a_fresh_head(tmp_path, base) -> None:
    """How nearly every expert is made: the body of the parent, a head for a task of its own."""
    still = {"lr": 1e-12, "weight_decay": 0.0, "cache_dir": tmp_path, "dataset": PARITY}
    two = {"architecture": {**NET, "num_classes": 2}}
    pool = BaseModelPool(
        {
            "_pretrained_": base,
            "parity": {**recipe(init_from="_pretrained_", **still), **two},
            "again": {**recipe(init_from="_pretrained_", head="fresh", **still), **two},
        },
        classes={"_pretrained_": range(10)},
    )
    pool.preflight()
    parity, again = (pool.load_model(name) for name in ("parity", "again"))
    for model in (parity, again):
        torch.testing.assert_close(model.conv1.weight, base.conv1.weight, rtol=0, atol=1e-6)
        assert model.linear.out_features == 2
    assert not torch.equal(parity.linear.weight, again.linear.weight)  # each has its own seed
    labels = pool.labels("parity")
    assert labels is not None
    assert labels.names == ("even", "odd")


def test_a_fresh_head_may_be_asked_for(tmp_path, base) -> None:
    still = {"lr": 1e-12, "weight_decay": 0.0, "cache_dir": tmp_path}
    pool = BaseModelPool(
        {"_pretrained_": base, "a": recipe(init_from="_pretrained_", head="fresh", **still)},
        classes={"_pretrained_": range(10)},
    )
    change = (pool.load_model("a").linear.weight - base.linear.weight).abs().max()
    assert change > 0.01


def test_one_recipe_in_two_pools_stays_what_it_is(tmp_path, base, net, equal) -> None:
    """A member does not know its pool: the same object starts from each pool's own parent."""
    options = {"lr": 1e-12, "weight_decay": 0.0, "cache_dir": tmp_path, "epochs": 1}
    member = TrainedModel({**NET, "num_classes": 10}, DIGITS, init_from="_pretrained_", **options)
    first = BaseModelPool({"_pretrained_": base, "x": member})
    second = BaseModelPool({"_pretrained_": net(seed=5), "x": member})
    before = first.load_model("x")
    second.load_model("x")
    assert path_of(first, "x") != path_of(second, "x")
    assert equal(first.load_model("x"), before)


def test_other_images_under_the_same_name_are_another_recipe(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "images"
    for name, shade in (("dark", 0), ("light", 255)):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8), shade).save(folder / name / "1.png")
    spec = {"_target_": "fusion.data.image_folder", "channels": 1}

    def path(root: str | Path) -> Path:
        given = recipe(dataset={**spec, "root": str(root)})
        given["architecture"] = {**NET, "num_classes": 2}
        return path_of(make_pool(tmp_path / "cache", x=given), "x")

    monkeypatch.chdir(tmp_path)
    before = path(folder)
    assert path("images") == before  # the same folder, named relatively
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert path("images") != before  # another folder of the same relative name
    Image.new("L", (8, 8), 77).save(folder / "dark" / "1.png")
    os.utime(folder / "dark" / "1.png", ns=(1, 1))
    assert path(folder) != before


def test_another_code_of_a_data_set_is_another_recipe(tmp_path, monkeypatch) -> None:
    module = tmp_path / "my_data_set.py"
    module.write_text("def load():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = recipe(dataset={"_target_": "my_data_set.load"})
    before = path_of(make_pool(tmp_path, x=given), "x")
    module.write_text("def load():\n    return 2\n")
    assert path_of(make_pool(tmp_path, x=given), "x") != before


def test_a_read_only_cache_works_where_it_is_complete(tmp_path, trainings) -> None:
    make_pool(tmp_path, x=recipe()).load_model("x")
    for file in tmp_path.glob("*.lock"):
        file.unlink()
    pool = make_pool(tmp_path, x=recipe())
    pool.preflight()
    pool.load_model("x")
    assert trainings == ["x"]
    assert not list(tmp_path.glob("*.lock"))  # nothing was written, not even a lock


def test_a_cache_that_cannot_be_written_is_found_before_training(tmp_path, trainings) -> None:
    (tmp_path / "file").write_text("no folder")
    pool = make_pool(tmp_path / "file" / "cache", x=recipe())
    with pytest.raises(UserError, match="cache_dir: cannot write to the folder"):
        pool.preflight()
    assert trainings == []


@pytest.mark.parametrize("damage", ["cut", "nan", "other", "folder"])
def test_whatever_lies_in_a_cached_members_place_is_trained_again(
    tmp_path, trainings, damage, equal
) -> None:
    pool = make_pool(tmp_path, x=recipe())
    good = pool.load_model("x")
    path = path_of(pool, "x")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "nan":
        state = {key: torch.full_like(t, torch.nan) if t.is_floating_point() else t
                 for key, t in load_safetensors(path).items()}  # fmt: skip
        save_safetensors(path, state, {**read_metadata(path), "digest": digest_tensors(state)})
    elif damage == "other":  # another recipe's file under this one's name
        save_safetensors(path, load_safetensors(path), {**read_metadata(path), "recipe": "{}"})
    else:
        path.unlink()
        path.mkdir()
    again = make_pool(tmp_path, x=recipe())
    if damage == "folder":
        with pytest.raises(UserError, match="is a folder"):
            again.preflight()
        return
    again.preflight()
    assert equal(again.load_model("x"), good)
    assert trainings == ["x", "x"]


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (
            {"a": recipe(init_from="b"), "b": recipe(init_from="a")},
            "model 'a': init_from goes in a circle, a → b → a",
        ),
        ({"a": recipe(init_from="a")}, "init_from goes in a circle, a → a"),
        ({"a": recipe(init_from="gone")}, "init_from names 'gone', which the pool lacks"),
        (
            {"a": recipe(dataset={**DIGITS, "splt": "val"})},
            "fusion.data.digits has no option 'splt'; did you mean 'split'",
        ),
        (
            {"a": recipe(dataset={"_target_": "fusion.data.digit"})},
            "'fusion.data' has no 'digit'; did you mean 'digits'",
        ),
        (
            {"_pretrained_": recipe(), "a": {**recipe([0, 1]), "init_from": "_pretrained_"}
             | {"architecture": {**NET, "num_classes": 3}}},
            "linear.weight has 3 rows in the architecture, and there are 2 classes",
        ),
        (
            {"_pretrained_": recipe([0, 1, 2]),
             "a": recipe([1, 5], init_from="_pretrained_", head="rows")},
            "head=rows takes the head's rows from '_pretrained_', which knows the classes 0, 1, 2",
        ),
        (
            {"_pretrained_": recipe(), "a": recipe(init_from="_pretrained_")
             | {"architecture": {**NET, "depth": 14, "num_classes": 10}}},
            "init_from='_pretrained_' has another body",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_recipe_is_found_before_training(
    tmp_path, trainings, models, said
) -> None:
    with pytest.raises(UserError, match=said):
        make_pool(tmp_path, **models).preflight()
    assert trainings == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "epochs is 0; give a whole number of 1 or more"),
        ({"epocs": 3}, "did you mean 'epochs'"),
        ({"lr": "fast"}, "lr is 'fast'; give a number above 0"),
        ({"head": "row"}, "did you mean 'rows'"),
        ({"dataset": [1, 2]}, "dataset is .*; give a mapping with _target_"),
    ],
)
def test_what_is_no_recipe_is_refused_at_once(tmp_path, change, said) -> None:
    with pytest.raises(UserError, match=said):
        make_pool(tmp_path, x={**recipe(), **change})


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_trained_again_with_a_warning(
    tmp_path, trainings, caplog, damage, equal
) -> None:
    pool = make_pool(tmp_path, x=recipe())
    good = pool.load_model("x")
    path = path_of(pool, "x")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1000] ^= 1
    path.write_bytes({"cut": content[:-9], "flipped": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, "fusion"):
        again = make_pool(tmp_path, x=recipe()).load_model("x")
    assert trainings == ["x", "x"]
    assert "is damaged; training again" in caplog.text
    assert equal(good, again)
    assert set(load_safetensors(path)) == set(good.state_dict())


SCRIPT = """
import sys, json, logging, time
from pathlib import Path
from fusion.modelpool import BaseModelPool, trained

real = trained.fit
def fit(*args, **options):
    Path(sys.argv[2]).open("a").write(f"training {options['label']}\\n")
    time.sleep(1)  # long enough for somebody else to want the same
    return real(*args, **options)
trained.fit = fit
saving = trained.save_safetensors
def save(path, *rest):
    if sys.argv[3] == "die":
        Path(path).with_name(f".{Path(path).stem}-half.safetensors").write_bytes(b"half a file")
        Path(sys.argv[2]).open("a").write("half\\n")
        time.sleep(600)
    return saving(path, *rest)
trained.save_safetensors = save
BaseModelPool(json.loads(sys.argv[1])).load_model("x")
"""


def start(tmp_path: Path, mode: str) -> subprocess.Popen[bytes]:
    models = json.dumps({"x": {**recipe(), "cache_dir": str(tmp_path / "cache")}})
    arguments = [sys.executable, "-c", SCRIPT, models, str(tmp_path / "told"), mode]
    return subprocess.Popen(arguments)


def wait_for(word: str, file: Path, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not (file.exists() and word in file.read_text()):
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_at_once_train_it_once(tmp_path, trainings, equal) -> None:
    other = start(tmp_path, "live")
    wait_for("training", tmp_path / "told", other)
    pool = make_pool(tmp_path / "cache", x=recipe())
    assert not path_of(pool, "x").exists()  # the other one is still at it
    model = pool.load_model("x")
    assert other.wait() == 0
    assert (tmp_path / "told").read_text() == "training x\n"
    assert trainings == []
    assert equal(model, make_pool(tmp_path / "mine", x=recipe()).load_model("x"))


def test_a_kill_leaves_nothing_broken(tmp_path, equal) -> None:
    """Killed while it writes: the lock is free, the half file is swept away, the next run works."""
    process = start(tmp_path, "die")
    wait_for("half", tmp_path / "told", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cache = tmp_path / "cache"
    pool = make_pool(cache, x=recipe())
    assert not path_of(pool, "x").exists()
    model = pool.load_model("x")
    assert {path.suffix for path in cache.iterdir()} <= {".lock", ".safetensors"}
    assert not list(cache.glob(".*"))
    assert equal(model, make_pool(cache, x=recipe()).load_model("x"))


def test_networks_of_different_classes_share_a_simplex_that_is_not_trained(tmp_path) -> None:
    spec = recipe([7, 2, 0], head="simplex", epochs=2)
    pool = make_pool(tmp_path, a=spec, b=recipe([5, 1], head="simplex"))
    pool.preflight()
    vertices = simplex_vertices(10, 32)
    for name, classes in {"a": [7, 2, 0], "b": [5, 1]}.items():
        state = pool.tensors(name)
        assert torch.equal(state["linear.weight"], vertices[classes])
        assert not state["linear.bias"].any()
    fresh = make_pool(tmp_path, a={**spec, "head": "auto"}).tensors("a")
    assert not torch.equal(fresh["conv1.weight"], pool.tensors("a")["conv1.weight"])
    started = make_pool(tmp_path, a=spec, c=recipe([7, 2, 0], head="simplex", init_from="a"))
    assert torch.equal(started.tensors("c")["linear.weight"], vertices[[7, 2, 0]])


def test_a_simplex_has_equal_angles_the_largest_there_are() -> None:
    vertices = simplex_vertices(5, 7).double()
    expected = torch.full((5, 5), -1 / 4, dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(vertices @ vertices.T, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(vertices.sum(0), torch.zeros(7).double(), rtol=0, atol=1e-6)


def test_a_simplex_needs_as_many_features_as_classes(tmp_path, trainings) -> None:
    narrow = {**NET, "width": 0.125, "num_classes": 10}
    pool = make_pool(tmp_path, x={**recipe(), "architecture": narrow, "head": "simplex"})
    with pytest.raises(UserError, match="simplex of 10 classes in 8 features"):
        pool.preflight()
    assert trainings == []


def test_networks_share_the_vectors_of_a_file_which_are_not_trained(tmp_path, trainings) -> None:
    texts = {str(digit): torch.randn(96) * (digit + 1) for digit in range(10)}
    file = tmp_path / "texts.safetensors"
    save_safetensors(file, texts)
    pool = make_pool(
        tmp_path, a=recipe([7, 2, 0], head=str(file)), b=recipe([5, 1], head=str(file))
    )
    pool.preflight()
    rows = torch.cat([pool.tensors(name)["linear.weight"] for name in "ab"])
    wanted = torch.nn.functional.normalize(
        torch.stack([texts[str(digit)] for digit in (7, 2, 0, 5, 1)]), dim=1
    )
    assert rows.shape == (5, 32)  # a network with fewer features than the vectors are long
    torch.testing.assert_close(rows @ rows.T, wanted @ wanted.T, rtol=0, atol=1e-5)
    assert not pool.tensors("a")["linear.bias"].any()
    moved = file.rename(tmp_path / "elsewhere.safetensors")  # the same content: the same member
    again = make_pool(tmp_path, a=recipe([7, 2, 0], head=str(moved)))
    again.tensors("a")
    assert trainings == ["a", "b"]
    save_safetensors(moved, {**texts, "7": texts["8"]})
    make_pool(tmp_path, a=recipe([7, 2, 0], head=str(moved))).tensors("a")
    assert trainings == ["a", "b", "a"]


def test_vectors_keep_their_lengths_and_angles_in_any_space_that_holds_them() -> None:
    vectors = torch.randn(5, 12, dtype=torch.float64)
    for features in (5, 7, 12, 40):
        rows = placed(vectors, features).double()
        assert rows.shape == (5, features)
        torch.testing.assert_close(rows @ rows.T, vectors @ vectors.T, rtol=0, atol=1e-5)
        assert torch.equal(placed(vectors, features).double(), rows)
    assert torch.equal(placed(vectors, 12), vectors.float())
    with pytest.raises(UserError, match="5 vectors of length 12 do not fit into the 4 features"):
        placed(vectors, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"7": None}, "no vector for class '7'; it has vectors for 0, 1, 2"),
        ({"7": torch.ones(3)}, r"shapes \[\(3,\), \(4,\)\]; give one vector per class"),
        ({"7": torch.zeros(4)}, "the vector of class '7' is zero or not finite"),
    ],
)
def test_a_file_of_vectors_that_cannot_be_a_head_is_refused_before_training(
    change, message, tmp_path, trainings
) -> None:
    texts = {**{str(digit): torch.randn(4) for digit in range(10)}, **change}
    file = tmp_path / "texts.safetensors"
    save_safetensors(file, {key: value for key, value in texts.items() if value is not None})
    make_pool(tmp_path, x=recipe([7, 2], head="simplex")).preflight()
    pool = make_pool(tmp_path, x=recipe([7, 2], head=str(file)))
    with pytest.raises(UserError, match=f"model 'x': head=.*texts.safetensors: .*{message}"):
        pool.preflight()
    assert trainings == []


def test_a_file_needs_vectors_of_the_networks_own_classes_alone(tmp_path) -> None:
    file = tmp_path / "texts.safetensors"
    save_safetensors(file, {name: torch.randn(20) for name in "72"})
    make_pool(tmp_path, x=recipe([7, 2], head=str(file))).preflight()
    save_safetensors(file, {str(number): torch.randn(96) for number in range(40)})
    with pytest.raises(UserError, match="keep only the vectors of the classes of all networks"):
        make_pool(tmp_path, x=recipe([7, 2], head=str(file))).preflight()


def test_a_head_that_is_neither_an_origin_nor_a_file_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"head is 'simplx'; .* or a safetensors file"):
        make_pool(tmp_path, x=recipe(head="simplx"))
    pool = make_pool(tmp_path, x=recipe(head=str(tmp_path / "gone.safetensors")))
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        pool.preflight()


def test_a_pool_trains_what_no_other_process_trains_and_then_waits(
    tmp_path, trainings, caplog
) -> None:
    other = {**recipe(), "dataset": {**DIGITS, "split": "test"}}
    models = {"base": recipe(), "child": recipe(init_from="base"), "apart": other}
    pool = make_pool(tmp_path, **models)
    caplog.set_level(logging.INFO)
    with FileLock(path_of(pool, "base").with_suffix(".lock")):  # as another process
        thread = Thread(target=pool.train)
        thread.start()
        while thread.is_alive() and "base: waiting for another process" not in caplog.text:
            time.sleep(0.02)
        assert thread.is_alive()
        assert trainings == ["apart"]
        assert path_of(pool, "apart").is_file()
    thread.join()
    assert trainings == ["apart", "base", "child"]
    make_pool(tmp_path, **models).train()
    assert len(trainings) == 3
