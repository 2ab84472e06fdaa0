"""What a benchmark leaves in its folder, and what its command ends with."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fusion.cli.sweep import summarise_and_tell
from fusion.study import summarise
from fusion.study.summarise import Summary

from .conftest import Sweep, small_benchmark


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Two settings, summarised once for all who only look."""
    sweep = small_benchmark(
        Sweep(tmp_path_factory.mktemp("benchmark")), settings=("a", "b<c>"), seeds=2
    )
    for seed in range(2):
        sweep.error("wudi", seed, "NotApplicableError", "WUDI needs a base", setting="b<c>")
    sweep.error("dare", 0, "RuntimeError", "no <memory>")
    (sweep.folder / "command.txt").write_text("fusion_bench experiment=benchmark\n")
    return summarise(sweep.folder)


def page(summary: Summary) -> str:
    return next(file for file in summary.files if file.name == "index.html").read_text()


def test_the_benchmarks_files_stand_in_place_of_the_studys(summary: Summary) -> None:
    assert all(file.is_file() for file in summary.files)
    names = {file.name for file in summary.files}
    assert {"benchmark.csv", "benchmark.md", "index.html"} <= names
    assert {
        f"benchmark_{stem}.{kind}"
        for stem in ("heatmap", "ranks", "multiply_adds", "data", "scores_a")
        for kind in ("png", "pdf")
    } <= names
    assert "study.csv" not in names
    text = next(file for file in summary.files if file.name == "benchmark.md").read_text()
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    assert sum(line.startswith("| task_arithmetic |") for line in rows) == 1 + 2  # all, and each


def test_what_does_not_apply_is_counted_apart(summary: Summary) -> None:
    assert summary.failed == ("a/dare/seed_0",)
    assert "32 of 35 runs finished, 2 not applicable" in summary.text
    assert "not applicable: b<c>/wudi/seed_0, b<c>/wudi/seed_1: WUDI needs a base" in summary.text
    assert "missing: a/dare/seed_0: RuntimeError: no <memory>" in summary.text
    assert "Not applicable, of 35 runs: 2." in page(summary)
    assert "no &lt;memory&gt;" in page(summary)


def test_the_page_needs_no_network_and_its_figures_are_whole(summary: Summary) -> None:
    text = page(summary)
    assert not re.findall(r'(?:src|href)="https?:', text)
    assert not re.findall(r"<script[^>]+src|<link", text)
    assert "b<c>" not in text
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 6
    for figure in figures:
        ElementTree.fromstring(figure)


def test_every_row_has_all_columns_and_what_the_filters_ask(summary: Summary) -> None:
    text = page(summary)
    text = text[text.index('<table id="conditions">') :]
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    rows = re.findall(r"<tr.*?</tr>", body, flags=re.DOTALL)
    heads = text[text.index("<thead>") : text.index("</thead>")].count("<th ")
    assert {row.count("<td") for row in rows} == {heads}
    text = page(summary)
    for name in re.findall(r'<select name="(\w+)"', text):
        choices = text[text.index(f'name="{name}"') :]
        choices = choices[: choices.index("</select>")]
        values = {value for row in rows for value in re.findall(f'data-{name}="([^"]*)"', row)}
        assert values == {*re.findall(r"<option>([^<]*)</option>", choices)}
        assert all(f"data-{name}=" in row for row in rows)


def test_the_command_fails_for_failures_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.methods("slerp", 0, {"merged": 0.8})
    sweep.error("wudi", 0, "NotApplicableError", "WUDI needs a base")
    summarise_and_tell(tmp_path)  # returns: exit code 0
    sweep.error("dare", 0, "RuntimeError", "no memory")
    with pytest.raises(SystemExit) as left:
        summarise_and_tell(tmp_path)
    assert left.value.code == 2  # the made-up record says it was a mistake


def test_a_first_run_has_a_summary(tmp_path: Path) -> None:
    Sweep(tmp_path).methods("slerp", 0, {"merged": 0.8})
    assert "1 of 1 runs finished" in summarise(tmp_path).text
    assert "Not measured." in (tmp_path / "index.html").read_text()
