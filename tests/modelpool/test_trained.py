from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.errors import UserError
from fusion.modelpool import BaseModelPool, TrainedModel
from fusion.weights import load_safetensors, read_metadata

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
    member = pool.member(name)
    assert isinstance(member, TrainedModel)
    return member.path


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
    assert json.loads(metadata["classes"]) == [7, 2]
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
        }
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
        }
    )
    torch.testing.assert_close(
        pool.load_model("grandchild").linear.bias, base.linear.bias[[5, 7]], rtol=0, atol=1e-6
    )


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
            "linear.weight: 2 rows are asked for, the network to fill has 3 classes",
        ),
        (
            {"_pretrained_": recipe([0, 1, 2]), "a": recipe([1, 5], init_from="_pretrained_")},
            r"'_pretrained_' has no rows for the classes \[5\]; it knows \[0, 1, 2\]",
        ),
        (
            {"_pretrained_": recipe(), "a": recipe(init_from="_pretrained_")
             | {"architecture": {**NET, "num_classes": 4}}},
            "say which of its classes to keep with 'classes'",
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
        ({"epochs": 0}, "epochs is 0; give 1 or more"),
        ({"epocs": 3}, "did you mean 'epochs'"),
        ({"lr": "fast"}, "lr is 'fast', which is no float"),
        ({"dataset": [1, 2]}, "dataset must be a mapping with _target_, not a list"),
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
