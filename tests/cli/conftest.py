"""The real command: in a process of its own, or in this one where torch is paid for already."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / "fusion_bench"


@dataclass(frozen=True)
class Answer:
    """What a command left: exit code, both streams, and the modules that it imported."""

    code: int
    out: str
    err: str
    imported: frozenset[str]


def run_command(
    *arguments: str, cwd: Path, python: tuple[str, ...] = (), **environment: str
) -> Answer:
    """Run ``fusion_bench`` (or ``python`` with these arguments) as a user does."""
    command = [sys.executable, *python] if python else [str(COMMAND)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = done.stderr.splitlines(keepends=True)
    trace = [line for line in lines if line.startswith("import time:")]
    return Answer(
        done.returncode,
        done.stdout,
        "".join(line for line in lines if line not in set(trace)),
        frozenset(line.rpartition("|")[2].strip() for line in trace),
    )


@pytest.fixture(scope="session")
def command_in() -> Callable[..., Answer]:
    """The command in a process of its own and a folder that is given as ``cwd``."""
    return run_command


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Answer]:
    """The command in a process of its own and an empty folder."""

    def run(*arguments: str, **options: object) -> Answer:
        return run_command(*arguments, cwd=tmp_path, **options)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the members that were trained on one batch are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def main_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> Iterator[Callable[..., None]]:
    """The command's function in this process, in an empty folder; what it sets is set back."""
    from hydra.core.global_hydra import GlobalHydra

    from fusion.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSION_CACHE", str(cache))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["fusion_bench"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments: str) -> None:
        GlobalHydra.instance().clear()
        main(arguments)

    yield run
    GlobalHydra.instance().clear()
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
