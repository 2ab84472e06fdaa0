"""Experts of different tasks through the real command, from training to export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

import fusion
from fusion.data import digits
from fusion.models import CifarResNet, MultiTaskNetwork

TRIAL = ["modelpool=digits_tasks", "taskpool=digits_tasks", "fast_dev_run=true"]
TASKS = ("digit", "parity", "below_five", "quarter_turn")


@pytest.fixture(scope="module")
def merged(command_in, tmp_path_factory, cache) -> Path:
    """The folder of a run that merged experts of four tasks, each trained on one batch."""
    folder = tmp_path_factory.mktemp("tasks")
    answer = command_in(
        "method=task_arithmetic", *TRIAL, "output_path=run", cwd=folder, FUSION_CACHE=str(cache)
    )
    assert answer.code == 0, answer.err
    assert "Head, one for each task: linear.weight, linear.bias" in answer.out
    return folder / "run"


def test_every_task_is_measured_with_its_own_head_beside_its_controls(merged) -> None:
    report = json.loads((merged / "report.json").read_text())
    evaluation = report["evaluation"]
    control = "_pretrained_, experts' heads, batch norm recalibrated"
    assert list(evaluation) == ["_pretrained_", *TASKS, control, "merged"]
    for name in (control, "merged"):
        assert set(evaluation[name]) == set(TASKS)
    for name in TASKS:
        assert set(evaluation[name]) == {name}  # an expert answers its own task and no other
    assert report["experts"] == {task: task for task in TASKS}
    assert set(report["shares_of_experts"]["merged"]) == set(TASKS)
    assert report["algorithm"]["tasks"] == list(TASKS)


def test_one_file_holds_body_and_heads_and_is_read_back(merged) -> None:
    model = fusion.load(merged / "merged.safetensors").eval()
    assert isinstance(model, MultiTaskNetwork)
    assert model.tasks == TASKS
    names = {task: space and space.names for task, space in model.labels.items()}
    assert names["below_five"] == ("below five", "five or more")
    stored = load_file(merged / "merged.safetensors")
    assert "conv1.weight" in stored
    assert stored["tasks.quarter_turn.linear.weight"].shape[0] == 4
    assert sum("conv1.weight" in key for key in stored) == sum(
        "conv1.weight" in key for key in CifarResNet(8).state_dict()
    )  # the body is there once


def test_one_task_is_written_as_a_plain_network(merged, command_in, tmp_path) -> None:
    source = f"export={merged / 'merged.safetensors'}"
    answer = command_in(source, "task=parity", "to=parity.safetensors", cwd=tmp_path)
    assert answer.code == 0, answer.err
    plain = CifarResNet(8, 2, in_channels=1, width=1)
    plain.load_state_dict(load_file(tmp_path / "parity.safetensors"))  # as any script does
    model = fusion.load(merged / "merged.safetensors").eval()
    images = digits("val").images[:8] / 255
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), model(images, task="parity"))
    again = fusion.load(tmp_path / "parity.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(images), plain(images))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["to=x.pt"], "has a head for each of digit, parity, below_five, quarter_turn; say which"),
        (["task=parit", "to=x.pt"], "no task 'parit'; did you mean 'parity'"),
        (["task=parity", "to=x.pkl"], "to=x.pkl: there is no such format"),
        (["task=parity"], "export needs two files"),
        (["tsk=parity", "to=x.pt"], "export has no option 'tsk'; did you mean 'task'"),
    ],
)
def test_a_wrong_export_is_a_sentence(main_in, merged, capsys, arguments, said) -> None:
    with pytest.raises(SystemExit) as ended:
        main_in(f"export={merged / 'merged.safetensors'}", *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def shapes(folder: Path, kinds: dict[str, tuple[int, int, int]], count: int, side: int) -> None:
    """An image folder: a class for each colour, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    for name, colour in kinds.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = torch.randint(0, 60, (side, side, 3), generator=generator)
            pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory) -> Path:
    """What a practitioner has: a backbone, two checkpoints in other wrappers, two folders."""
    home = tmp_path_factory.mktemp("practitioner")
    shapes(home / "warm", {"red": (180, 0, 0), "orange": (180, 90, 0)}, 6, 40)
    shapes(home / "cold", {"blue": (0, 0, 180), "cyan": (0, 120, 180)}, 6, 48)
    torch.manual_seed(0)
    base = torchvision.models.resnet18(num_classes=5)
    torch.save(base.state_dict(), home / "base.pth")
    for name, wrap in (
        ("warm", lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}),
        ("cold", lambda s: {"model": s}),
    ):
        expert = torchvision.models.resnet18(num_classes=2)  # heads of equal size
        own = expert.state_dict()
        state = {
            key: value + 0.01 * torch.randn(value.shape) if value.is_floating_point() else value
            for key, value in base.state_dict().items()
        }
        state |= {key: own[key] for key in ("fc.weight", "fc.bias")}
        state |= {key: value.abs() for key, value in state.items() if key.endswith("running_var")}
        torch.save(wrap(state), home / f"{name}.pth")
    return home


