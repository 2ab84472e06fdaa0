"""What keeping freed memory saves: the same forward passes with and without it.

    python scripts/benchmark_freed_memory.py

Each measurement is a fresh process, since an allocator cannot be set back: a network of CIFAR's
kind answers 2,000 images in batches, in inference mode. Printed are the medians over several runs
of the wall time with the allocator as it comes and as every run of this package sets it
(`fusion.cli.freed_memory`), and their ratio. Another C library than GNU's shows a ratio of 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def measure(batch_size: int, threads: int, *, kept: bool) -> float:
    """Return the seconds that 2,000 images take in this process."""
    import torch

    from fusion.cli.freed_memory import keep_freed_memory
    from fusion.models import CifarResNet

    if kept:
        keep_freed_memory()
    torch.set_num_threads(threads)
    network = CifarResNet(depth=8, num_classes=10, in_channels=1).eval()
    images = torch.randn(2000, 1, 28, 28)
    with torch.inference_mode():
        network(images[:batch_size])
        start = time.perf_counter()
        for batch in images.split(batch_size):
            network(batch)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what the fresh processes do
    arguments = parser.parse_args()
    if arguments.measure:
        batch_size, kept = json.loads(arguments.measure)
        print(measure(batch_size, arguments.threads, kept=kept))
        return
    print("batch  as it comes, s  kept, s  ratio")
    for batch_size in (32, 128, 500):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(arguments.repeats):
            for kept, found in seconds.items():
                command = [sys.executable, __file__, "--threads", str(arguments.threads)]
                command += ["--measure", json.dumps([batch_size, kept])]
                found.append(float(subprocess.check_output(command, text=True)))
        plain, kept_seconds = (statistics.median(seconds[kept]) for kept in (False, True))
        print(f"{batch_size:5}  {plain:14.2f}  {kept_seconds:7.2f}  {plain / kept_seconds:5.2f}")


if __name__ == "__main__":
    main()
