"""Every option of every YAML × values that nobody should give: right, or refused in a sentence.

The settings are generated from the shipped YAML files and from the signatures of what they name,
so that an option that is added later is attacked too. Each is typed into the real command as a dry
run, in this process.
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from PIL import Image

from fusion.cli.job import register_resolvers
from fusion.config_folder import config_folder
from fusion.target import is_target, locate

HUGE = 10**30
VALUES: dict[str, object] = {
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "1e9": 1e9,
    str(HUGE): HUGE,
    "nan": float("nan"),
    "x": "x",
    "''": "",
    "[]": [],
    "{}": {},
}
SAMPLE = int(os.environ.get("FUSION_ATTACK_SAMPLE", "20"))
WORDS = ("_recursive_", "_args_", "_partial_", "_convert_")

# What a choice takes to be complete; FILES is the folder that `files` makes.
_DIGITS = ("modelpool=digits",)
_TEMPLATE = (
    "path.checkpoint=FILES/{network}.pt",
    "modelpool.models.expert_a.path=FILES/{network}.pt",
    "modelpool.models.expert_b.path=FILES/{network}.pt",
)
# One of the two images of each class; the other is left for validation.
_HALF = "modelpool.train_datasets._pretrained_.per_class=1"
COMPLETE: dict[str, tuple[str, ...]] = {
    "method=interpolation_barrier": ("modelpool=digits_pair",),
    "method=merge": (*_DIGITS, "method.rule._target_=fusion.merging.rules.Mean"),
    "method=weighted_average": (*_DIGITS, "method.weights=[1,1]"),
    "modelpool=digits_pair": ("method=git_rebasin",),
    "modelpool=cifar10_folder": (
        "path.data_dir=FILES",
        "path.checkpoint=FILES/resnet20.safetensors",
    ),
    "modelpool=cifar10_folder_tasks": (
        "path.data_dir=FILES",
        "path.checkpoint=FILES/resnet20.safetensors",
        _HALF,
    ),
    "modelpool=cifar10_folder_domains": (
        "path.data_dir=FILES",
        "path.checkpoint=FILES/resnet20.safetensors",
        _HALF,
    ),
    "modelpool=cifar10_folder_pair": ("method=git_rebasin", "path.data_dir=FILES"),
    "modelpool=cifar10_folder_split": ("method=git_rebasin", "path.data_dir=FILES", _HALF),
    "modelpool=torchvision": (
        "modelpool.models._pretrained_.architecture._target_=torchvision.models.shufflenet_v2_x0_5",
        *(text.replace("{network}", "shufflenet") for text in _TEMPLATE),
    ),
    "modelpool=timm": (
        "modelpool.models._pretrained_.architecture.model_name=mobilenetv3_small_050",
        *(text.replace("{network}", "mobilenet") for text in _TEMPLATE),
    ),
    "taskpool=digits_tasks": ("modelpool=digits_tasks",),
    "taskpool=digits_domains": ("modelpool=digits_domains",),
    "taskpool=glyphs_tasks": ("modelpool=glyphs_tasks",),
    "taskpool=cifar10_folder_domains": (
        "modelpool=cifar10_folder_domains",
        "path.data_dir=FILES",
        "path.checkpoint=FILES/resnet20.safetensors",
        _HALF,
    ),
    "taskpool=cifar10_folder_split": (
        "modelpool=cifar10_folder_split",
        "method=git_rebasin",
        "path.data_dir=FILES",
        _HALF,
    ),
    "taskpool=cifar10_folder_tasks": (
        "modelpool=cifar10_folder_tasks",
        "path.data_dir=FILES",
        "path.checkpoint=FILES/resnet20.safetensors",
        _HALF,
    ),
    "taskpool=cifar10_folder": (
        "modelpool=cifar10_folder",
        "path.data_dir=FILES",
        "path.checkpoint=FILES/resnet20.safetensors",
    ),
}
# Their data or weights are a download, or their package is an extra that the tests do not install;
# what they name is attacked through other choices.
WITHOUT_DATA = (
    "modelpool=cifar10",
    "taskpool=cifar10",
    "modelpool=cards",
    "modelpool=folders",
    "taskpool=folders",
    "method=custom",
    "fabric/loggers=wandb",
)
GROUPS = ("method", "modelpool", "taskpool", "finetune", "fabric", "fabric/loggers", "path")
CHOICES = [
    choice
    for group in GROUPS
    for file in sorted((config_folder() / group).glob("*.yaml"))
    if (choice := f"{group}={file.stem}") not in WITHOUT_DATA
]
A_CHOICE = "a choice"
MORE_CHOICES = ("3", "[a]", "{a:1}")
CHOSEN = ("method", "modelpool", "taskpool", "finetune", "merge", "experiment", "path", "fabric")
RUN_KEYS = (
    "seed",
    "output_path",
    "overwrite",
    "fast_dev_run",
    "dry_run",
    "print_config",
    "report_save_path",
    "merged_model_save_path",
)


@dataclass(frozen=True)
class Setting:
    """One option with one value, and what else is typed with it.

    Attributes:
        arguments: everything else, with ``FILES`` for the folder of files.
        key: the option.
        value: as it is typed.
        shipped: what the YAML says, or the signature's default.
    """

    arguments: tuple[str, ...]
    key: str
    value: str
    shipped: object

    @property
    def typed(self) -> str:
        return " ".join([*self.arguments, f"{self.key}={self.value}"])


def complete(choice: str) -> tuple[str, ...]:
    """Return everything that a run with ``choice`` takes."""
    return (choice, *COMPLETE.get(choice, _DIGITS if not choice.startswith("modelpool") else ()))


def composed(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Compose a configuration without its references to files of the user."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("fusion_bench", overrides=list(arguments), return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = "folder"
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    assert isinstance(values, dict)
    return values


def options_of(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, object, object]]:
    """Yield (path, shipped value, owner) of every option below ``node``.

    An owner is what tells options apart: the target whose option it is, or the option's own path.
    """
    for name, value in node.items():
        if name in WORDS:
            continue
        own = (node["_target_"], name) if is_target(node) else f"{path}.{name}"
        yield f"{path}.{name}", value, own
        if isinstance(value, Mapping):
            yield from options_of(value, f"{path}.{name}")
    if is_target(node) and node["_target_"].startswith("fusion."):
        parameters = inspect.signature(locate(node["_target_"])).parameters
        for name, parameter in parameters.items():
            if name not in node:
                yield f"+{path}.{name}", parameter.default, (node["_target_"], name)


def settings() -> dict[str, list[Setting]]:
    """Return choice → its options × every value; under ``""`` keys of the run, and choices."""
    primary = composed(_DIGITS)
    run = [Setting(_DIGITS, key, value, primary[key]) for key in RUN_KEYS for value in VALUES]
    for group in CHOSEN:
        others = () if group == "modelpool" else _DIGITS
        run += [Setting(others, group, value, A_CHOICE) for value in [*VALUES, *MORE_CHOICES]]
    shipped = OmegaConf.load(config_folder() / "hydra" / "default.yaml")
    for path, value, _ in options_of(OmegaConf.to_container(shipped, resolve=False), "hydra"):
        run += [Setting(_DIGITS, path, hostile, value) for hostile in VALUES]
    found = {"": run}
    seen = set()
    for choice in CHOICES:
        group = choice.partition("=")[0].replace("/", ".")
        node: Any = composed(complete(choice))
        for part in group.split("."):
            node = node[part]
        found[choice] = []
        for path, shipped, owner in options_of(node, group):
            if (group, owner) not in seen:  # the second member of a kind says nothing new
                seen.add((group, owner))
                found[choice] += [
                    Setting(complete(choice), path, value, shipped) for value in VALUES
                ]
    return found


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints and with images in train/<class> and test/<class>."""
    import timm
    import torch
    import torchvision

    from fusion.models import CifarResNet
    from fusion.weights import save_safetensors

    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in range(10):
            (folder / split / f"class{name}").mkdir(parents=True)
            for number in range(2):
                pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{name}" / f"{number}.png")
    save_safetensors(folder / "resnet20.safetensors", CifarResNet(20).state_dict())
    shufflenet = torchvision.models.shufflenet_v2_x0_5()
    torch.save(shufflenet.state_dict(), folder / "shufflenet.pt")
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), folder / "mobilenet.pt")
    return folder


