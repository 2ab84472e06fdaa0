"""What a file says is data: it names networks of a short list and runs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fusion.errors import UserError
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.modelpool.bounded import Bounds, bounded, bounds_of_file
from fusion.modelpool.member import on_meta
from fusion.modelpool.trusted import require_trusted
from fusion.weights import save_safetensors

OURS = {"_target_": "fusion.models.CifarResNet", "depth": 8, "width": 0.5, "in_channels": 1}
RESNET = {"_target_": "torchvision.models.resnet18", "num_classes": 3}
TIMM = {"_target_": "timm.create_model", "model_name": "resnet18"}

ATTACKS = {
    "command": {"_target_": "os.system", "_args_": ["touch canary"]},
    "output": {"_target_": "subprocess.getoutput", "cmd": "touch canary"},
    "exec": {"_target_": "builtins.exec", "_args_": ["open('canary', 'w')"]},
    "import": {"_target_": "canary_module.Net"},
    "locate": {"_target_": "fusion.target.locate", "path": "canary_module.Net"},
    "build": {"_target_": "fusion.target.build", "_args_": [{"_target_": "os.system"}]},
    "nested": {**OURS, "depth": {"_target_": "os.system", "_args_": ["touch canary"]}},
    "nested in a list": {**OURS, "depth": [[{"_target_": "os.system", "_args_": ["x"]}]]},
    "nested in args": {
        "_target_": OURS["_target_"],
        "_args_": [{"_target_": "subprocess.getoutput", "cmd": "touch canary"}],
    },
    "partial": {**OURS, "_partial_": True},
    "private": {"_target_": "torchvision.models._utils.IntermediateLayerGetter"},
    "through the module": {"_target_": "torchvision.models.os.system"},
    "no network": {"_target_": "torchvision.models.get_model", "name": "resnet18"},
    "quantized": {"_target_": "torchvision.models.quantization.resnet18"},
    "another module's": {"_target_": "torchvision.models.video.resnet18"},
    "weights": {**RESNET, "weights": "DEFAULT"},
    "legacy weights": {**RESNET, "pretrained": True},
    "positional weights": {"_target_": RESNET["_target_"], "_args_": [True]},
    "backbone": {
        "_target_": "torchvision.models.segmentation.fcn_resnet50",
        "weights_backbone": "DEFAULT",
    },
    "pretrained": {**TIMM, "pretrained": True},
    "positional pretrained": {"_target_": TIMM["_target_"], "_args_": ["resnet18", True]},
    "hub": {**TIMM, "model_name": "hf-hub:a/b"},
    "old hub": {**TIMM, "model_name": "hf_hub:a/b"},
    "loud hub": {**TIMM, "model_name": "HF-HUB:a/b"},
    "folder": {**TIMM, "model_name": "local-dir:/tmp"},
    "another checkpoint": {**TIMM, "checkpoint_path": "/etc/passwd"},
    "unknown to timm": {**TIMM, "model_name": "resnet18000"},
    "no name": {"_target_": TIMM["_target_"]},
    "infinite": {**OURS, "width": float("inf")},
    "deep": {**OURS, "depth": 6 * 10**9 + 2},
    "wide": {**OURS, "width": 1e300},
    "many digits": {**OURS, "depth": 10**4000},
    "many classes": {**RESNET, "num_classes": 10**9},
    "a list": [OURS],
    "no target": {"depth": 8},
    "target of another type": {"_target_": ["os.system"]},
    "args of another type": {**OURS, "_args_": "ab"},
}

# What looks like a builder and is none that torchvision or timm list.
NO_BUILDERS = ("no network", "another module's", "unknown to timm")


@pytest.fixture
def file(base, tmp_path, monkeypatch):
    """The maker of a file with weights that names an architecture, in a folder with a canary."""
    (tmp_path / "canary_module.py").write_text("open('canary', 'w')\nNet = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(spec: object, state=None) -> Path:
        path = tmp_path / "x.safetensors"
        text = spec if isinstance(spec, str) else json.dumps(spec)
        save_safetensors(path, state or base.state_dict(), {"architecture": text})
        return path

    return write


@pytest.mark.parametrize("spec", ATTACKS.values(), ids=ATTACKS)
def test_a_file_is_refused_in_one_sentence_and_runs_nothing(file, spec, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    path = file(spec)
    with pytest.raises(UserError) as caught:
        BaseModelPool({"_pretrained_": Checkpoint(path)}).preflight()
    message = str(caught.value)
    assert "asks for" in message
    assert message.endswith("give `architecture` yourself if you trust it")
    assert len(message) < 300 + len(str(path))
    for use in (Checkpoint(path).build, Checkpoint(path).architecture):
        with pytest.raises(UserError, match="asks for"):
            use()
    assert not Path("canary").exists()


EVERY_FILE = """
import sys
from pathlib import Path
from fusion.errors import UserError
from fusion.modelpool import Checkpoint
from fusion.modelpool.written import written_architecture
before = set(sys.modules)
for use in (written_architecture, lambda path: Checkpoint(path).build()):
    for path in sorted(Path.cwd().glob("*.safetensors")):
        try:
            use(path)
        except UserError as error:
            print(error)
    if use is written_architecture:
        print("imported by the check:", *(set(sys.modules) - before))
