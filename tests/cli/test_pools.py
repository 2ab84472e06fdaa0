"""Pools by name from Python are those of the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import fusion
from fusion import UserError
from fusion.cli.configuration import composed
from fusion.cli.folders import choices
from fusion.config_folder import config_folder
from fusion.data import Preprocessing


@pytest.mark.parametrize("group", ["modelpool", "taskpool"])
def test_every_pool_is_listed_with_its_summary(group) -> None:
    table = fusion.pools()
    rows = table[table["group"] == group]
    assert list(rows["name"]) == choices(group, [config_folder()])
    assert all(rows["summary"].str.endswith(".") | (rows["summary"].str.len() > 20))


def test_a_pool_by_name_is_the_one_of_the_command(main_in, tmp_path: Path, monkeypatch) -> None:
    """Both build the same members: the second finds in the cache what the first has trained."""
    common = ["fast_dev_run=true", f"path.cache_dir={tmp_path / 'members'}"]
    main_in("modelpool=digits", "taskpool=digits", "seed=3", "output_path=run", *common)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "members").rglob("*.safetensors")}
    assert len(kept) == 3
    pool = fusion.load_modelpool("digits", seed=3, overrides=common)
    tasks = fusion.load_taskpool("digits", pool=pool, overrides=common)
    model = pool.load_pretrained_model()
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "members").rglob("*.safetensors")} == kept
    found = tasks.evaluate(model, labels=pool.labels("_pretrained_"))
    report = (tmp_path / "run" / "report.json").read_text()
    assert f'"accuracy": {found["digits"]["accuracy"]}' in report


def test_the_seed_and_the_overrides_are_heard() -> None:
    def fingerprint(**options: object) -> object:
        return fusion.load_modelpool("digits_tasks", **options).entry("parity").fingerprint

    shorter = ["modelpool.models.parity.epochs=2"]
    found = [fingerprint(), fingerprint(seed=4), fingerprint(overrides=shorter)]
    assert len(set(found)) == 3
    assert fingerprint(overrides=["seed=4"]) == fingerprint(seed=4)
    assert fusion.load_taskpool("digits", overrides=["taskpool.batch_size=7"]).batch_size == 7


def test_images_follow_what_the_base_expects(monkeypatch) -> None:
    pool = fusion.load_modelpool("digits")
    expected = Preprocessing(mean=[0.5], std=[0.2], resize=36, crop=32)
    monkeypatch.setattr(type(pool), "preprocessing", expected)
    assert fusion.load_taskpool("digits", pool=pool).preprocessing is expected
    assert fusion.load_taskpool("digits").preprocessing is None


def test_a_folder_of_ones_own_is_searched_too(tmp_path: Path) -> None:
    (tmp_path / "modelpool").mkdir()
    (tmp_path / "modelpool" / "mine.yaml").write_text(
        "defaults:\n  - digits\n  - _self_\nmodels:\n  expert_a:\n    epochs: 1\n"
    )
    pool = fusion.load_modelpool("mine", config_dir=tmp_path)
    assert pool.model_names == fusion.load_modelpool("digits").model_names
    changed = ["modelpool.models.expert_a.epochs=1"]
    same = fusion.load_modelpool("digits", overrides=changed)
    assert pool.entry("expert_a").fingerprint == same.entry("expert_a").fingerprint


@pytest.mark.parametrize(
    ("call", "name", "options", "said"),
    [
        ("load_modelpool", "digit_tasks", {}, "did you mean 'digits_tasks'"),
        ("load_taskpool", "digitss", {}, "did you mean 'digits'"),
        ("load_taskpool", "null", {}, "choose one: taskpool=NAME"),
        ("load_modelpool", "folders", {}, "modelpool.models.pets.path has no value"),
        ("load_modelpool", "digits", {"overrides": ["modelpool.modls=1"]}, "did you mean 'models'"),
        ("load_modelpool", "digits", {"overrides": ["--multirun"]}, "a flag of the command"),
        ("load_modelpool", "digits", {"config_dir": "nowhere"}, "no folder 'nowhere'"),
        ("load_modelpool", "digits", {"seed": -1}, "give a whole number of 0 or more"),
        (
            "load_modelpool",
            "digits",
            {"overrides": ["modelpool._target_=builtins.dict"]},
            "not a dict",
        ),
    ],
)
def test_a_mistake_is_told_in_a_sentence(call, name, options, said) -> None:
    with pytest.raises(UserError, match=said):
        getattr(fusion, call)(name, **options)


def test_a_running_hydra_stays_as_it_is() -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert running is not None
        fusion.load_modelpool("digits")
        assert GlobalHydra.instance().hydra is running
    GlobalHydra.instance().clear()
    fusion.load_modelpool("digits")
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("setting", ["glyphs_2", "digits_split", "arch_norm_free"])
def test_a_setting_chooses_its_pools(setting: str) -> None:
    found = composed([f"setting={setting}"], ("modelpool", "taskpool"))
    assert found["modelpool"]["models"]
    assert found["taskpool"]["_target_"].endswith("ClassificationTaskPool")
