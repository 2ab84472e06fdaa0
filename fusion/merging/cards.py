"""Merge cards: statistics of an expert's images, written by their owner, that replace the images.

A card is a safetensors file stored alongside the weights. For each layer it has the Gram matrix of
the inputs (with a column of ones, one matrix for each group of a convolution), for each batch norm
the mean and variance of its inputs, and for a linear head the share and the mean feature of each
class. It also has the classes, the number of images, and a digest of the corresponding weights. A
pool that has the cards of its experts (``BaseModelPool(…, cards={name: file})``) is merged by
methods that need no more, such as RegMean with batch norm folded, without one image.

The manual describes what a card reveals: statistics are no anonymisation.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fusion.data import seed_from
from fusion.errors import UserError
from fusion.merging.batch_norm import Calibration
from fusion.merging.members import layers_of
from fusion.merging.statistics.collecting import collected
from fusion.merging.statistics.gathering import Sample, check_labels
from fusion.modelpool import BaseModelPool
from fusion.modelpool.card import CARD_STATISTICS, CardNote, digest_weights, write
from fusion.options import FilePath, SampleSize, Seed, checked

SUFFIX = ".card.safetensors"


@checked
def write_card(
    modelpool: BaseModelPool,
    name: str,
    path: FilePath,
    *,
    images: SampleSize = 500,
    batch_size: SampleSize = 128,
    seed: Seed = 0,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write the card of one expert, measured in one pass over its training images.

    Args:
        modelpool: has the expert, its classes and its training images; no other member is needed.
        name: of the expert.
        path: the file.
        images: maximum number of images; the merge itself uses 500 by default.
        batch_size: images per forward pass.
        seed: of the draw of the images.
        device: where to compute.
        overwrite: whether the file may be replaced.
        progress: whether to show a progress bar; ``None`` shows it where there is a terminal.

    Returns:
        the path of the written file.

    Raises:
        UserError: there is no such expert, it has no training images or no outputs for their
            classes, or the file exists already.

    Example::

        >>> import tempfile, fusion
        >>> from fusion.data import ClassSubset, digits
        >>> from fusion.models import CifarResNet
        >>> network = CifarResNet(8, num_classes=3, in_channels=1)
        >>> images = ClassSubset(digits("train"), (0, 1, 2))
        >>> pool = fusion.BaseModelPool({"clinic": network}, train_datasets={"clinic": images})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/clinic.card.safetensors"
        ...     fusion.write_card(pool, "clinic", file, images=50, progress=False).name
        'clinic.card.safetensors'
    """
    path = Path(path).expanduser()
    check_card(modelpool, name, path, overwrite=overwrite)
    network = modelpool.load_model(name)
    calibration = Calibration(images=images, batch_size=batch_size, seed=seed)
    sample = Sample(modelpool, name, calibration, progress)
    found = collected(
        network,
        sample.batches(),
        CARD_STATISTICS,
        layers=layers_of(network, modelpool),
        seed=seed_from(seed, name),
        device=device,
    )
    note = CardNote(digest_weights(modelpool.tensors(name)), sample.images, modelpool.labels(name))
    write(path, note, found)
    return path


def check_card(modelpool: BaseModelPool, name: str, path: Path, *, overwrite: bool = False) -> None:
    """Check, before any work, that the card of an expert can be written.

    Raises:
        UserError: see :func:`write_card`.
    """
    if name not in modelpool:
        raise UserError(
            f"card={name}: the pool has no expert '{name}' (it has "
            f"{', '.join(modelpool.model_names) or 'none'}); name one of them"
        )
    if not modelpool.has_data("train", name):
        raise UserError(
            f"a card is measured on training images, and the pool has none of '{name}'; add them "
            f"to train_datasets"
        )
    if path.exists() and not overwrite:
        raise UserError(
            f"to={path}: the file is there already; choose another name, or overwrite=true"
        )
    check_labels(modelpool, name, "card")
