"""The code of the manual: pages of methods, commands, the task pool that a reader writes."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fusion.cli.job import register_resolvers
from fusion.config_folder import config_folder
from fusion.method.presets import method_names, preset
from fusion.models import CifarResNet
from fusion.target import build

DOCS = Path(__file__).parent.parent / "docs"


sys.path.append(str(DOCS / "_extensions"))  # as docs/conf.py does: they import each other


def extension(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "_extensions" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = extension("method_pages")


@pytest.mark.parametrize("name", method_names())
def test_a_page_has_the_options_that_the_method_has(name) -> None:
    file = config_folder() / "method" / f"{name}.yaml"

    def scalars(node: object, path: str) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key != "defaults" and (key != "_target_" or value == "???"):
                    yield from scalars(value, f"{path}.{key}")
        else:
            yield path

    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    listed = [option for option, _, about in PAGES.described(file.read_text(encoding="utf-8"))]
    assert listed == list(scalars(written, "method"))
    page = PAGES.page(name)
    assert all(f"``{option}``" in page for option in listed)
    target = (preset(name).get("rule") or preset(name))["_target_"]
    assert target == "???" or f".. autoclass:: {target}" in page


def test_a_measured_row_stands_on_the_page_of_its_method() -> None:
    tables = list(PAGES.measured_tables())
    titles = {table.title for table in tables}
    assert {
        "Results of the benchmark",
        "digits_tasks_4",
        "glyphs_8",
        "cifar10_tasks_5_cpu",
    } <= titles
    assert all(table.command.split()[0] in ("python", "fusion_bench") for table in tables)
    pages = {name: PAGES.page(name) for name in method_names()}
    shown = 0
    for table in tables:
        assert all(len(row) == len(table.heads) for row in table.rows)
        for row in table.rows:
            first = re.match(r"`?(\w+)", row[0])[1]
            owners = [name for name in pages if row in table.of(name)]
            assert owners == ([first] if first in pages else []), row
            for name in owners:
                cells = "\n".join(f"     - {cell}".rstrip() for cell in row[1:])
                assert cells in pages[name]
                assert table.command in pages[name]
                shown += 1
    assert shown > 40


def test_a_page_is_written_only_where_it_changed(tmp_path: Path) -> None:
    PAGES.write_pages(tmp_path)
    assert {file.stem for file in tmp_path.glob("*.rst")} == {"index", *method_names()}
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    (tmp_path / "of_an_older_version.rst").touch()
    (tmp_path / "ties_merging.rst").write_text("stale")
    PAGES.write_pages(tmp_path)
    after = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert {file.stem for file in after if before.get(file) != after[file]} == {"ties_merging"}
    assert before.keys() == after.keys()


def commands() -> list[str]:
    """Return the commands of the manual that choose a method, each once."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(DOCS.rglob("*.md"))]
    texts += [PAGES.page(name) for name in method_names()]
    found = []
    for text in texts:
        for line in re.findall(r"^ *fusion_bench (.*)$", text.replace("\\\n", " "), re.MULTILINE):
            usable = not any(word in line for word in ("…", "error", "--help", "my_conf"))
            if usable and "method=" in line:
                found.append(line)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands())
def test_a_command_names_only_what_there_is(line) -> None:
    words = [word for word in shlex.split(line, comments=True) if word != "-m"]
    first = [re.sub(r"^([\w./]+=[^\[{,]*),.*$", r"\1", word) for word in words]  # of a sweep
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("fusion_bench", overrides=first)
    assert config.method._target_


def test_the_task_pool_of_the_manual_measures(tmp_path: Path, monkeypatch) -> None:
    text = (DOCS / "howto" / "task_pool.md").read_text(encoding="utf-8")
    code, settings = (
        re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "yaml")
    )
    (tmp_path / "robustness.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        tasks = build(yaml.safe_load(settings))
        found = tasks.evaluate(CifarResNet(8, in_channels=1))
    finally:
        sys.modules.pop("robustness", None)
    assert list(found) == ["noise 0.1", "noise 0.2", "noise 0.4"]
    assert all(0 <= metrics["accuracy"] <= 1 for metrics in found.values())