"""
DRY_RUN = [
    "modelpool=torchvision", "dry_run=true", "path.checkpoint=x.safetensors",
    "modelpool.models._pretrained_.architecture=null",
    "~modelpool.models.expert_a", "~modelpool.models.expert_b",
]  # fmt: skip


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


def test_a_process_of_its_own_runs_nothing_either(file) -> None:
    for number, attack in enumerate(ATTACKS.values()):  # torchvision's and timm's lists come later
        file(attack).rename(f"{number}.safetensors")
    done = process("-c", EVERY_FILE)
    assert done.stderr == ""
    checked, built = done.stdout.split("imported by the check:")
    assert built.startswith("\n")
    assert built.count("asks for the architecture") == len(ATTACKS)
    assert checked.count("asks for the architecture") == len(ATTACKS) - len(NO_BUILDERS)
    assert not Path("canary").exists()


@pytest.mark.slow
def test_a_dry_run_runs_nothing_either(file) -> None:
    file(ATTACKS["command"])
    done = process("-m", "fusion", *DRY_RUN)
    assert done.returncode == 2
    assert "asks for the architecture 'os.system'" in done.stderr.splitlines()[-1]
    assert not Path("canary").exists()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "", "NaN,", '{"a": 1e}'])
def test_metadata_that_is_no_json_is_told(file, text, base, tmp_path) -> None:
    with pytest.raises(UserError, match="its architecture is not JSON"):
        Checkpoint(file(text)).build()
    path = tmp_path / "c.safetensors"
    for labels in (text, '{"a": 1}', "[1.5]", '["0"]', "[true]", "7"):
        save_safetensors(path, base.state_dict(), {"labels": labels})
        with pytest.raises(UserError, match=r"is damaged: (its labels|the classes)"):
            Checkpoint(path, OURS).labels()


def test_what_this_package_and_torchvision_build_is_built(file, base, equal) -> None:
    assert equal(Checkpoint(file(OURS)).build(), base)
    network = torchvision.models.resnet18(num_classes=3)
    spec = {**RESNET, "weights": None, "_recursive_": False, "_convert_": "all"}
    assert equal(Checkpoint(file(spec, network.state_dict())).build(), network)
    positional = {"_target_": OURS["_target_"], "_args_": [8, 10, 1, 0.5]}
    assert equal(Checkpoint(file(positional)).build(), base)


def test_timm_builds_what_a_file_names(file, equal) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=3)
    spec = {"_target_": "timm.create_model", "model_name": "resnet10t", "num_classes": 3}
    assert equal(Checkpoint(file(spec, network.state_dict())).build(), network)


def test_the_user_extends_the_list_and_the_file_does_not(file, tmp_path, equal) -> None:
    (tmp_path / "mine_trusted.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    pass\nclass Other(nn.Linear):\n    pass\n"
    )
    layer = nn.Linear(3, 2)
    spec = {"_target_": "mine_trusted.Net", "in_features": 3, "out_features": 2}
    path = file(spec, layer.state_dict())
    with pytest.raises(UserError, match=r"asks for the architecture 'mine_trusted.Net'"):
        Checkpoint(path).build()
    assert "mine_trusted" not in sys.modules
    assert equal(Checkpoint(path, trusted=["mine_trusted.Net"]).build(), layer)
    for target in ("mine_trusted.Other", "mine_trusted", "mine_trusted.Net.forward"):
        with pytest.raises(UserError, match="asks for"):
            Checkpoint(path, trusted=[target]).build()
    nested = {**spec, "in_features": {"_target_": "mine_trusted.Net"}}
    with pytest.raises(UserError, match="no plain number"):
        Checkpoint(file(nested), trusted=["mine_trusted.Net"]).build()
    with pytest.raises(UserError, match="give a list of text"):
        Checkpoint(path, trusted="mine_trusted.Net")


def test_the_user_may_ask_for_anything(file, base, equal) -> None:
    path = file(ATTACKS["command"])
    assert equal(Checkpoint(path, OURS).build(), base)
    assert Checkpoint(path, OURS).architecture_spec == OURS


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        ({**OURS, "depth": 60_002}, "far greater than the file"),
        ({**OURS, "width": 60_000.0}, "far greater than the file"),
        (
            {**RESNET, "_target_": "torchvision.models.resnet50", "width_per_group": 60_000},
            "far gr",
        ),
        ({**RESNET, "groups": 7}, "cannot be built"),
        ({**OURS, "depth": 9}, "depth must be 6n"),
        ({**OURS, "depth": "8"}, "depth is '8'; give a whole number"),
    ],
)
def test_no_architecture_grows_beyond_its_file(file, spec, numbers, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(nn.Module, "__init__", counted(nn.Module.__init__, made))
    with pytest.raises(UserError, match=numbers):
        Checkpoint(file(spec)).build()
    assert len(made) < 10_000
    assert torch.is_grad_enabled()  # a constructor was left in the middle


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(None)
        return function(*args, **kwargs)

    return call


def test_a_structure_must_fit_before_anything_is_allocated(file, monkeypatch) -> None:
    made = []
    path = file({**OURS, "width": 8.0})
    monkeypatch.setattr(
        "fusion.modelpool.checkpoint.build_architecture", lambda _: made.append(None)
    )
    with pytest.raises(UserError):
        Checkpoint(path).build()
    assert made == []


def test_what_the_meta_device_cannot_hold_is_bounded_too() -> None:
    with pytest.raises(UserError, match="far greater"), bounded(Bounds(10, 1000), path=Path("x")):
        torch.zeros(10**12, device="cpu")


@pytest.mark.parametrize("name", ["densenet121", "ssd300_vgg16", "swin_v2_t"])
def test_the_bounds_leave_room_for_real_networks(name) -> None:
    builder = torchvision.models.get_model_builder(name)
    spec = {"_target_": f"{builder.__module__}.{name}"}
    if name.startswith("ssd"):
        spec["weights_backbone"] = None
    state = on_meta(spec).state_dict()
    half = sum(tensor.numel() for tensor in state.values())  # bytes, if stored as 8-bit numbers
    with bounded(bounds_of_file(len(state), half), path=Path("x")):
        on_meta(spec)


def test_the_check_returns_what_it_was_given() -> None:
    assert require_trusted(OURS, path=Path("x"), size=100) == OURS
    with pytest.raises(UserError, match="more than the file's 7 bytes can hold"):
        require_trusted(OURS, path=Path("x"), size=7)
