"""The shell completes groups, choices and options, as the manual says how."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
# What bash does when TAB is pressed after $1: the function that is registered for the command.
PRESS = """
PATH="$0:$PATH"
eval "$(fusion_bench --shell-completion install=bash)"
complete -p fusion_bench > /dev/null || exit 1
COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}
COMP_WORDS=($1); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
hydra_bash_completion
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("modelp", {"modelpool="}),
        ("method=ti", {"method=ties_merging"}),
        (
            "modelpool=digits_tasks method=ties_merging method.rule.d",
            {"method.rule.density="},
        ),
    ],
)
def test_bash_completes_it(line, expected, tmp_path) -> None:
    folder = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", "-c", PRESS, folder, f"fusion_bench {line}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {word.strip() for word in done.stdout.split()} == expected


def test_the_manual_says_how(command) -> None:
    text = (DOCS / "start.md").read_text(encoding="utf-8")
    for shell in ("bash", "zsh", "fish"):
        assert f"fusion_bench --shell-completion install={shell}" in text
        done = command("--shell-completion", f"install={shell}")
        assert (done.code, done.err) == (0, "")
        assert "fusion_bench" in done.out
        assert "torch" not in done.imported