# What options are that are null or of several kinds as they are shipped.
OPTIONAL: dict[str, tuple[type, ...]] = {
    "report_save_path": (str,),
    "merged_model_save_path": (str,),
    "checkpoint": (str,),
    "output_path": (str,),
    "weights": (list, dict),
    "align": (str, bool),
    "example_input": (list,),
    "density": (int, float),
    "scale": (int, float),
    "alpha": (int, float),
    "iterations": (int,),
    "max_points_per_model": (int,),
    "images": (int,),
    "budget": (int,),
    "per_class": (int,),
    "only": (list,),
    "image_size": (int,),
    "resize": (int,),
    "key": (str,),
    "classes": (list, dict),
    "class_names": (list,),
    "init_from": (str,),
    "in_memory": (bool, str),
    "revision": (str,),
    "offline": (bool,),
    "mean": (list,),
    "std": (list,),
    "version": (str, int),
}


def means_nothing(setting: Setting) -> bool:
    """Return whether the value is of another kind than the option, whatever its range.

    This is judged by what is shipped and by the table above, not by the annotations that the
    product itself goes by.
    """
    name = setting.key.rpartition(".")[2].lstrip("+")
    if setting.value not in VALUES or VALUES[setting.value] is None or setting.shipped == A_CHOICE:
        return False
    value: Any = VALUES[setting.value]
    if setting.key.startswith("hydra."):  # Hydra's own settings, and Python's logging behind them
        return value == "" and name in ("dir", "subdir")
    if setting.key == "seed" and value == 1e9:  # how a large whole number is typed
        return False
    if name in OPTIONAL:
        kinds = OPTIONAL[name]
    elif setting.shipped is None or setting.shipped is inspect.Parameter.empty:
        return False
    elif isinstance(setting.shipped, bool):
        kinds = (bool,)
    elif isinstance(setting.shipped, float):
        kinds = (int, float)
    elif isinstance(setting.shipped, list | tuple):
        kinds = (list,)
    elif isinstance(setting.shipped, Mapping):
        kinds = (dict, list) if name == "models" else (dict,)
    else:
        kinds = (type(setting.shipped),)
    if type(value) not in kinds or value != value:
        return True
    if isinstance(value, int):
        return value == HUGE and float not in kinds
    return value in ("", []) and name not in ("key", "trusted")


