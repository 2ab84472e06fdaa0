"""Time and accuracy of `fusion.training.fit` under its options that only concern speed.

    python scripts/benchmark_training.py                               # digits
    python scripts/benchmark_training.py --folder DATA --images 10000  # DATA/train, DATA/test

Trains the same ResNet-20 from the same start with every setting, `--rounds` times in turn (so
that a busy machine does not favour one), and prints the median time and the mean test accuracy.
Compilation is timed apart, by a run of two steps beforehand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric

from fusion.data import ImageTensors, digits, few, image_folder
from fusion.models import CifarResNet, SeparableResNet
from fusion.training import fit

Precision = Literal["32-true", "bf16-mixed"]
TEST_IMAGES = 2000  # of --folder: enough to see a setting that costs two points
SETTINGS: dict[str, tuple[Precision, bool, bool]] = {  # precision, channels_last, compile
    "eager": ("32-true", False, False),
    "channels_last": ("32-true", True, False),
    "bf16": ("bf16-mixed", False, False),
    "bf16 channels_last": ("bf16-mixed", True, False),
    "compiled channels_last": ("32-true", True, True),
    "compiled bf16 channels_last": ("bf16-mixed", True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="has train/<class>/ and test/<class>/")
    parser.add_argument("--images", type=int, default=10_000, help="training images of --folder")
    parser.add_argument("--network", choices=("resnet", "separable"), default="resnet")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    if options.folder is None:
        train, test = digits("train"), digits("test")
    else:
        train = few(_first(options.folder / "train", options.images), options.images)
        test = few(_first(options.folder / "test", TEST_IMAGES), TEST_IMAGES)
    print(
        f"{options.network} on {train}, {options.epochs} epochs, {torch.get_num_threads()} threads"
    )

    seconds: dict[str, list[float]] = {name: [] for name in options.settings}
    accuracy: dict[str, list[float]] = {name: [] for name in options.settings}
    for number in range(options.rounds + 1):
        for name in options.settings:
            start = time.perf_counter()
            if number == 0:  # warm up, and fill the cache of compiled code
                run(options.network, name, train, test, epochs=1, max_batches=2)
                print(
                    f"{name}: first two steps and test {time.perf_counter() - start:.1f} s",
                    flush=True,
                )
                continue
            took, right = run(
                options.network, name, train, test, epochs=options.epochs, seed=number
            )
            seconds[name].append(took)
            accuracy[name].append(right)
            print(f"{name}, round {number}: {took:.1f} s, {100 * right:.1f} %", flush=True)
    print(f"\n{'setting':30s} {'median s/epoch':>15s} {'accuracy %':>12s}")
    for name in options.settings:
        median = statistics.median(seconds[name]) / options.epochs
        print(f"{name:30s} {median:15.2f} {100 * statistics.mean(accuracy[name]):12.1f}")


def _first(folder: Path, images: int) -> ImageTensors:
    """Read no more of each class than ``images`` in all could need."""
    each = -(-images // sum(p.is_dir() for p in folder.iterdir()))
    dataset = image_folder(folder, per_class=each, in_memory=True)
    assert isinstance(dataset, ImageTensors)
    return dataset


def run(
    network: str,
    setting: str,
    train: ImageTensors,
    test: ImageTensors,
    *,
    epochs: int,
    max_batches: int | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the seconds of training and the test accuracy."""
    precision, channels_last, compiled = SETTINGS[setting]
    torch.manual_seed(seed)
    channels = train.images.shape[1]
    model = (
        CifarResNet(20, in_channels=channels)
        if network == "resnet"
        else SeparableResNet(width=0.5, in_channels=channels)
    )
    history = fit(
        model,
        train,
        epochs=epochs,
        lr=5e-3,
        batch_size=128,
        max_batches=max_batches,
        channels_last=channels_last,
        compile=compiled,
        seed=seed,
        fabric=Fabric(accelerator="auto", devices=1, precision=precision),
    )
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(test.normalise(images)).argmax(1) == labels).sum())
            for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True)
        )
    return history.seconds, right / len(test)


if __name__ == "__main__":
    main()
