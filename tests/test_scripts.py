"""The scripts start, and understand the commands that the manual gives for them."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
PROGRAMS = [script for script in SCRIPTS if "__main__" in script.read_text(encoding="utf-8")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script in this process, which has paid for torch, with some arguments."""

    def start(script: Path, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")

    return start


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_starts(script, run, capsys) -> None:
    if script not in PROGRAMS:  # what other scripts import
        run(script)
        return
    with pytest.raises(SystemExit) as end:
        run(script, "--help")
    assert end.value.code == 0
    assert script.name in capsys.readouterr().out


def commands() -> list[str]:
    """Return the commands ``python scripts/NAME.py …`` of the manual and the docstrings."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *SCRIPTS]
    found = []
    for file in files:
        text = re.sub(r"\\\n\s*", "", file.read_text(encoding="utf-8"))
        found += re.findall(r"`python (scripts/[^`]+)`", text)
        found += re.findall(r"^ *python (scripts/[^`#]+?)(?:#.*)?$", text, re.MULTILINE)
    return sorted({" ".join(command.split()) for command in found})


class UnderstoodError(Exception):
    """The arguments were read."""


@pytest.mark.parametrize("command", commands())
def test_a_script_understands_the_commands_of_the_manual(command, run, monkeypatch) -> None:
    path, *arguments = shlex.split(command)
    read = argparse.ArgumentParser.parse_known_args

    def only_read(parser: argparse.ArgumentParser, *given: object) -> NoReturn:
        _, rest = read(parser, *given)
        unknown = [word for word in rest if word.startswith("-")]
        assert not unknown, unknown
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_read)
    with pytest.raises(UnderstoodError):
        run(ROOT / path, *arguments)
