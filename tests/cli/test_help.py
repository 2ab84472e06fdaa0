from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import fusion
from fusion.cli.help import help_text
from fusion.config_folder import config_folder

FILES = sorted(file for file in config_folder().rglob("*.yaml") if file.parent != config_folder())


def group_of(file: Path) -> str:
    return str(file.parent.relative_to(config_folder()))


@pytest.fixture(scope="module")
def groups() -> dict[str, dict[str, str]]:
    """Group → choice → the text beside it, as the help lists them."""
    found: dict[str, dict[str, str]] = {}
    names = {group_of(file) for file in FILES}
    group = choice = None
    for line in help_text(config_folder()).splitlines():
        entry = re.match(r"  (\S+)(?:  +(.*))?$", line)
        if line in names:
            group = found.setdefault(line, {})
        elif not line or line.startswith(("Keys", "Flags")):
            group = None
        elif group is not None and entry:
            choice = entry[1]
            group[choice] = entry[2] or ""
        elif group is not None and choice:
            group[choice] += " " + line.strip()
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{group_of(f)}={f.stem}")
def test_every_choice_is_listed_with_its_description(groups, file) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert re.match(r"# \w.{10,}", first)
    assert groups[group_of(file)][file.stem] == first.removeprefix("# ")


def test_it_lists_every_key_the_flags_and_three_commands() -> None:
    text = help_text(config_folder())
    primary = (config_folder() / "fusion_bench.yaml").read_text(encoding="utf-8")
    for key, comment in re.findall(r"^(\w+): .*# (.*)$", primary, re.MULTILINE):
        assert re.search(rf"^  {key} +{re.escape(comment[:30])}", text, re.MULTILINE), key
    assert len(re.findall(r"^  fusion_bench .*modelpool=", text, re.MULTILINE)) >= 3
    for flag in ("--multirun", "--cfg", "--config-dir", "--version"):
        assert flag in text


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], ["modelpool=digits", "--help"]])
def test_it_answers_without_anything_heavy(command, tmp_path, arguments) -> None:
    answer = command(*arguments)
    assert answer.code == 0
    assert "Usage: fusion_bench" in answer.out
    assert not {"torch", "hydra", "lightning"} & answer.imported
    assert list(tmp_path.iterdir()) == []


def test_a_choice_shows_its_options(command) -> None:
    answer = command("method=snr_selective_merge", "--help")
    assert "top_p: 0.1 # share of the layers that is merged" in answer.out


def test_the_version_is_ours(command) -> None:
    for answer in (command("--version"), command("-m", "fusion", "--version", python=("-P",))):
        assert answer.out == f"fusion_bench {fusion.__version__}\n"
        assert "hydra" not in answer.imported


def test_the_configuration_is_shown_without_torch(command, tmp_path) -> None:
    answer = command("modelpool=digits", "method=snr_selective_merge", "--cfg", "job")
    assert answer.code == 0
    assert "top_p: 0.1" in answer.out
    assert "torch" not in answer.imported
    assert list(tmp_path.iterdir()) == []


def test_a_folder_named_config_does_not_shadow_ours(command, tmp_path) -> None:
    (tmp_path / "config" / "method").mkdir(parents=True)
    (tmp_path / "config" / "fusion_bench.yaml").write_text("mine: true\n")
    (tmp_path / "config" / "method" / "dummy.yaml").write_text("_target_: nowhere.Mine\n")
    answer = command("modelpool=digits", "--cfg", "job")
    assert "fusion.method.DummyAlgorithm" in answer.out
    assert "mine" not in answer.out
    assert "nowhere" not in command("--help").out


def test_config_dir_adds_to_the_groups(command, tmp_path) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    yaml = "# Mine, and good.\n_target_: my_module.Mine\nk: 7\n"
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(yaml)
    assert re.search(r"mine +Mine, and good\.", command("--config-dir", "conf", "--help").out)
    answer = command("--config-dir", "conf", "method=mine", "modelpool=digits", "--cfg", "job")
    assert "k: 7" in answer.out
    assert "_target_: fusion.modelpool.BaseModelPool" in answer.out
    wrong = command("--config-dir", "conf", "method=mine", "method.kk=1", "modelpool=digits")
    assert "method has no option 'kk'; did you mean 'k'?" in wrong.err


def test_an_installed_package_brings_its_yaml(command, tmp_path) -> None:
    """The layout that the wheel's force-include makes: fusion/config beside the modules."""
    package = Path(fusion.__file__).parent
    site = tmp_path / "site"
    shutil.copytree(package, site / "fusion", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(config_folder(), site / "fusion" / "config")
    (site / "fusion" / "config" / "method" / "only_there.yaml").write_text("# Only there.\n")
    answer = command("-m", "fusion", "--help", python=("-P",), PYTHONPATH=str(site))
    assert "only_there" in answer.out


def test_the_wheel_is_told_to_carry_the_yaml() -> None:
    import tomllib

    root = Path(fusion.__file__).parent.parent
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert wheel["targets"]["wheel"]["force-include"] == {"config": "fusion/config"}
