"""Every YAML that is shipped is composed and bound to the signatures of what it names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from fusion.cli.job import register_resolvers
from fusion.config_folder import config_folder
from fusion.target import build, check_options, is_target, locate

CHOICES = sorted(
    f"{file.parent.relative_to(config_folder())}={file.stem}"
    for file in config_folder().rglob("*.yaml")
    if file.parent != config_folder()
)
MIRRORED = [choice for choice in CHOICES if choice.startswith(("method=", "finetune="))]
DEMANDED = {"setting=cifar10_split_text": ["path.class_vectors=texts.safetensors"]}
WORDS = ("_target_", "_recursive_", "_args_", "_partial_")


@pytest.fixture
def composed() -> Iterator[Any]:
    """Compose the primary configuration with some choices, and resolve it."""
    register_resolvers()
    GlobalHydra.instance().clear()

    def make(*overrides: str) -> dict[str, Any]:
        pools = ("modelpool=", "setting=")  # what chooses a pool
        given = [] if any(o.startswith(pools) for o in overrides) else ["modelpool=digits"]
        given += [value for o in overrides for value in DEMANDED.get(o, [])]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose(
                "fusion_bench", overrides=[*given, *overrides], return_hydra_config=True
            )
        with open_dict(config):
            config.hydra.runtime.output_dir = "folder"
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        assert isinstance(values, dict)
        return values

    yield make
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def targets(node: object) -> Iterator[Mapping[str, Any]]:
    if is_target(node):
        yield node
    children = (
        node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    )
    for child in children:
        yield from targets(child)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_binds_to_its_targets_signature(composed, choice) -> None:
    values = composed(choice)
    found = [spec for spec in targets(values) if spec["_target_"] != "???"]
    assert found
    for spec in found:
        path = spec["_target_"]
        if path.startswith("wandb."):  # an extra that the tests do not install
            pytest.importorskip("wandb")
        options = {key: given(value) for key, value in spec.items() if key not in WORDS}
        known = {key: value for key, value in options.items() if value != "???"}
        to_fill_in = len(known) < len(options)
        check_options(locate(path), path, spec.get("_args_", ()), known, partial=to_fill_in)


def given(value: object) -> object:
    """What a class is given: an empty mapping is nobody's (no loggers, no fine-tuning)."""
    return None if value == {} else value


def raw(choice: str) -> dict[str, Any]:
    group, _, name = choice.partition("=")
    values = OmegaConf.to_container(OmegaConf.load(Path(config_folder()) / group / f"{name}.yaml"))
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("choice", MIRRORED)
def test_the_yaml_mirrors_the_signature_line_by_line(choice) -> None:
    compared: list[object] = []  # with what the class around it makes for itself
    for values in targets(raw(choice)):
        if values["_target_"] == "???":
            continue
        parameters = inspect.signature(locate(values["_target_"])).parameters
        written = {key: value for key, value in values.items() if key not in WORDS}
        assert [name for name in parameters if name in written] == list(written)
        if choice.startswith("method="):
            assert list(parameters) == list(written)
        for name, value in written.items():
            default = parameters[name].default
            if "${" in str(value) or default is inspect.Parameter.empty:
                continue
            if any(values is other for other in compared):
                continue
            if is_target(value):  # a rule inside a rule
                compared.append(value)
                default = getattr(locate(values["_target_"])(), name)
            shipped = build(value) if is_target(value) else value
            shipped = tuple(shipped) if isinstance(default, tuple) else shipped
            assert choice.startswith("finetune=") or shipped == default, name


@pytest.mark.parametrize("choice", [c for c in MIRRORED if c.startswith("method=")])
def test_every_option_is_explained_beside_it(choice) -> None:
    group, _, name = choice.partition("=")
    text = (Path(config_folder()) / group / f"{name}.yaml").read_text(encoding="utf-8")
    for key in options_in(raw(choice)):
        lines = [line.strip() for line in text.splitlines()]
        found = [line for line in lines if line.startswith(f"{key}:")]
        assert found
        assert all(" # " in line for line in found), found


def options_in(node: Mapping[str, Any]) -> Iterator[str]:
    """The names of the options, and of those of a rule inside."""
    for key, value in node.items():
        if isinstance(value, Mapping) and "_target_" in value:
            yield from options_in(value)
        elif key not in WORDS and key != "defaults":
            yield key


def test_the_defaults_are_to_evaluate_the_base(composed) -> None:
    values = composed()
    assert values["method"]["_target_"] == "fusion.method.DummyAlgorithm"
    assert values.get("taskpool") is None
    assert values["seed"] == 0
    assert not values["fast_dev_run"]
    assert not values["overwrite"]


def test_a_key_of_the_run_reaches_everything_below_it(composed) -> None:
    values = composed("fast_dev_run=true", "seed=7", "path.cache_dir=/c", "taskpool=digits")
    members = values["modelpool"]["models"].values()
    assert {member["fast_dev_run"] for member in members} == {True}
    assert {member["seed"] for member in members} == {7}
    assert {member["cache_dir"] for member in members} == {"/c"}
    assert values["taskpool"]["fast_dev_run"]


def test_places_are_taken_from_the_environment(composed, monkeypatch) -> None:
    monkeypatch.delenv("FUSION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("FUSION_DATA", "/d")
    paths = composed()["path"]
    assert paths["cache_dir"] == "/x/fusion"
    assert paths["data_dir"] == "/d"
    monkeypatch.setenv("FUSION_CACHE", "/mine")
    assert composed()["path"]["cache_dir"] == "/mine"


SETTINGS = [choice for choice in CHOICES if choice.startswith("setting=")]


@pytest.mark.parametrize("choice", SETTINGS)
def test_a_setting_names_itself_and_its_tasks_are_those_of_its_experts(composed, choice) -> None:
    values = composed(choice)
    assert values["setting"] == choice.partition("=")[2]
    assert values["setting_title"]
    pool, tasks = values["modelpool"], values["taskpool"]
    experts = [name for name in pool["models"] if not name.startswith("_")]
    kept, measured = pool.get("only") or experts, tasks.get("only") or list(tasks["tasks"])
    assert set(kept) <= set(experts)
    assert measured == kept or not set(measured) & set(experts)  # experts of the same classes


@pytest.mark.parametrize("pool", ["digits_tasks", "digits_pair", "digits_split", "glyphs_tasks"])
def test_one_override_changes_the_architecture_of_all_members(composed, pool) -> None:
    models = composed(f"modelpool={pool}")["modelpool"]["models"]
    first = next(iter(models))
    place = f"modelpool.models.{first}.architecture"
    values = composed(f"modelpool={pool}", f"{place}.norm=group", f"{place}.depth=14")
    changed = values["modelpool"]["models"]
    for name, member in changed.items():
        assert member["architecture"] == {
            **models[name]["architecture"],
            "norm": "group",
            "depth": 14,
        }