def answer(
    setting: Setting, main: Callable[..., None], files: Path, tmp_path: Path, capsys: Any
) -> Any:
    """Type the setting in an empty folder and judge what comes: (kind, words)."""
    folder = tmp_path / "folder"  # anew: some answers used to remove it
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    arguments = [text.replace("FILES", str(files)) for text in setting.arguments]
    given = [*arguments, f"{setting.key}={setting.value}"]
    if setting.key != "dry_run":
        given.append("dry_run=true")
    capsys.readouterr()
    try:
        main(*given)
    except SystemExit as left:
        said = capsys.readouterr().err.strip()
        sentence = said.startswith("fusion_bench: error: ") and "\n" not in said
        if left.code != 2 or not sentence or len(said) < 40:
            return "bare", said
        names = [*setting.key.lstrip("+").split(".")[-2:], "hydra"]
        return ("sentence" if any(name in said for name in names) else "wrong"), said
    except BaseException as error:  # noqa: BLE001 (whatever it is, nobody told it in a sentence)
        return "bare", f"{type(error).__name__}: {error}"
    return ("wrong" if means_nothing(setting) else "right"), "accepted"


@pytest.fixture(scope="session")
def everything() -> dict[str, list[Setting]]:
    return settings()


@pytest.fixture(scope="session")
def sample(everything: dict[str, list[Setting]]) -> list[Setting]:
    """A few settings of all, the same ones at every run."""
    return random.Random(0).sample([s for found in everything.values() for s in found], SAMPLE)


@pytest.mark.parametrize("number", range(SAMPLE))
def test_a_sample_of_settings(number, sample, main_in, files, tmp_path, capsys, tally) -> None:
    kind, said = answer(sample[number], main_in, files, tmp_path, capsys)
    tally("options", kind)
    assert kind in ("right", "sentence"), f"{sample[number].typed}\n{kind}: {said}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("choice", ["", *CHOICES])
def test_every_setting(choice, everything, main_in, files, tmp_path, capsys, tally) -> None:
    faults = []
    for setting in everything[choice]:
        kind, said = answer(setting, main_in, files, tmp_path, capsys)
        tally("options", kind)
        if kind not in ("right", "sentence"):
            faults.append(f"{setting.typed}\n    {kind}: {said}")
    assert not faults, "\n".join(faults)
