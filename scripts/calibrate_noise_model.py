"""Print how often each noise model calls a matrix of pure noise signal.

    python scripts/calibrate_noise_model.py [--alpha 0.01] [--draws 20000] [--seed 0]

One row a shape, one column for each estimate of sigma and each threshold; the last column is
``tracy_widom`` with the true sigma. A large shape gets fewer draws, so that the table takes about
five minutes on two cores.
"""

from __future__ import annotations

import argparse
from typing import get_args

import torch
from tqdm import tqdm

from fusion.spectrum.noise_model import SigmaRule, ThresholdRule, estimate_sigma, noise_threshold
from fusion.spectrum.svd import singular_values

SHAPES = (
    *((3, 27), (4, 64), (9, 64), (9, 256), (10, 10), (10, 64)),
    *((16, 16), (16, 27), (16, 144), (32, 32), (32, 288), (64, 64), (64, 576)),
    *((128, 128), (128, 1152), (256, 2304), (512, 512), (512, 4608)),
)
# Cost a·a·b of one decomposition up to which all draws are made; beyond, they shrink as 1/√cost.
FULL_DRAWS_UP_TO = 16 * 16 * 144


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alpha", type=float, default=0.01, help="level of tracy_widom")
    parser.add_argument("--draws", type=int, default=20_000, help="draws for each small shape")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)

    sigmas, thresholds = get_args(SigmaRule), get_args(ThresholdRule)
    names = [f"{sigma}/{threshold}" for sigma in sigmas for threshold in thresholds]
    print(f"share of pure-noise matrices with a signal, in %, alpha = {options.alpha:g}\n")
    print("| shape | draws | " + " | ".join([*names, "true/tracy_widom"]) + " |")
    print("|---" * (len(names) + 3) + "|")
    for a, b in SHAPES:
        draws = max(100, int(options.draws * min(1.0, (FULL_DRAWS_UP_TO / (a * a * b)) ** 0.5)))
        alarms = dict.fromkeys([*names, "true/tracy_widom"], 0)
        for _ in tqdm(range(draws), desc=f"{a}×{b}", disable=None, leave=False):
            noise = torch.randn(a, b, generator=generator, dtype=torch.float64)
            values = singular_values(noise)
            largest = float(values[0])
            for sigma in sigmas:
                estimate = estimate_sigma(values, a, b, sigma)
                for threshold in thresholds:
                    edge = noise_threshold(estimate, a, b, threshold, alpha=options.alpha)
                    alarms[f"{sigma}/{threshold}"] += largest > edge
            edge = noise_threshold(1.0, a, b, "tracy_widom", alpha=options.alpha)
            alarms["true/tracy_widom"] += largest > edge
        shares = " | ".join(f"{100 * count / draws:.2f}" for count in alarms.values())
        print(f"| {a}×{b} | {draws} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
