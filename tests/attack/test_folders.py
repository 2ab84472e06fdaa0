"""A run folder that somebody else made is data: it is read, compared and shown, never obeyed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.cli.sweep import already_finished
from fusion.errors import UserError
from fusion.run_folder import RunFolder, finished_report, recover
from fusion.study import summarise
from fusion.study.runs import read_runs
from fusion.study.table import run_table

CONFIG = "seed: 0\nmethod:\n  _target_: os.system\n  command: touch canary\noverwrite: false\n"
OUTSIDE = ["../precious", "{root}/precious", "sub/../../precious", "link/precious", ".."]


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside a file that nobody may touch, with a link that leads out of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    return folder


def named(outside: str, root: Path) -> str:
    return outside.replace("{root}", str(root))


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_run_that_moves_in_changes_nothing_outside(theirs, outside, attack) -> None:
    ready = theirs / ".ready-x"
    ready.mkdir()
    (ready / ".replaces.json").write_text(json.dumps([named(outside, theirs.parent)]))
    (ready / "report.json").write_text("{}")
    with attack("folders", "sentence"), pytest.raises(UserError, match="outside of its folder"):
        recover(theirs)
    assert (theirs.parent / "precious").read_text() == "mine"


def test_no_file_moves_out_through_a_link(theirs, attack) -> None:
    (theirs / ".ready-x" / "link").mkdir(parents=True)
    (theirs / ".ready-x" / "link" / "precious").write_text("theirs")
    (theirs / ".ready-x" / ".replaces.json").write_text("[]")
    with attack("folders", "sentence"), pytest.raises(UserError, match="outside of its folder"):
        summarise(theirs)
    assert (theirs.parent / "precious").read_text() == "mine"


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_report_that_names_files_outside_makes_nothing_of_them(theirs, outside, attack) -> None:
    name = named(outside, theirs.parent)
    (theirs / "report.json").write_text(json.dumps({"files": {name: {"bytes": 4, "sha256": ""}}}))
    with attack("folders", "right"):
        assert finished_report(theirs) is None
        with RunFolder(theirs, overwrite=True).writing() as working:
            (working / "report.json").write_text("{}")
        assert (theirs.parent / "precious").read_text() == "mine"


def test_resuming_builds_nothing_that_a_folder_says(theirs, attack) -> None:
    (theirs / "config.yaml").write_text(CONFIG)
    (theirs / "report.json").write_text('{"files": {}}')
    with attack("folders", "sentence"), pytest.raises(UserError, match="job with other options"):
        already_finished(theirs, CONFIG.replace("os.system", "mine.Method"), overwrite=False)
    (theirs / "config.yaml").write_bytes(b"\xff: [" + b"&a [*a]" * 9)
    with attack("folders", "sentence"), pytest.raises(UserError, match="job with other options"):
        already_finished(theirs, CONFIG, overwrite=False)
    assert not Path("canary").exists()


def test_a_summary_builds_nothing_and_shows_text_as_text(theirs, attack) -> None:
    script = "<script>alert(1)</script>"
    spec = {"_target_": "os.system", "command": "touch canary"}
    told = {
        "choices": {"method": script, "overrides": [script], "job": 0},
        "options": {"method": {"top_p": spec, "rank_by": script}},
        "method": script,
        "evaluation": {"merged": {script: {"accuracy": 0.5, "images": 3}}},
        "environment": {"device": script},
    }
    (theirs / "config.yaml").write_text(CONFIG)
    (theirs / "report.json").write_text(json.dumps(told))
    (theirs / "command.txt").write_text(script)
    with attack("folders", "right"):
        summarise(theirs)
        assert script not in (theirs / "index.html").read_text()
        assert not Path("canary").exists()


@pytest.mark.parametrize("value", [None, True, 3, 1e400, "x", [], ["x"], {}, {"x": "x"}], ids=str)
@pytest.mark.parametrize(
    "key",
    ["choices", "options", "evaluation", "algorithm", "finetune", "seconds", "seed", "method"]
    + ["controls", "environment"]
    + [f"choices.{key}" for key in ("job", "method", "modelpool", "overrides")]
    + [f"finetune.{key}" for key in ("seconds", "strategy", "same_as", "peak_bytes", "memory")]
    + [f"algorithm.{key}" for key in ("selected_layers", "consistency", "candidate_layers")]
    + ["algorithm.alignment", "algorithm.batch_norm", "options.method", "evaluation.merged"],
)
def test_a_report_of_other_kinds_is_read_or_refused(theirs, key, value, tally) -> None:
    group, _, name = key.partition(".")
    (theirs / "report.json").write_text(json.dumps({group: {name: value} if name else value}))
    refused = ""
    try:
        run_table(read_runs(theirs))
    except UserError as error:
        refused = str(error)
    tally("folders", "sentence" if refused else "right")
    assert not refused or refused.startswith(f"'{theirs}/report.json': {group}")
