"""One table over the CNN families: finding symmetries, and recovering a planted permutation.

    python scripts/benchmark_alignment.py [--output alignment_benchmark.csv] [family …]

For each network, at its default initialisation: time to derive the symmetries, relative change of
the output (float64) under a random permutation, time to recover that permutation and the share of
the units that came back to their place. Beside it, in the same run, coordinate descent from the
identity without the forward sweep: on our objective, and on the literature's plain sum of inner
products.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torchvision import models

from fusion.alignment import (
    PermutationSpec,
    align,
    apply_permutation,
    inverse,
    permutation_spec,
    random_permutation,
)
from fusion.alignment.agreement import by_weights
from fusion.files import write_text
from fusion.models import CifarResNet, SeparableResNet

FAMILIES = (
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2",
    "densenet121", "googlenet", "inception_v3", "squeezenet1_0", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0",
    "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
)  # fmt: skip
OURS = {"SeparableResNet": SeparableResNet, "CifarResNet": CifarResNet}
BASELINE_AT_MOST = 20_000_000  # parameters: beyond, a stuck descent takes minutes


def build(name: str) -> nn.Module:
    if name in OURS:
        return OURS[name]()
    if name.startswith(("googlenet", "inception", "vgg")):
        return models.get_model(name, weights=None, init_weights=False)
    return models.get_model(name, weights=None)


def recovered(found: dict[str, Tensor], planted: dict[str, Tensor], spec: PermutationSpec) -> float:
    back = inverse(spec, planted)
    right = sum(int((found[name] == p).sum()) for name, p in back.items())
    return right / sum(len(p) for p in back.values())


def measure(name: str) -> dict[str, object]:
    torch.manual_seed(0)
    reference = build(name).eval()
    side = 32 if name in OURS else 299 if name.startswith("inception") else 224
    x = torch.randn(1, 3, side, side)
    start = time.perf_counter()
    spec = permutation_spec(reference, x)
    spec_time = time.perf_counter() - start

    planted = random_permutation(spec, 1)
    other = apply_permutation(reference, spec, planted)
    start = time.perf_counter()
    found = align(other, reference, spec=spec)
    match_time = time.perf_counter() - start
    share = recovered(dict(found.permutations), planted, spec)
    pairs = zip(reference.state_dict().values(), found.model.state_dict().values(), strict=True)
    exact = all(torch.equal(a, b) for a, b in pairs)

    descent: float | None = None
    plain_descent: float | None = None
    size = sum(p.numel() for p in reference.parameters())
    if size <= BASELINE_AT_MOST:
        matching = by_weights(
            spec, other, reference, seed=0, max_sweeps=100, device=torch.device("cpu")
        )
        descent = recovered(matching.descend_from_identity().permutations, planted, spec)
        raw = [
            {key: value for key, value in network.named_parameters() if key in matching.model}
            for network in (other.requires_grad_(False), reference.requires_grad_(False))
        ]
        squares = sum(float(value.square().sum()) for value in raw[1].values())
        weight = dict.fromkeys(matching.model, 1 / squares)
        plain = replace(matching, model=raw[0], reference=raw[1], weight=weight)
        plain_descent = recovered(plain.descend_from_identity().permutations, planted, spec)

    wide = copy.deepcopy(reference).double()
    with torch.no_grad():
        expected = wide(x.double())
        got = apply_permutation(wide, spec, planted)(x.double())
    return {
        "network": name,
        "parameters (M)": round(size / 1e6, 1),
        "covered": round(spec.coverage, 5),
        "groups": len(spec.groups),
        "spec (s)": round(spec_time, 2),
        "output error": float((expected - got).norm() / expected.norm()),
        "match (s)": round(match_time, 2),
        "recovered": share,
        "bit for bit": exact,
        "descent": descent,
        "plain descent": plain_descent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=[*FAMILIES, *OURS])
    parser.add_argument("--output", type=Path, help="also write the table as CSV")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.families:
        rows.append(measure(name))
        print(f"{name}: {rows[-1]['recovered']:.1%} in {rows[-1]['match (s)']} s", flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    if arguments.output:
        write_text(arguments.output, table.to_csv(index=False))


if __name__ == "__main__":
    main()
