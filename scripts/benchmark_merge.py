"""Time and memory of a merge: in memory, from file to file, and as a plain loop over state dicts.

    python scripts/benchmark_merge.py --rules Mean Ties --size 512 --experts 2
    python scripts/benchmark_merge.py --rules TSVM IsoC IsoCTS --network resnet50 --experts 8

makes a base and experts on disk (under --folder, removed afterwards) and merges them into a file in
several ways, each in a process of its own, in turn, --rounds times. The plain loop is what one
writes down: load all state dicts, loop over their keys, save the result; for TIES the global
threshold by ``kthvalue``, for the spectral rules ``torch.linalg.svd`` for every layer and expert. A
bare copy reads all members and writes as many bytes as the result has. Every way ends when its file
is on the disk.

Printed are medians: wall time (interpreter start and imports excluded), CPU time, how many times as
long the plain loop took, and peak memory above that of the interpreter and its imports; then how
many tensors of the streamed file differ from those of the merge in memory, and the largest relative
difference of a tensor of the plain loop. The load tells whether the machine was free.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion.merging import rules as of_fusion
from fusion.method import Merge
from fusion.modelpool import PRETRAINED, BaseModelPool, Checkpoint
from fusion.models import CifarResNet
from fusion.weights import save_safetensors

svd = torch.linalg.svd
UNIT = 270_000  # parameters of a ResNet-20 of width 1; they grow with the square of the width
RESULT = "merged.safetensors"
PIECE = 1 << 20  # bytes that the bare copy reads at a time


# -- the pool ------------------------------------------------------------------------------------


def architecture(network: str, size: float) -> dict[str, object]:
    """Return what builds the network: a ResNet-20 of ``size`` MiB, or one of torchvision's."""
    if network != "wide":
        return {"_target_": f"torchvision.models.{network}"}
    width = math.sqrt(size * 2**20 / 4 / UNIT)
    return {"_target_": "fusion.models.CifarResNet", "depth": 20, "width": width}


def make_pool(folder: Path, spec: Mapping[str, object], experts: int) -> None:
    """Write a base and experts whose changes are noise and a few strong directions."""
    target = str(spec["_target_"]).rpartition(".")[2]
    made = {"CifarResNet": lambda: CifarResNet(20, width=float(str(spec["width"])))}
    network: nn.Module = made.get(target, lambda: getattr(torchvision.models, target)())()
    base = network.state_dict()
    save_safetensors(folder / f"{PRETRAINED}.safetensors", base)
    for number in range(experts):
        generator = torch.Generator().manual_seed(number)
        moved = dict(base)
        for name, _ in network.named_parameters():
            rows = base[name].reshape(len(base[name]), -1)
            left = torch.randn(len(rows), 4, generator=generator)
            change = left @ torch.randn(4, rows.shape[1], generator=generator)
            change += torch.randn(rows.shape, generator=generator)
            moved[name] = base[name] + 1e-3 * change.view_as(base[name])
        save_safetensors(folder / f"expert_{number}.safetensors", moved)


def members(folder: Path) -> list[Path]:
    """Return the files of the base and of the experts."""
    return [folder / f"{PRETRAINED}.safetensors", *sorted(folder.glob("expert_*.safetensors"))]


# -- ours ----------------------------------------------------------------------------------------


def ours(folder: Path, rule: str, out: Path, *, streamed: bool) -> None:
    spec = json.loads((folder / "architecture.json").read_text())
    pool = BaseModelPool({path.stem: Checkpoint(path, spec) for path in members(folder)})
    merge = Merge(
        rule=getattr(of_fusion, rule)(), batch_norm="pretrained", streamed=streamed, plot=False
    )
    merge.output_path = out.parent
    model = merge.run(pool)
    if not streamed:
        pool.save_model(model, out)


# -- plain loops ---------------------------------------------------------------------------------


