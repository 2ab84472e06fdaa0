"""A release is checked, written and tagged as a whole, or nothing is changed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEW = "9.8.7"
AUTHOR = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose version, news and script are those of the working tree."""
    folder = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{ROOT}", str(folder))
    for name in ("fusion/__init__.py", "CHANGELOG.md", "CITATION.cff", "scripts/release"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / name).chmod((ROOT / name).stat().st_mode)
    news = folder / "CHANGELOG.md"
    text = news.read_text(encoding="utf-8")
    news.write_text(text.replace("## Unreleased\n", "## Unreleased\n\n- News.\n", 1), "utf-8")
    # The wheel has a test of its own.
    for name in ("scripts/test_wheel", ".venv/bin/python"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("#!/bin/sh\nmkdir -p dist && touch dist/built\n")
        (folder / name).chmod(0o755)
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | AUTHOR,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "as it is")


def release(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scripts/release", *arguments], cwd=folder, env=os.environ | AUTHOR,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_dry_run_says_what_would_change_and_changes_nothing(clone) -> None:
    head = git(clone, "rev-parse", "HEAD")
    done = release(clone, NEW, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f'+__version__ = "{NEW}"' in done.stdout
    assert re.search(rf"^\+## {NEW} - \d{{4}}-\d\d-\d\d$", done.stdout, re.MULTILINE)
    assert f"+version: {NEW}" in done.stdout
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "rev-parse", "HEAD") == head
    assert git(clone, "tag") == ""


def test_a_release_is_one_commit_and_its_tag(clone) -> None:
    done = release(clone, NEW)
    assert done.returncode == 0, done.stderr
    assert git(clone, "tag", "--points-at", "HEAD") == f"v{NEW}\n"
    assert git(clone, "diff", "--name-only", "HEAD~1").split() == [
        "CHANGELOG.md", "CITATION.cff", "fusion/__init__.py"
    ]  # fmt: skip
    news = (clone / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"## Unreleased\n\n## {NEW} - \S+\n\n- News\.", news)
    assert re.search(
        rf"^version: {NEW}\ndate-released: \d", (clone / "CITATION.cff").read_text(), 8
    )
    assert git(clone, "status", "--porcelain") == ""
    assert "has nothing under 'Unreleased'" in release(clone, "9.9.0", "--dry-run").stderr


def test_a_wheel_that_fails_leaves_the_tree_as_it_was(clone) -> None:
    (clone / "scripts/test_wheel").write_text("#!/bin/sh\nexit 1\n")
    commit(clone)
    assert release(clone, NEW).returncode != 0
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "tag") == ""


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        assert re.search(old, text, re.DOTALL)
        (folder / name).write_text(re.sub(old, new, text, flags=re.DOTALL), encoding="utf-8")
        commit(folder)

    return change


@pytest.mark.parametrize(
    ("version", "change", "said"),
    [
        ("", lambda _: None, "'' is no version"),
        ("v1", lambda _: None, "'v1' is no version; give one such as 1.2.0"),
        (NEW, lambda folder: (folder / "new.txt").touch(), "the tree is not clean"),
        (NEW, lambda folder: git(folder, "tag", f"v{NEW}"), f"the tag v{NEW} is there already"),
        (NEW, replace("CITATION.cff", "version: .*?\n", "version: 7\n"), "CITATION.cff 7; make"),
        (NEW, replace("CHANGELOG.md", "## Unreleased.*", "## Unreleased\n"), "nothing under"),
        (NEW, replace("CHANGELOG.md", "## Unr", f"## {NEW} - x\n\n## Unr"), "has a section"),
    ],
    ids=["none", "no version", "dirty", "tagged", "two versions", "no news", "said before"],
)
def test_what_is_not_ready_is_not_released(version, change, said, clone) -> None:
    change(clone)
    done = release(clone, *([version] if version else []), "--dry-run")
    assert done.returncode == 2
    assert said in done.stderr
