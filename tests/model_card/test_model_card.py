"""A model card says what the report says, and its lines of code load the network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import shufflenet_v2_x0_5

import fusion
from fusion.data import as_rgb, grouped
from fusion.errors import UserError
from fusion.method.presets import algorithm, summary
from fusion.model_card import model_card
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.program import FusionProgram
from fusion.run_folder import RunFolder
from fusion.taskpool import ClassificationTaskPool
from fusion.weights import save_safetensors

TASK = "all | digits"
SHUFFLENET = {"_target_": "torchvision.models.shufflenet_v2_x0_5", "num_classes": 10}


def run(folder: Path, pool: BaseModelPool, method: str = "simple_average", **options) -> str:
    """Do a run, and return its card."""
    parts = {"method": algorithm(method), "modelpool": pool, "choices": {"method": method}}
    FusionProgram(**{**parts, "output_path": folder, **options}).run()
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def blocks(card: str, kind: str = "python") -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", card, re.DOTALL)


def parity(images):
    return grouped(images, {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]})


@pytest.fixture
def measured(base, experts, test_digits) -> dict[str, object]:
    """A pool with a task pool that measures its members, too."""
    classes = {"_pretrained_": list("0123456789"), "a": list("0123"), "b": list("456789")}
    tasks = ClassificationTaskPool(
        {TASK: test_digits}, evaluate_members=True, fast_dev_run=True, joint=None
    )
    pool = BaseModelPool({"_pretrained_": base, **experts}, classes=classes)
    return {"pool": pool, "taskpool": tasks}


def test_every_number_is_the_reports(measured, tmp_path) -> None:
    card = run(tmp_path, measured["pool"], "task_arithmetic", taskpool=measured["taskpool"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["files"]) >= {"README.md", "merged.safetensors"}
    table = re.search(r"## Results\n.*?\n(\|.*?)\n\n", card + "\n\n", re.DOTALL)[1].splitlines()
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in table[2:]]
    shown = {name.strip().replace("\\", ""): values for name, *values in cells}
    for name, tasks in report["evaluation"].items():
        label = {"merged": "**merged**"}.get(name, name)
        label += " (control)" if name in report["controls"] else ""
        assert shown[label][0].strip() == f"{100 * tasks[TASK]['accuracy']:.1f}"
    assert len(shown) == len(report["evaluation"]) > 2
    values = front_matter(card)["model-index"][0]["results"]
    assert [entry["dataset"]["name"] for entry in values] == list(report["evaluation"]["merged"])
    accuracy = report["evaluation"]["merged"][TASK]["accuracy"]
    assert values[0]["metrics"][0]["value"] == pytest.approx(accuracy, abs=1e-4)
    assert summary("task_arithmetic") in card
    assert "https://arxiv.org/abs/2212.04089" in card
    assert r"all \| digits" in card  # a task's name ends no cell of a table


def test_the_hub_reads_it(measured, tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = run(tmp_path, measured["pool"], taskpool=measured["taskpool"])
    report = json.loads((tmp_path / "report.json").read_text())
    read = hub.ModelCard(card)
    assert read.data.library_name == "fusion-cnn"
    assert {"merge", "simple_average"} <= set(read.data.tags)
    (found,) = read.data.eval_results
    accuracy = report["evaluation"]["merged"][TASK]["accuracy"]
    assert found.metric_value == pytest.approx(accuracy, abs=1e-4)
    assert (found.task_type, found.dataset_name) == ("image-classification", TASK)


def test_a_run_that_measures_nothing_has_a_card(peers, tmp_path) -> None:
    card = run(tmp_path, BaseModelPool(peers))
    assert "was not measured" in card
    assert "model-index" not in front_matter(card)
    assert 'fusion.load("merged.safetensors", architecture)' in card


def test_what_is_known_of_members_and_data_is_in_the_header(measured, tmp_path) -> None:
    run(tmp_path, measured["pool"])
    report = json.loads((tmp_path / "report.json").read_text())
    report["sources"] = {"_pretrained_": "hf://org/base", "a": "hf://org/a/x.pt", "b": "/home/me/b"}
    report["datasets"] = ["fusion.data.cifar10", "fusion.data.digits"]
    report["choices"]["overrides"] = ["method=slerp", "fast_dev_run=true", "modelpool.x='a b'"]
    card = model_card(report, tmp_path / "merged.safetensors")
    found = front_matter(card)
    assert found["base_model"] == ["org/base", "org/a"]
    assert found["base_model_relation"] == "merge"
    assert found["datasets"] == ["uoft-cs/cifar10"]
    assert "/home/me" not in card
    assert "A trial run" in card
    assert "'modelpool.x='\"'\"'a b'\"'\"''" in blocks(card, "bash")[0]


@pytest.mark.parametrize("several", [False, True], ids=["one head", "a head for each task"])
def test_its_code_loads_the_network_with_and_without_this_package(
    several, tmp_path, monkeypatch, train_digits
) -> None:
    torch.manual_seed(0)
    sizes = {"_pretrained_": 10, "digit": 10, "parity": 2 if several else 10}
    members = {}
    for name, size in sizes.items():
        save_safetensors(
            tmp_path / f"{name}.safetensors", shufflenet_v2_x0_5(num_classes=size).state_dict()
        )
        spec = {**SHUFFLENET, "num_classes": size}
        members[name] = Checkpoint(tmp_path / f"{name}.safetensors", spec)
    images = as_rgb(train_digits)
    data = {"_pretrained_": images, **({"parity": parity(images)} if several else {})}
    classes = {} if several else {"parity": list("0123456789")}
    pool = BaseModelPool(members, train_datasets=data, classes=classes)
    card = run(tmp_path / "run", pool, method="simple_average")
    assert ".safetensors" in card.split("## Method")[0]  # where the members come from
    monkeypatch.chdir(tmp_path / "run")
    batch = torch.rand(2, 3, 32, 32)
    ours, theirs = blocks(card)
    found: dict[str, object] = {"images": batch}
    exec(ours.replace("fusion.load(", "load("), {**found, "load": evaluated}, found)
    exec(theirs, found)
    assert "fusion" not in theirs
    assert torch.equal(found["model"].eval()(batch), evaluated_logits(ours, batch))
    assert found["logits"].shape == (2, 10)


def evaluated(path: str) -> torch.nn.Module:
    return fusion.load(path).eval()


def evaluated_logits(code: str, images: torch.Tensor) -> torch.Tensor:
    names: dict[str, object] = {"images": images, "load": evaluated}
    exec(code.replace("fusion.load(", "load("), names)
    return names["logits"]


def test_a_readme_of_somebody_is_not_replaced(tmp_path) -> None:
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(UserError, match=r"README.md' is not of a run, and .* would replace it"):
        RunFolder(tmp_path, overwrite=True).check()


@pytest.mark.parametrize("report_is", ["there", "elsewhere", "lost"])
def test_the_card_of_an_earlier_run_is_replaced(report_is, peers, tmp_path) -> None:
    more = {"report_save_path": tmp_path / "kept.json"} if report_is == "elsewhere" else {}
    first = run(tmp_path / "run", BaseModelPool(peers), **more)
    if report_is == "lost":
        (tmp_path / "run" / "report.json").unlink()
    second = run(tmp_path / "run", BaseModelPool(peers), "slerp", overwrite=True, **more)
    assert "# simple" in first
    assert "# slerp" in second
