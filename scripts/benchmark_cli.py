"""Measure how soon the command answers, beside what importing Hydra alone costs in the same run.

    python scripts/benchmark_cli.py --rounds 15

The cases take turns, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "fusion_bench")
REFERENCE = "python -c 'import hydra'"
CASES = {
    REFERENCE: [sys.executable, "-c", "import hydra"],
    "fusion_bench --help": [COMMAND, "--help"],
    "fusion_bench --version": [COMMAND, "--version"],
    "fusion_bench … --cfg job": [COMMAND, "modelpool=digits", "--cfg", "job"],
    "an unknown option": [COMMAND, "modelpool=digits", "sed=3"],
    "an unknown choice": [COMMAND, "modelpool=digit"],
}


def seconds(command: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each case is timed")
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, command in CASES.items():
                took = seconds(command, folder)
                if number:  # the first round warms the file cache
                    times[name].append(took)
    reference = statistics.median(times[REFERENCE])
    width = max(map(len, CASES))
    print(f"{'':{width}}  median     least   ratio of the medians")
    for name, measured in times.items():
        median = statistics.median(measured)
        ratio = median / reference
        print(f"{name:{width}}  {median:5.3f} s  {min(measured):5.3f} s  {ratio:5.2f}")


if __name__ == "__main__":
    main()
