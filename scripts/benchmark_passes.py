"""What shared forward passes save: REPAIR along a line, and matching of experts by activations.

    python scripts/benchmark_passes.py --threads 1

Both are timed beside the way without sharing, in the same run, in turn, several times; printed are
the medians of wall and CPU time (the latter says more on a machine that is not free), the ratio,
and how many images entered a network, also where a pass ends early. Without sharing, REPAIR
measures both ends anew at each point and takes a pass for each layer, with `torch.var_mean`;
matching runs both networks for each direction of each expert, the reference among them. The images
are noise of CIFAR-10's shape: what they show has no influence on the time. The two ways must agree:
REPAIR to rounding (the sums are taken in another order), matching in every bit.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fusion.alignment import align, align_all, permutation_spec
from fusion.data import ImageTensors
from fusion.merging.averaging import mean_network
from fusion.models import CifarResNet
from fusion.training import channel_statistics, repair
from fusion.training.channel_statistics import ChannelMoments
from fusion.weights import tensors_of

Networks = list[nn.Module]


def var_mean(moments: ChannelMoments, values: Tensor) -> None:
    """Add a batch to the moments as `torch.var_mean` sums it."""
    rows = values.movedim(moments.axis, 0).flatten(1)
    variance, mean = (each.double() for each in torch.var_mean(rows, dim=1, correction=0))
    n, before = rows.shape[1], moments.count
    step = mean - moments.mean
    moments.count += n
    moments.squares = moments.squares + variance * n + step.square() * (before * n / moments.count)
    moments.mean = moments.mean + step * (n / moments.count)


def line(ends: Networks, points: int) -> Iterator[tuple[nn.Module, list[float]]]:
    """Yield the networks between the ends, and their shares in each."""
    for point in range(1, points - 1):
        t = point / (points - 1)
        yield mean_network(ends[0], [tensors_of(end) for end in ends], [1 - t, t]), [1 - t, t]


def repaired_apart(ends: Networks, points: int, data: ImageTensors) -> Networks:
    found = []
    with mock.patch.object(ChannelMoments, "add", var_mean):
        for network, weights in line(ends, points):
            repair(network, ends, data, weights=weights, images=len(data), held_bytes=0)
            found.append(network)
    return found


def repaired_together(ends: Networks, points: int, data: ImageTensors) -> Networks:
    found = []
    measured = [channel_statistics(end, data, images=len(data)) for end in ends]
    for network, weights in line(ends, points):
        repair(network, measured, data, weights=weights, images=len(data))
        found.append(network)
    return found


def matched_apart(experts: Networks, images: list[Tensor], spec: Any) -> Networks:
    found = []
    for expert in experts:
        # The reference as a copy, so that it is not known to be one of the experts.
        pair = expert, copy.deepcopy(experts[0])
        found.append(align(*pair, spec=spec, by="activations", data=images).model)
        align(*reversed(pair), spec=spec, by="activations", data=images)
    return found


def matched_together(experts: Networks, images: list[Tensor], spec: Any) -> Networks:
    named = {str(number): expert for number, expert in enumerate(experts)}
    found = align_all(named, experts[0], spec=spec, by="activations", data=images, cycle=True)
    return [one.model for one in found.values()]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the images that whole networks are given."""
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, CifarResNet) and type(args[0]) is Tensor:
            sizes.append(len(args[0]))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield sizes
    finally:
        handle.remove()


def difference(ours: Networks, theirs: Networks) -> float:
    """Return the largest relative difference of a tensor."""
    pairs = [
        (a.double(), b.double())
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    ]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 0)


def compare(
    name: str, apart: Callable[[], Networks], together: Callable[[], Networks], repeats: int
) -> None:
    runs = []
    for _ in range(repeats):
        times, images, results = [], [], []
        for way in (apart, together):
            wall, cpu = time.perf_counter(), time.process_time()
            with counted() as sizes:
                results.append(way())
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
            images.append(sum(sizes))
        runs.append(times)
    print(f"{name}: images {images[0]} apart, {images[1]} together")
    for kind, clock in enumerate(("wall", "CPU")):
        before, after = (statistics.median(run[way][kind] for run in runs) for way in (0, 1))
        ratios = [run[0][kind] / run[1][kind] for run in runs]
        print(
            f"  {clock:4}  apart {before:7.2f} s   together {after:7.2f} s   "
            f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    print(f"  largest relative difference of a tensor: {difference(*results):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--points", type=int, default=11, help="of the line, ends included")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    experts: Networks = [CifarResNet(20).eval() for _ in range(options.experts)]
    print(
        f"ResNet-20, {options.images} images 32x32, {options.threads} thread(s), "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    data = ImageTensors(
        torch.rand(options.images, 3, 32, 32),
        torch.arange(options.images) % 10,
        class_names="0123456789",
    )
    compare(
        f"REPAIR, {options.points - 2} points between two networks",
        lambda: repaired_apart(experts[:2], options.points, data),
        lambda: repaired_together(experts[:2], options.points, data),
        options.repeats,
    )
    batches = list(data.normalise(data.images).split(128))
    spec = permutation_spec(experts[0], batches[0][:2])
    compare(
        f"matching {options.experts} experts, the first of them the reference",
        lambda: matched_apart(experts, batches, spec),
        lambda: matched_together(experts, batches, spec),
        options.repeats,
    )


if __name__ == "__main__":
    main()
