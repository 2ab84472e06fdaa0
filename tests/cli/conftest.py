"""The real command, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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
