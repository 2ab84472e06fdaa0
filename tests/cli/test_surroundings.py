"""Signals, streams, locales and devices: a run ends well or says in a line why it does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).parent / "fusion_bench")
RUN = ("modelpool=digits", "fast_dev_run=true", "fabric.accelerator=cpu", "output_path=run")
SLEEPER = """
import time
from pathlib import Path
from fusion import BaseAlgorithm

class Sleeper(BaseAlgorithm):
    def run(self, modelpool):
        Path("started").touch()
        time.sleep(100)
"""


def started(*arguments: str, cwd: Path, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([COMMAND, *arguments], cwd=cwd, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "terminated"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_in_a_line_and_leaves_nothing(
    tmp_path, cache, number, code, said
) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    run = started(
        *RUN,
        "method=custom",
        "method._target_=sleeper.Sleeper",
        cwd=tmp_path,
        env=os.environ | {"FUSION_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "started").exists():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert err.decode().splitlines()[-1] == f"fusion_bench: {said}"
    assert b"Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_reader_that_goes_is_no_error(tmp_path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = started("--help", cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0
    assert err == b""


@pytest.mark.parametrize("closed", ["1", "2"])
@pytest.mark.slow
def test_a_stream_that_is_closed_loses_no_run(tmp_path, cache, closed) -> None:
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" "$@" {closed}>&-', COMMAND, *RUN],
        cwd=tmp_path,
        env=os.environ | {"FUSION_CACHE": str(cache)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "report.json").is_file()


def test_an_ascii_terminal_gets_every_word(tmp_path) -> None:
    (tmp_path / "report.json").write_text(
        json.dumps({"choices": {"job": 0}, "evaluation": {"merged": {"digits": {"accuracy": 0.5}}}})
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = started(
        f"summarize={tmp_path}",
        cwd=tmp_path,
        env=os.environ | ascii_only,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, b"")
    assert "–" in out.decode("utf-8")  # where nothing was trained


@pytest.mark.parametrize(
    "option",
    [
        pytest.param("devices=auto", marks=pytest.mark.slow),
        "devices='1'",
        pytest.param("strategy=ddp_spawn", marks=pytest.mark.slow),
    ],
)
def test_one_process_however_it_is_asked_for(main_in, tmp_path, option) -> None:
    main_in(*RUN, f"fabric.{option}")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["environment"]["processes"] == 1
