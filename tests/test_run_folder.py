"""A run's files appear together or not at all, and never at the cost of another's."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion import run_folder
from fusion.errors import UserError
from fusion.files import write_text
from fusion.run_folder import RunFolder, finished_report, recover, save_report


def write_run(working: Path, **files: str) -> None:
    for name, text in {"merged.safetensors": "model", "config.yaml": "seed: 0\n", **files}.items():
        (working / name).parent.mkdir(parents=True, exist_ok=True)
        (working / name).write_text(text)
    save_report(working, {"ran": sorted(files)})


def do_run(path: Path, *, overwrite: bool = False, **files: str) -> None:
    folder = RunFolder(path, overwrite=overwrite)
    folder.check()
    with folder.writing() as working:
        write_run(working, **files)


def visible(path: Path) -> list[str]:
    """The files that a user sees."""
    files = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    return sorted(f.as_posix() for f in files if not any(p.startswith(".") for p in f.parts))


def test_everything_lands_in_the_folder_and_nothing_else(tmp_path) -> None:
    do_run(tmp_path / "run", **{"layers.csv": "a\n", "logs/metrics.csv": "b\n"})
    assert visible(tmp_path / "run") == [
        "config.yaml", "layers.csv", "logs/metrics.csv", "merged.safetensors", "report.json"
    ]  # fmt: skip
    assert finished_report(tmp_path / "run") is not None


def test_a_report_holds_plain_values(tmp_path) -> None:
    save_report(tmp_path, {"n": np.float32(0.5), "tensor": torch.tensor(2), "path": tmp_path})
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["n"], found["tensor"], found["path"]) == (0.5, 2, str(tmp_path))
    with pytest.raises(TypeError, match="plain values, not object"):
        save_report(tmp_path, {"x": object()})


def test_the_report_and_the_model_can_go_elsewhere(tmp_path, caplog) -> None:
    folder = RunFolder(
        tmp_path / "run",
        report_path=tmp_path / "r" / "r.json",
        model_path=tmp_path / "m" / "m.safetensors",
    )
    folder.check()
    assert list(tmp_path.iterdir()) == []  # a check makes nothing
    with folder.writing() as working:
        write_run(working)
    with caplog.at_level(logging.INFO, "fusion"):
        folder.log_contents()
    assert visible(tmp_path) == ["m/m.safetensors", "r/r.json", "run/config.yaml"]
    assert folder.load_report()["ran"] == []
    assert "r.json" in caplog.text
    assert "m.safetensors" in caplog.text


def test_a_finished_run_is_replaced_whole_and_only_when_asked(tmp_path) -> None:
    do_run(tmp_path, **{"old.csv": "old"})
    (tmp_path / "mine.txt").write_text("a user's own")
    with pytest.raises(UserError, match=r"holds a finished run; .*overwrite=true"):
        RunFolder(tmp_path).check()
    do_run(tmp_path, overwrite=True, **{"new.csv": "new"})
    assert visible(tmp_path) == [
        "config.yaml", "merged.safetensors", "mine.txt", "new.csv", "report.json"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["config.yaml", "merged.safetensors", "notes.txt"])
def test_a_users_own_files_are_not_written_over(tmp_path, name) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"is not empty \(it has {name}\)"):
        RunFolder(tmp_path).check()
    assert (tmp_path / name).read_text() == "mine"


def test_tables_go_neither_into_another_run_nor_past_this_one(tmp_path) -> None:
    do_run(tmp_path / "old")
    folder = RunFolder(tmp_path / "new")
    with pytest.raises(UserError, match=r"method\.output_path: .*old' holds another run; choose"):
        folder.check(tables=tmp_path / "old")
    with pytest.raises(UserError, match=r"method\.output_path: .* is this run's own folder"):
        folder.check(tables=tmp_path / "old" / ".." / "new")
    folder.check(tables=tmp_path / "tables")


def test_a_run_that_fails_leaves_the_old_one_whole(tmp_path) -> None:
    do_run(tmp_path, **{"old.csv": "old"})
    before = {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)}
    folder = RunFolder(tmp_path, overwrite=True)
    folder.check()

    def fail() -> None:
        with folder.writing() as working:
            (working / "new.csv").write_text("new")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)} == before


def test_a_finished_merge_is_kept_though_its_evaluation_fails(tmp_path, caplog) -> None:
    folder = RunFolder(tmp_path)

    def fail() -> None:
        with folder.writing() as working:
            (working / "merged.safetensors").write_text("hours of work")
            raise RuntimeError("the evaluation failed")

    with pytest.raises(RuntimeError, match="the evaluation failed"):
        fail()
    assert (tmp_path / "unfinished" / "merged.safetensors").read_text() == "hours of work"
    assert finished_report(tmp_path) is None
    assert "are kept in" in caplog.text
    do_run(tmp_path)  # the next run may use the folder, and replaces what was left
    assert visible(tmp_path) == ["config.yaml", "merged.safetensors", "report.json"]


def test_two_runs_never_share_a_folder(tmp_path) -> None:
    with RunFolder(tmp_path).writing():
        other = RunFolder(tmp_path, overwrite=True)
        said = r"another run is writing to .* \(process \d+ on .* since .*\); wait for it"
        with pytest.raises(UserError, match=said), other.writing():
            pass
    do_run(tmp_path)  # and when the first has ended, the folder is free


def test_a_lock_of_a_killed_process_is_no_obstacle(tmp_path) -> None:
    script = (
        "import sys, time\nfrom fusion.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).writing() as working:\n"
        "    (working / 'layers.csv').write_text('half')\n    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match=f"process {process.pid}"), RunFolder(tmp_path).writing():
        pass
    process.kill()
    process.wait()
    do_run(tmp_path)
    assert visible(tmp_path) == ["config.yaml", "merged.safetensors", "report.json"]


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_kill_while_files_move_in_is_recovered(tmp_path, monkeypatch, moment) -> None:
    """Whatever file operation is the last one: the next look finds a whole run, old or new."""
    do_run(tmp_path, **{"old.csv": "old"})
    done = 0

    class Killed(BaseException):
        pass

    def counted(real):
        def operation(self, *rest, **options):
            nonlocal done
            done += 1
            if done == moment:
                raise Killed
            return real(self, *rest, **options)

        return operation

    folder = RunFolder(tmp_path, overwrite=True)
    folder.check()

    def run() -> None:
        with folder.writing() as working:
            write_run(working, **{"new.csv": "new"})
            for name in ("rename", "replace", "unlink"):
                monkeypatch.setattr(Path, name, counted(getattr(Path, name)))

    with pytest.raises(Killed):
        run()
    monkeypatch.undo()
    for lock in tmp_path.glob(".lock*"):
        lock.unlink()  # the kernel frees what a dead process held
    recover(tmp_path)
    report = finished_report(tmp_path)
    assert report is not None
    assert report["ran"] in (["old.csv"], ["new.csv"])
    assert [name for name in visible(tmp_path) if name.endswith(".csv")] == report["ran"]


@pytest.mark.parametrize("damage", ["cut", "gone", "report", "no manifest"])
def test_a_run_with_damaged_files_is_not_finished(tmp_path, damage) -> None:
    do_run(tmp_path)
    assert finished_report(tmp_path) is not None
    if damage == "cut":
        (tmp_path / "merged.safetensors").write_text("mod")
    elif damage == "gone":
        (tmp_path / "merged.safetensors").unlink()
    elif damage == "report":
        write_text(tmp_path / "report.json", "{")
    else:
        write_text(tmp_path / "report.json", "{}")
    assert finished_report(tmp_path) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "/proc/x"}, "output_path: cannot write to the folder '/proc/x'"),
        ({"path": "p", "report_path": "/proc/x/r.json"}, "report_save_path: cannot write"),
        ({"path": "p", "model_path": "m.pt"}, "'m.pt' must end in .safetensors"),
        ({"path": "p", "report_path": "r.txt"}, "'r.txt' must end in .json"),
        ({"path": "p", "report_path": "."}, "is a folder; give the name of a file"),
        ({"path": "file"}, "output_path: 'file' is a file"),
        ({"path": "p", "model_path": "p/finetuned.safetensors"}, "another file of this run"),
        ({"path": "p", "model_path": "old/m.safetensors"}, "'old' holds another run"),
        ({"path": "p", "report_path": "there.json"}, "'there.json' is there already"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(
    tmp_path, monkeypatch, options, said
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "there.json").write_text("{}")
    do_run(tmp_path / "old")
    with pytest.raises(UserError, match=said):
        RunFolder(**options).check()


def test_the_log_is_written_in_utf8(tmp_path) -> None:
    folder = RunFolder(tmp_path)
    with folder.writing() as working:
        logging.getLogger("fusion.test").warning("0.1 → 0.2 – naïve")
        write_run(working)
    text = (tmp_path / run_folder.LOG).read_text(encoding="utf-8")
    assert "0.1 → 0.2 – naïve" in text
    assert time.strftime("[%H") in text
