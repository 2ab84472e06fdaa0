"""Speed and memory of a streamed `image_folder`, beside a bare torchvision `ImageFolder`.

    python scripts/benchmark_data.py                              # 2,000 photographs
    python scripts/benchmark_data.py --images 20000 --rounds 1    # memory at that size

Makes seeded synthetic photographs (JPEG, 500×375, 30 to 100 kB) in a temporary folder and reads
them once per round: `fusion.data.image_folder` with `fusion.data.batches`, torchvision's
`ImageFolder` with our `batches`, and the same with a bare `DataLoader`. All scale the shorter
side to 256, crop the middle 224 and normalise. Each reading is a process of its own, the ways in
turn; times include listing the folder and starting the workers, not importing. The processor's
time per image depends less on who else uses the machine. Memory is the peak of the process and
its workers together (proportional set size, Linux only), less what it takes after its imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data import RGB_MEAN, RGB_STD, batches, image_folder, seed_from

WIDTH, HEIGHT, CLASSES = 500, 375, 10
RESIZE, CROP = 256, 224
SCALES = (2, 4, 8, 16, 32, 64, 128, 512)  # cells of noise along the longer side
FALL = 0.65  # amplitude from one scale to the next finer one, about that of natural images
FIELDS = 6  # noise fields per scale, which photographs combine at random offsets
QUALITY = 94
DIFFERENT = 2000  # photographs beyond these are hard links to them
SAMPLE_SECONDS = 0.1
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        read(options.way, options.folder, options.batch_size, options.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), options.images, options.seed)
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    files = list(folder.glob("*/*.jpg"))
    size = statistics.mean(file.stat().st_size for file in files) / 1000
    print(f"{len(files)} photographs of {size:.0f} kB on average, {options.workers} workers")
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    means: dict[str, float] = {}
    for number in range(options.rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            result, peak = run(way, folder, options)
            speeds[way].append(result["images"] / result["seconds"])
            peaks[way].append((peak - result["start"]) / MIB)
            cpu[way].append(1000 * result["cpu"] / result["images"])
            means[way] = result["mean"]
            print(f"round {number}, {way}: {speeds[way][-1]:.0f} images/s", flush=True)
    print(f"\n{'':24s}{'images/s':>10s}{'ratio':>8s}{'CPU ms':>8s}{'peak MiB':>10s}{'mean':>12s}")
    for way in WAYS:
        pairs = zip(speeds[way], speeds["torchvision alone"], strict=True)
        ratio = statistics.median(ours / alone for ours, alone in pairs)
        speed, peak = statistics.median(speeds[way]), max(peaks[way])
        own = statistics.median(cpu[way])
        print(f"{way:24s}{speed:10.0f}{ratio:8.2f}{own:8.2f}{peak:10.0f}{means[way]:12.7f}")


def run(way: str, folder: Path, options: argparse.Namespace) -> tuple[dict[str, float], int]:
    """Read the folder in a process of its own; return what it says and its peak memory."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    command += ["--workers", str(options.workers), "--batch-size", str(options.batch_size)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(said), peak


def read(way: str, folder: Path, batch_size: int, workers: int) -> None:
    """Read all images once and print what it took as JSON."""
    loaded, before = memory(), processor_seconds()
    start = time.perf_counter()
    images, total = 0, 0.0
    for batch in WAYS[way](folder, batch_size, workers):
        images += len(batch)
        total += float(batch.mean(dtype=torch.float64)) * len(batch)
    seconds = time.perf_counter() - start
    said = {"images": images, "seconds": seconds, "cpu": processor_seconds() - before}
    said |= {"start": loaded, "mean": total / images}
    print(json.dumps(said))


def processor_seconds() -> float:
    """Return the time that processors spent on this process and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def streamed(folder: Path, batch_size: int, workers: int) -> Iterator[Tensor]:
    dataset = image_folder(folder, image_size=CROP, resize=RESIZE, in_memory=False)
    for images, _ in batches(dataset, batch_size=batch_size, workers=workers):
        yield images


def foreign(folder: Path, batch_size: int, workers: int) -> Iterator[Tensor]:
    dataset = torchvision_folder(folder)
    for images, _ in batches(dataset, batch_size=batch_size, workers=workers):
        yield images


def bare(folder: Path, batch_size: int, workers: int) -> Iterator[Tensor]:
    from torch.utils.data import DataLoader

    dataset = torchvision_folder(folder)
    for images, _ in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
        yield images


def torchvision_folder(folder: Path) -> Dataset[tuple[Tensor, int]]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [
        v2.Resize(RESIZE),
        v2.CenterCrop(CROP),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(RGB_MEAN, RGB_STD),
    ]
    return ImageFolder(str(folder), transform=v2.Compose(steps))


WAYS: dict[str, Callable[[Path, int, int], Iterator[Tensor]]] = {
    "image_folder": streamed,
    "ImageFolder in batches": foreign,
    "torchvision alone": bare,
}


def memory(pid: int | str = "self") -> int:
    """Return the bytes of a process and its descendants; pages they share count once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children")
        found = children.read_text().split() if pid != "self" else []
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return own + sum(memory(child) for child in found)


def make_photographs(folder: Path, images: int, seed: int) -> None:
    """Write seeded pictures of noise at all scales and a gradient, in one sub-folder per class."""
    random = np.random.default_rng(seed_from(seed, "photographs"))
    fields = [[field(random, cells) for _ in range(FIELDS)] for cells in SCALES]
    for number in range(images):
        target = folder / f"class {number % CLASSES}" / f"{number:06d}.jpg"
        target.parent.mkdir(exist_ok=True)
        if number >= DIFFERENT:
            first = number % DIFFERENT
            target.hardlink_to(folder / f"class {first % CLASSES}" / f"{first:06d}.jpg")
            continue
        picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
        for level, choices in enumerate(fields):
            down, right = random.integers(HEIGHT), random.integers(WIDTH)
            chosen = choices[random.integers(FIELDS)]
            picture += FALL**level * np.roll(chosen, (down, right), axis=(0, 1))
        picture += random.normal(0, 0.5, 3) * np.linspace(-1, 1, WIDTH)[:, None]
        picture += random.normal(0, 0.5, 3) * np.linspace(-1, 1, HEIGHT)[:, None, None]
        pixels = 255 / (1 + np.exp(-1.5 * picture))
        Image.fromarray(pixels.astype(np.uint8)).save(target, quality=QUALITY)


def field(random: np.random.Generator, cells: int) -> NDArray[np.float32]:
    """Return noise of ``cells`` cells along the longer side, (HEIGHT, WIDTH, 3)."""
    shape = (max(2, cells * HEIGHT // WIDTH), cells, 3)
    noise = torch.from_numpy(random.normal(size=shape).astype(np.float32)).permute(2, 0, 1)[None]
    smooth = torch.nn.functional.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")
    return smooth[0].permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
