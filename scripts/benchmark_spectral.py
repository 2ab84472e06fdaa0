"""Time of the spectral rules on ResNet-50, against a plain loop of singular value decompositions.

    python scripts/benchmark_spectral.py --threads 1

merges the convolutions and the linear layer of ResNet-50 with random task vectors (noise and a few
strong directions) by each spectral rule, twice: as the rule does it, through Gram matrices in
float64, and as one writes it down, with ``torch.linalg.svd`` for each matrix in float32. Printed
are the seconds of both, the ratio of these and of the CPU times (which say more on a machine that
is not free), and the largest relative difference of a merged weight. That is the rounding of the
plain loop: with ``--double``, which gives the loop float64, it is gone. On a busy machine more
threads hold the loop up.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchvision.models import resnet50

from fusion.merging.rule import Piece
from fusion.merging.rules import TSVM, IsoC, IsoCTS
from fusion.models import find_layers

svd = torch.linalg.svd


class Clock:
    """Adds up the wall and CPU time that is spent inside of it."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]


def pieces(experts: int, limit: int | None) -> Iterator[Piece]:
    """Yield one weight after another, with a base of zeros."""
    with torch.device("meta"):
        model = resnet50()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for number, layer in enumerate(find_layers(model)[:limit]):
        generator = torch.Generator().manual_seed(number)
        shape = shapes[layer.weight]
        rows, columns = shape[0], shape[1:].numel()
        changes = torch.randn(experts, rows, columns, generator=generator)
        left = torch.randn(experts, rows, 4, generator=generator)
        changes += left @ torch.randn(experts, 4, columns, generator=generator)
        yield Piece(
            key=layer.weight,
            layer=layer,
            depth=0.0,
            base=torch.zeros(shape),
            experts=1e-3 * changes.view(experts, *shape),
            names=tuple(map(str, range(experts))),
            shares=(1 / experts,) * experts,
        )


def orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix, full_matrices=False)
    return left @ right


def plain_tsvm(changes: Tensor) -> Tensor:
    """TSV-Merge as the paper's algorithm reads; (n, rows, columns) -> (rows, columns)."""
    kept = min(changes.shape[1:]) // len(changes)
    lefts, values, rights = [], [], []
    for change in changes:
        left, value, right = svd(change, full_matrices=False)
        lefts.append(left[:, :kept])
        values.append(value[:kept])
        rights.append(right[:kept])
    return (
        orthogonal(torch.cat(lefts, 1)) @ torch.cat(values).diag() @ orthogonal(torch.cat(rights))
    )


def plain_iso_c(changes: Tensor) -> Tensor:
    """Iso-C as the paper's algorithm reads."""
    left, value, right = svd(changes.sum(0), full_matrices=False)
    return value.mean() * left @ right


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


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "TSVM": plain_tsvm,
    "IsoC": plain_iso_c,
    "IsoCTS": plain_iso_cts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, help="only the first ones; default: all")
    parser.add_argument("--double", action="store_true", help="the plain loop in float64")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"ResNet-50, {options.experts} experts, {options.threads} thread(s), {os.cpu_count()} "
        f"cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':8}{'seconds':>10}{'plain SVD':>11}{'ratio':>8}{'CPU ratio':>11}{'off by':>10}")
    for rule in (TSVM(), IsoC(), IsoCTS()):
        name = type(rule).__name__
        ours, plain, worst = Clock(), Clock(), 0.0
        for piece in pieces(options.experts, options.layers):
            changes = piece.changes.flatten(2)
            changes = changes.double() if options.double else changes
            with ours:
                merged = rule.merge(piece)
            with plain:
                reference = PLAIN[name](changes).view_as(merged)
            worst = max(worst, float((merged - reference).norm() / reference.norm()))
        ratio, busy = plain.wall / ours.wall, plain.cpu / ours.cpu
        print(f"{name:8}{ours.wall:10.2f}{plain.wall:11.2f}{ratio:8.1f}{busy:11.1f}{worst:10.1e}")


if __name__ == "__main__":
    main()