def plain(folder: Path, rule: str, out: Path) -> None:
    base, *experts = map(load_file, members(folder))
    keys = [k for k, t in base.items() if t.is_floating_point() and "running_" not in k]
    merged = dict(base)
    if rule == "Ties":
        merged |= plain_ties(base, experts, keys)
    else:
        for key in keys:
            merged[key] = PLAIN[rule](base[key], [expert[key] for expert in experts]).contiguous()
    save_file(merged, out)
    settle(out)


def plain_mean(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    del base
    return torch.stack(list(experts)).mean(0)


def plain_task_arithmetic(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return base + 0.3 * torch.stack([expert - base for expert in experts]).sum(0)


def plain_ties(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], keys: Sequence[str]
) -> dict[str, Tensor]:
    """TIES over the flat task vectors, density 0.2, scale 1."""
    start = torch.cat([base[key].flatten() for key in keys])
    changes = torch.stack([torch.cat([e[key].flatten() for key in keys]) - start for e in experts])
    dropped = changes.shape[1] - math.ceil(0.2 * changes.shape[1])
    thresholds = changes.abs().kthvalue(dropped + 1, dim=1, keepdim=True).values
    changes = torch.where(changes.abs() >= thresholds, changes, 0)
    agree = (changes.sign() == changes.sum(0).sign()) & (changes != 0)
    merged = start + (changes * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = merged.split([base[key].numel() for key in keys])
    return {key: part.view_as(base[key]).clone() for key, part in zip(keys, parts, strict=True)}


def spectral(
    merge: Callable[[Tensor], Tensor],
) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """Apply a merge of task matrices (n, rows, columns) to weights, and the mean to vectors."""

    def merged(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        if base.ndim < 2:
            return plain_mean(base, experts)
        changes = torch.stack([(expert - base).flatten(1) for expert in experts])
        return base + merge(changes).view_as(base)

    return merged


def orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix, full_matrices=False)
    return left @ right


@spectral
def plain_tsvm(changes: Tensor) -> Tensor:
    """TSV-Merge as the paper's algorithm reads."""
    kept = max(1, min(changes.shape[1:]) // len(changes))
    lefts, values, rights = [], [], []
    for change in changes:
        left, value, right = svd(change, full_matrices=False)
        lefts.append(left[:, :kept])
        values.append(value[:kept])
        rights.append(right[:kept])
    return (
        orthogonal(torch.cat(lefts, 1)) @ torch.cat(values).diag() @ orthogonal(torch.cat(rights))
    )


@spectral
def plain_iso_c(changes: Tensor) -> Tensor:
    """Iso-C as the paper's algorithm reads."""
    left, value, right = svd(changes.sum(0), full_matrices=False)
    return value.mean() * left @ right


@spectral
def plain_iso_cts(changes: Tensor) -> Tensor:
    """Iso-CTS as the paper's algorithm reads."""
    rank = min(changes.shape[1:])
    own = round((rank - int(0.8 * rank)) / len(changes))
    left, value, right = svd(changes.sum(0), full_matrices=False)
    common = rank - own * len(changes)
    lefts, values, rights = [left[:, :common]], [value[:common]], [right[:common]]
    for change in changes:
        left, value, right = svd(change - lefts[0] @ lefts[0].T @ change, full_matrices=False)
        lefts.append(left[:, :own])
        values.append(value[:own])
        rights.append(right[:own])
    return (
        torch.cat(values).mean() * orthogonal(torch.cat(lefts, 1)) @ orthogonal(torch.cat(rights))
    )


PLAIN: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "Mean": plain_mean,
    "TaskArithmetic": plain_task_arithmetic,
    "TSVM": plain_tsvm,
    "IsoC": plain_iso_c,
    "IsoCTS": plain_iso_cts,
}


def bare_copy(folder: Path, rule: str, out: Path) -> None:
    del rule
    buffer = memoryview(bytearray(PIECE))
    base, *experts = members(folder)
    for path in experts:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with base.open("rb", buffering=0) as file, out.open("wb", buffering=0) as copy:
        while count := file.readinto(buffer):
            copy.write(buffer[:count])
    settle(out)


def settle(path: Path) -> None:
    """Wait until a file is on the disk, as ours are."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# -- measuring -----------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Path, str, Path], None]] = {
    "plain loop": plain,
    "in memory": lambda *rest: ours(*rest, streamed=False),
    "streamed": lambda *rest: ours(*rest, streamed=True),
    "bare copy": bare_copy,
}


def run_here(way: str, folder: Path, rule: str, out: Path) -> None:
    """Run one way in this process and print what it took as JSON."""
    import lightning.fabric  # noqa: F401 - imports are not timed

    before = peak_memory()
    start, busy = time.perf_counter(), time.process_time()
    WAYS[way](folder, rule, out)
    result = {
        "seconds": time.perf_counter() - start,
        "busy": time.process_time() - busy,
        "peak": peak_memory() - before,
    }
    print(json.dumps(result))


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes, as Linux counts it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if "VmHWM" in line).split()[1]) * 1024


def differences(first: Path, other: Path) -> tuple[int, float]:
    """Return how many tensors of two files differ, and the largest relative difference of one."""
    ours, theirs = load_file(first), load_file(other)
    count, worst = 0, 0.0
    for key, tensor in ours.items():
        if not torch.equal(tensor, theirs[key]):
            count += 1
            gap = (tensor - theirs[key]).double().norm() / tensor.double().norm()
            worst = max(worst, float(gap))
    return count, worst


def compare(options: argparse.Namespace, folder: Path, rule: str) -> None:
    """Run all ways and print their rows."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(options.threads))
    outs = {way: folder / way.replace(" ", "_") / RESULT for way in WAYS}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, out in outs.items():
            out.parent.mkdir(exist_ok=True)
            out.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--rules", rule, "--way", way]
            command += ["--folder", str(folder), "--out", str(out), "--threads"]
            done = subprocess.run(
                [*command, str(options.threads)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    median = {
        way: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for way, found in runs.items()
    }
    print(f"\n{rule:16}{'seconds':>10}{'CPU s':>8}{'plain/this':>12}{'CPU':>8}{'peak MiB':>10}")
    for way, found in median.items():
        ratios = [median["plain loop"][name] / found[name] for name in ("seconds", "busy")]
        print(
            f"{way:16}{found['seconds']:10.2f}{found['busy']:8.2f}{ratios[0]:12.1f}"
            f"{ratios[1]:8.1f}{found['peak'] / 2**20:10.0f}"
        )
    differing, _ = differences(outs["in memory"], outs["streamed"])
    _, off = differences(outs["in memory"], outs["plain loop"])
    print(f"streamed: {differing} tensors differ from in memory; plain loop off by {off:.1e}")
    for out in outs.values():
        out.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", choices=[*PLAIN, "Ties"], default=["Mean", "Ties"])
    parser.add_argument("--network", choices=("wide", "resnet18", "resnet50"), default="wide")
    parser.add_argument("--size", type=float, default=512, help="MiB of each network if wide")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where the files are; default: temporary")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        torch.set_num_threads(options.threads)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        run_here(options.way, options.folder, options.rules[0], options.out)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        spec = architecture(options.network, options.size)
        (folder / "architecture.json").write_text(json.dumps(spec))
        make_pool(folder, spec, options.experts)
        sizes = [path.stat().st_size / 2**20 for path in members(folder)]
        print(
            f"{options.network}: base and {options.experts} experts of {sizes[0]:.0f} MiB each, "
            f"{options.rounds} round(s), {options.threads} thread(s), load "
            f"{os.getloadavg()[0]:.1f}"
        )
        for rule in options.rules:
            compare(options, folder, rule)


if __name__ == "__main__":
    main()
