"""What the README tells a reader to type does what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def example() -> str:
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^## Your own algorithm\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    return section[1]


def test_the_worked_example_runs_both_ways(example: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", example, re.DOTALL)
    (code,) = [body for kind, body in blocks if kind == "python"]
    (yaml,) = [body for kind, body in blocks if kind == "yaml"]
    (commands,) = [body for kind, body in blocks if kind == "bash"]
    (tmp_path / "average.py").write_text(code)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "average.yaml").write_text(yaml)
    lines = [line for line in commands.splitlines() if line]
    assert len(lines) == 2
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FUSION_CACHE": str(tmp_path / "cache"),
    }
    for number, line in enumerate(lines):
        folder = tmp_path / str(number)
        words = [*shlex.split(line), "fast_dev_run=true", f"output_path={folder}"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (folder / "merged.safetensors").is_file()
        assert '"method": "Average"' in (folder / "report.json").read_text()
