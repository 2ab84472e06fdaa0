from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd

from fusion.study import summarise
from fusion.study.summarise import Summary


def page(summary: Summary) -> str:
    return next(file for file in summary.files if file.name == "index.html").read_text()


def test_everything_is_written_from_the_reports_alone(summary: Summary) -> None:
    assert all(file.is_file() for file in summary.files)
    stems = {file.name.removeprefix("study_").removesuffix(".pdf") for file in summary.files}
    assert {
        "study.csv", "study.md", "index.html",
        "finetuned_accuracy", "finetuned_f1", "training_seconds", "peak_bytes",
        "accuracy_change", "f1_change", "time_saving", "memory_saving", "share", "pareto",
    } <= stems  # fmt: skip
    assert len(pd.read_csv(summary.files[0])) == 7


def test_the_page_needs_no_network_and_its_figures_are_whole(summary: Summary) -> None:
    text = page(summary)
    assert not re.findall(r'(?:src|href)="https?:', text)
    assert "fusion_bench experiment=&lt;study&gt;" in text
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 10
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', figure)) for figure in figures]
    assert len(set.union(*clips)) == sum(map(len, clips))  # no figure is cut by another's frame
    for figure in figures:
        ElementTree.fromstring(figure)


def test_what_is_missing_is_said(summary: Summary) -> None:
    assert summary.failed == ("9",)
    assert "missing: 9: UserError: lr: <too high>" in summary.text
    assert "lr: &lt;too high&gt;" in page(summary)


def test_a_sweep_in_which_all_failed_has_a_table(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").write_text(json.dumps({"kind": "E", "message": "m"}))
    assert "0 of 1 runs finished" in summarise(tmp_path).text
    assert (tmp_path / "study.csv").is_file()


def test_any_sweep_is_good_enough_and_gives_the_same_page_twice(leave) -> None:
    leave(job=0, untuned=0.9)
    folder = leave(job=1, untuned=0.91, seed=1)
    assert page(summarise(folder)) == page(summarise(folder))


def test_it_costs_no_torch() -> None:
    code = "import sys, fusion.study; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
