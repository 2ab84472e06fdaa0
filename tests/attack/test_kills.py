"""A run that is killed at one of its file operations leaves an earlier run whole, and is run again.

The process is forked with everything imported; an audit hook counts what it does to files inside of
the run folder (open for writing, rename, remove, make and remove folders), and ends it at one of
these operations as ``kill -9`` would.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion.cli.main import main
from fusion.run_folder import finished_report

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
KILLED = 86


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cache of members, a finished run, and the one that is to replace it."""
    place = tmp_path_factory.mktemp("kills")
    assert run(place / "first", place, 1.0) == 0
    assert run(place / "second", place, 0.3) == 0
    assert layers(place / "first") != layers(place / "second")
    return place


def layers(folder: Path) -> list[str]:
    """The layers that the whole run in a folder has merged."""
    report = finished_report(folder)
    assert report is not None, "no whole run is left"
    return report["algorithm"]["selected_layers"]


def run(folder: Path, place: Path, top_p: float, *, kill_at: int | None = None) -> int:
    """Merge in a process of its own; return its exit code."""
    command = [
        "method=snr_selective_merge",
        f"method.top_p={top_p}",
        "method.plot=false",
        "modelpool=digits",
        "taskpool=digits",
        "fast_dev_run=true",
        "overwrite=true",
        f"output_path={folder}",
        f"path.cache_dir={place / 'cache'}",
    ]
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if kill_at is not None:
            sys.addaudithook(killer(str(folder), kill_at))
        main(command)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        os._exit(code)


def killer(folder: str, kill_at: int) -> Callable[[str, tuple[object, ...]], None]:
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not any(folder in str(argument) for argument in arguments):
            return
        if event == "open" and not (
            isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
        ):
            return
        seen += 1
        if seen == kill_at:
            os._exit(KILLED)

    return hook


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock", ".lock.json"}


def check_kill(place: Path, folder: Path, number: int) -> bool:
    """Kill a run at one operation and start it anew; return whether it was killed at all."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "first", folder)
    code = run(folder, place, 0.3, kill_at=number)
    assert code in (0, KILLED)
    assert layers(folder) in (layers(place / "first"), layers(place / "second"))
    assert run(folder, place, 0.3) == 0
    assert layers(folder) == layers(place / "second")
    assert names(folder) == names(place / "second")
    return code == KILLED


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_every_operation_harms_nothing(place: Path, tmp_path: Path) -> None:
    number = int(os.environ.get("FUSION_FIRST_KILL", "1"))  # to go on where it was stopped
    while check_kill(place, tmp_path / "run", number):
        number += 1
    assert number > 30  # so many operations there were
