"""Time and memory of ResNet-50's Gram matrices, against a plain forward pass over the same images.

    python scripts/benchmark_statistics.py --threads 1

measures all layers' input Gram matrices (:func:`fusion.merging.statistics.collect`) and a plain
forward pass, one after the other, several times, and prints the medians of wall and CPU time (the
latter says more on a machine that is not free) and the ratio of the two. What does not depend on
the number of images, putting the matrices together at the end, is timed apart. Multiply-adds say
what can be had: of products of unfolded patches, of the upper half of these, and of the products
that are formed here. Then the matrices are gathered once into a folder, and read layer by layer,
with the peak of the memory above that of the network and its images.

    python scripts/benchmark_statistics.py --stages

prints how many forward passes it takes to merge ResNet-50 layer after layer.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from fusion.merging.statistics import collect, stages
from fusion.merging.statistics.collecting import collected
from fusion.merging.statistics.grams import Grams
from fusion.merging.statistics.measuring import laid_out, measured
from fusion.merging.statistics.reading import read_input
from fusion.merging.statistics.shifts import ShiftedProducts
from fusion.merging.statistics.store import read_statistics, write_statistics
from fusion.models import Layer, find_layers
from fusion.training.measuring import measure

FEW_CHANNELS = 16  # of fusion.merging.statistics.grams: patches are unfolded below this


def timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def layer_sizes(model: nn.Module, size: int) -> dict[str, tuple[int, int, int, int]]:
    """Multiply-adds for one image: forward, unfolded product, its half, products formed here."""
    found: dict[str, tuple[int, int, int, int]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            reading = read_input(module, args[0], output)
            groups, channels = reading.values.shape[1:3]
            columns = channels * math.prod(len(axis.taps) for axis in reading.axes)
            forward = reading.positions * module.weight.numel()
            full = reading.positions * groups * columns**2
            formed = full // 2
            if reading.axes and channels >= FEW_CHANNELS:
                products = ShiftedProducts(reading.axes, groups, channels, device="meta").products
                formed = int(products * groups * channels**2)
            found[name] = forward, full, full // 2, formed

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note(name))
    model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return found


def batches(images: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for some in images.split(size):
        yield some, torch.zeros(len(some), dtype=torch.int64)


def compare(model: nn.Module, images: Tensor, options: argparse.Namespace) -> None:
    layers = find_layers(model)

    @torch.no_grad()
    def plain() -> None:
        for some, _ in batches(images, options.batch_size):
            model(some)

    finishing: list[tuple[float, float]] = []

    def grams() -> None:
        with measured(model, "cpu"):
            gathering = Grams(model, layers)
            for some, _ in batches(images, options.batch_size):
                gathering.add(laid_out(some, "cpu", torch.float32))
        finishing.append(timed(lambda: [matrix.shape for _, matrix in gathering.finished()]))

    plain()
    runs = [(timed(plain), timed(grams)) for _ in range(options.repeats)]
    for kind, name in enumerate(("wall", "CPU")):
        forward = statistics.median(run[0][kind] for run in runs)
        both = [run[1][kind] - end[kind] for run, end in zip(runs, finishing, strict=True)]
        ours = statistics.median(both)
        pairs = [mine / run[0][kind] for mine, run in zip(both, runs, strict=True)]
        print(
            f"{name:5} forward {forward:7.2f} s   with Gram matrices {ours:7.2f} s   "
            f"ratio {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
        )
    seconds = statistics.median(wall for wall, _ in finishing)
    print(f"putting the matrices together: {seconds:.2f} s, once")


def show_flops(size: int) -> None:
    with torch.device("meta"):
        sizes = layer_sizes(resnet50(), size)
    forward, full, half, formed = (sum(each) / 1e9 for each in zip(*sizes.values(), strict=True))
    print(f"10⁹ multiply-adds for an image: forward {forward:.2f}")
    for name, count in (
        ("products of unfolded patches", full),
        ("their upper halves", half),
        ("products formed here", formed),
    ):
        ratio = (forward + count) / forward
        print(f"  {name:29} {count:6.2f}   with the forward pass {ratio:.2f} times it")


def show_memory(model: nn.Module, images: Tensor, options: argparse.Namespace) -> None:
    layers = find_layers(model)
    data = list(batches(images, options.batch_size))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "resnet50.statistics"
        with measure() as plain, torch.no_grad():
            for some, _ in data:
                model(some)
        with measure() as stored:
            write_statistics(folder, "", collected(model, data, {"gram"}, layers=layers))
        size = sum(file.stat().st_size for file in folder.iterdir())
        found = read_statistics(folder, "")
        assert found is not None
        with measure() as reading:
            for name in found:
                found[name]
        with measure() as whole:
            kept = collect(model, data, {"gram"}, layers=layers)
        bytes_ = sum(tensor.nbytes for of in kept.values() for tensor in of.values())
    for name, measurement in (
        ("plain forward pass", plain),
        (f"gathered into a folder of {size / 1e6:.0f} MB", stored),
        ("read from there, layer by layer", reading),
        (f"collected in memory, {bytes_ / 1e6:.0f} MB", whole),
    ):
        peak = (measurement.peak_bytes or 0) / 1e6
        print(f"{name:38} {measurement.seconds:7.2f} s   peak {peak:6.0f} MB")


def show_stages(size: int) -> None:
    """Count forward passes by multiply-adds: those that end behind a layer, and whole ones."""
    with torch.device("meta"):
        model = resnet50()
        layers = find_layers(model)
        parts = stages(model, layers)
        sizes = layer_sizes(model, size)  # in the order in which they run
    total = sum(forward for forward, *_ in sizes.values())
    until: dict[str, float] = {}
    done = 0
    for name, (forward, *_) in sizes.items():
        done += forward
        until[name] = done / total

    def last(stage: list[Layer]) -> float:
        return max(until[layer.name] for layer in stage)

    print(f"ResNet-50: {len(layers)} layers in {len(parts)} stages, one pass each of both networks")
    print(f"  whole passes for each layer:             {2 * len(layers):6.1f} forward passes")
    print(f"  passes that end behind each layer:       {2 * sum(until.values()):6.1f}")
    print(f"  passes that end behind each stage:       {2 * sum(map(last, parts)):6.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", action="store_true", help="count passes; measure nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.stages:
        show_stages(options.size)
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"ResNet-50, {options.images} images {options.size}x{options.size} by "
        f"{options.batch_size}, {options.threads} thread(s), {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    show_flops(options.size)
    model = resnet50().eval()
    images = torch.randn(options.images, 3, options.size, options.size)
    compare(model, images, options)
    show_memory(model, images, options)


if __name__ == "__main__":
    main()