def pool_of(home: Path) -> list[str]:
    """A user's own YAML, and the arguments that name it."""

    def member(file: str, classes: int) -> dict[str, object]:
        resnet = {"_target_": "torchvision.models.resnet18", "num_classes": classes}
        path = str(home / file)
        return {"_target_": "fusion.modelpool.Checkpoint", "path": path, "architecture": resnet}

    folder = {"_target_": "fusion.data.image_folder", "image_size": 32, "resize": 36, "channels": 3}
    data = {name: {**folder, "root": str(home / name)} for name in ("warm", "cold")}
    pool = {
        "_target_": "fusion.modelpool.BaseModelPool",
        "_recursive_": False,
        "models": {
            "_pretrained_": member("base.pth", 5),
            "warm": member("warm.pth", 2),
            "cold": member("cold.pth", 2),
        },
        "train_datasets": data,
    }
    tasks = {
        "_target_": "fusion.taskpool.ClassificationTaskPool",
        "_recursive_": False,
        "tasks": data,
        "evaluate_members": True,
    }
    for group, values in (("modelpool", pool), ("taskpool", tasks)):
        (home / "conf" / group).mkdir(parents=True, exist_ok=True)
        (home / "conf" / group / "mine.yaml").write_text(json.dumps(values))  # JSON is YAML
    return ["--config-dir", str(home / "conf"), "modelpool=mine", "taskpool=mine"]


def test_two_checkpoints_and_two_folders_are_merged(two_experts, main_in, tmp_path) -> None:
    """Heads of equal size and other meaning stay apart; classes come from the folders."""
    main_in(*pool_of(two_experts), "method=snr_selective_merge", "output_path=run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    merged = report["evaluation"]["merged"]
    assert set(merged) == {"warm", "cold", "joint"}
    assert list(merged["warm"]["class_accuracy"]) == ["orange", "red"]
    assert list(merged["joint"]["class_accuracy"]) == ["blue", "cyan", "orange", "red"] or list(
        merged["joint"]["class_accuracy"]
    ) == ["orange", "red", "blue", "cyan"]
    assert report["algorithm"]["head"] == "tasks"
    model = fusion.load(tmp_path / "run" / "merged.safetensors")
    for name in ("warm", "cold"):
        plain = model.for_task(name)
        assert type(plain) is torchvision.models.ResNet
        mine = torchvision.models.resnet18(num_classes=2)
        mine.load_state_dict(plain.state_dict())
    heads = [model.for_task(name).fc.weight for name in ("warm", "cold")]
    assert not torch.equal(*heads)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["taskpool.tasks.warm.channels=1"], "the images of task 'warm' do not fit"),
        (["modelpool.train_datasets.warm.channels=1"], "the train data of 'warm' do not fit"),
        (["+modelpool.classes={warm:[a,b,c]}"], "'warm' has 2 outputs and 3 classes (a, b, c)"),
        (["~modelpool.train_datasets.warm", "method.batch_norm=recalibrate"],
         "the pool has none of warm"),
        (["+modelpool.head=[fcc]"], "called 'fcc'; did you mean 'fc'"),
        (["+modelpool.tasks={worm: x}"], "tasks: the pool has no model 'worm'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_sentence_before_any_work(
    two_experts, main_in, tmp_path, capsys, change, said
) -> None:
    with pytest.raises(SystemExit) as ended:
        main_in(
            *pool_of(two_experts),
            *change,
            "method=task_arithmetic",
            "output_path=run",
            "dry_run=true",
        )
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
