"""The real download: a small archive in CIFAR-10's own format, served over HTTP."""

from __future__ import annotations

import functools
import hashlib
import http.server
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from fusion.data import cifar10
from fusion.errors import UserError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCH = 20  # images in each of the five training files and in the test file


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve the archive where torchvision looks for it; only addresses and checksums differ."""
    generator = np.random.default_rng(0)
    source = tmp_path / "source"
    base = source / CIFAR10.base_folder
    base.mkdir(parents=True)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        pixels = generator.integers(0, 256, (BATCH, 3072), dtype=np.uint8)
        entry = {"data": pixels, "labels": [i % 10 for i in range(BATCH)]}
        (base / name).write_bytes(pickle.dumps(entry))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    archive = source / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, arcname=CIFAR10.base_folder)

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        sums = [[name, md5(base / name)] for name, _ in getattr(CIFAR10, files)]
        monkeypatch.setattr(CIFAR10, files, sums)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(base / "batches.meta")})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    handler = functools.partial(Quiet, directory=str(source))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        url = f"http://127.0.0.1:{httpd.server_port}/{archive.name}"
        monkeypatch.setattr(CIFAR10, "url", url)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield source
        httpd.shutdown()


def test_download_splits_and_second_use(server: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    train = cifar10(root, "train")
    assert train.class_names == tuple(NAMES)
    assert train.images.shape == (5 * BATCH, 3, 32, 32)
    raw = pickle.loads((server / CIFAR10.base_folder / "data_batch_1").read_bytes())
    assert torch.equal(train.images[0].flatten(), torch.from_numpy(raw["data"][0]))
    assert train.labels[:BATCH].tolist() == raw["labels"]
    assert len(cifar10(root, "test", download=False)) == BATCH

    kept = cifar10(root, "train", val_images=30, download=False)
    held_out = cifar10(root, "val", val_images=30, download=False)
    assert torch.bincount(held_out.labels).tolist() == [3] * 10
    together = torch.cat([kept.images, held_out.images]).flatten(1)
    assert len(torch.unique(together, dim=0)) == len(together) == 5 * BATCH


def test_what_cannot_be_had_is_refused(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="set download=true"):
        cifar10(tmp_path / "empty", "train", download=False)
    with pytest.raises(UserError, match="the split 'val' is empty"):
        cifar10(tmp_path / "empty", "val")
    with pytest.raises(UserError, match="did you mean 'train'"):
        cifar10(tmp_path / "empty", "trian")  # type: ignore[arg-type]
    monkeypatch.setattr(CIFAR10, "url", CIFAR10.url + ".missing")
    with pytest.raises(UserError, match="check the network"):
        cifar10(tmp_path / "empty", "train")
