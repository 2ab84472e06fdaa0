"""Time and memory of comparing task vectors: streamed, dense, and FusionBench where it is there.

    python scripts/benchmark_task_vectors.py --parameters 86e6
    python scripts/benchmark_task_vectors.py --parameters 11e6

makes a pool of experts of that size on disk (under --folder, removed afterwards), runs each way in
a process of its own, and prints wall time (interpreter start and imports excluded), CPU time, peak
resident memory, and the largest difference of a cosine from the dense one. The load average tells
whether the machine was free.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusion.modelpool import PRETRAINED, BaseModelPool, Checkpoint
from fusion.models import CifarResNet
from fusion.weights import load_safetensors, save_safetensors

UNIT = 270_000  # parameters of a ResNet-20 of width 1; they grow with the square of the width


def make_pool(folder: Path, *, experts: int, parameters: float) -> None:
    """Write a base and experts that share a third of the way, one at a time."""
    generator = torch.Generator().manual_seed(0)
    width = math.sqrt(parameters / UNIT)
    base = CifarResNet(20, width=width)
    names = [name for name, _ in base.named_parameters()]
    state = base.state_dict()
    common = {name: 1e-3 * torch.randn(state[name].shape, generator=generator) for name in names}
    save_safetensors(folder / f"{PRETRAINED}.safetensors", state, {"width": str(width)})
    for number in range(experts):
        moved = dict(state)
        for name in names:
            own = torch.randn(state[name].shape, generator=generator)
            moved[name] = state[name] + 0.7 * common[name] + 1e-3 * own
        save_safetensors(folder / f"expert_{number}.safetensors", moved, {"width": str(width)})


def pool_of(folder: Path) -> BaseModelPool:
    """Return the pool in ``folder``; nothing is read yet."""
    from fusion.weights import read_metadata

    members = {}
    for path in sorted(folder.glob("*.safetensors")):
        width = float(read_metadata(path)["width"])
        spec = {"_target_": "fusion.models.CifarResNet", "depth": 20, "width": width}
        members[path.stem] = Checkpoint(path, architecture=spec)
    return BaseModelPool(members)


def streamed(folder: Path) -> np.ndarray:
    """Ours, the whole algorithm: checks, cosines, summary, tables, the returned network."""
    from fusion.method import TaskVectorCosSimilarity

    with tempfile.TemporaryDirectory() as output:
        analysis = TaskVectorCosSimilarity(plot_heatmap=False, output_path=output)
        analysis.run(pool_of(folder))
    return analysis.similarity.to_numpy()


def dense_vectors(folder: Path) -> Tensor:
    """Return all task vectors at once, in float64: (experts, parameters)."""
    names = [name for name, _ in CifarResNet(20).named_parameters()]
    base = load_safetensors(folder / f"{PRETRAINED}.safetensors")
    start = torch.cat([base[name].flatten() for name in names])
    paths = sorted(folder.glob("expert_*.safetensors"))
    vectors = torch.empty(len(paths), len(start), dtype=torch.float64)
    for row, path in zip(vectors, paths, strict=True):
        expert = load_safetensors(path)
        row.copy_(torch.cat([expert[name].flatten() for name in names]))
        row -= start
    return vectors


def dense_pairs(folder: Path) -> np.ndarray:
    """The dense way as one writes it down: torch's cosine similarity of each pair, in float64."""
    vectors = dense_vectors(folder)
    count = len(vectors)
    cosines = torch.ones(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            cosine = torch.nn.functional.cosine_similarity(vectors[i], vectors[j], dim=0)
            cosines[i, j] = cosines[j, i] = cosine
    return cosines.numpy()


def dense_product(folder: Path) -> np.ndarray:
    """The dense way at its best: one matrix product in float64."""
    vectors = dense_vectors(folder)
    gram = vectors @ vectors.T
    norms = gram.diagonal().sqrt()
    return (gram / norms.outer(norms)).numpy()


def fusion_bench(folder: Path) -> np.ndarray:
    """FusionBench's own class on the same networks; loading them counts for everybody."""
    import pandas as pd
    from fusion_bench.method.analysis.task_vector_cos_similarity import TaskVectorCosSimilarity
    from fusion_bench.modelpool import BaseModelPool as TheirPool

    ours = pool_of(folder)
    models = {name: ours.load_model(name) for name in ours.all_model_names}
    with tempfile.TemporaryDirectory() as output:
        TaskVectorCosSimilarity(plot_heatmap=False, output_path=output).run(TheirPool(models))
        table = pd.read_csv(Path(output) / "task_vector_cos_similarity.csv", index_col=0)
    return table.to_numpy()


WAYS: dict[str, Callable[[Path], np.ndarray]] = {
    "streamed": streamed,
    "dense, pair by pair": dense_pairs,
    "dense, one product": dense_product,
    "FusionBench": fusion_bench,
}


def run_here(way: str, folder: Path) -> None:
    """Run one way in this process and print what it took as JSON."""
    import pandas as pd  # noqa: F401 - imports are not timed

    import fusion.method  # noqa: F401

    start, busy = time.perf_counter(), time.process_time()
    cosines = WAYS[way](folder)
    result = {
        "seconds": time.perf_counter() - start,
        "busy": time.process_time() - busy,
        "peak": peak_memory(),
        "cosines": cosines.tolist(),
    }
    print(json.dumps(result))


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes.

    Linux lets a child inherit the peak of the process that started it in ``getrusage``; what
    /proc tells is its own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=11e6, help="of each network")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the pool is made; default: temporary")
    parser.add_argument("--repeat", type=int, default=3, help="runs of the streamed way; the best")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        run_here(options.way, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_pool(folder, experts=options.experts, parameters=options.parameters)
        size = sum(path.stat().st_size for path in folder.iterdir())
        parameters = sum(p.numel() for p in pool_of(folder).architecture(PRETRAINED).parameters())
        print(
            f"{options.experts} experts of {parameters / 1e6:.1f} million parameters, "
            f"{size / 2**30:.2f} GiB on disk, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )
        results = {}
        for way in WAYS:
            if way == "FusionBench" and importlib.util.find_spec("fusion_bench") is None:
                continue
            command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
            runs = []
            for _ in range(options.repeat if way == "streamed" else 1):
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            results[way] = min(runs, key=lambda run: run["seconds"])
        ours = results["streamed"]["seconds"]
        truth = np.array(results["dense, one product"]["cosines"])
        print(
            f"{'':22}{'seconds':>10}{'x streamed':>12}{'CPU s':>10}{'peak GiB':>10}{'off by':>10}"
        )
        for way, result in results.items():
            error = np.abs(np.array(result["cosines"]) - truth).max()
            print(
                f"{way:22}{result['seconds']:10.2f}{result['seconds'] / ours:12.1f}"
                f"{result['busy']:10.2f}{result['peak'] / 2**30:10.2f}{error:10.1e}"
            )


if __name__ == "__main__":
    main()
