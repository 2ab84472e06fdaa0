"""The statistics of all experts, each on its own images or from its card, gathered once."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusion.data import batches, label_space, number_of_batches, seed_from
from fusion.errors import UserError
from fusion.files import only_one, require_writable_folder
from fusion.merging.batch_norm import Calibration
from fusion.merging.members import Members
from fusion.merging.statistics.collecting import BY_LABELS, Batch, check_names, collected
from fusion.merging.statistics.lookup import Statistics
from fusion.merging.statistics.store import read_statistics, write_statistics
from fusion.modelpool import BaseModelPool
from fusion.modelpool.card import CARD_STATISTICS
from fusion.modelpool.fingerprint import digest_tensors
from fusion.models import Layer
from fusion.weights import StateDictSource, TensorSource, image_dtype

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same recipe would give other statistics than before
_NAME_LENGTH = 16  # hexadecimal digits of the recipe's hash in a folder name: 64 bits


def gather(
    modelpool: BaseModelPool,
    members: Members,
    names: Collection[str],
    *,
    layers: Sequence[Layer] | None = None,
    calibration: Calibration | None = None,
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
) -> Statistics:
    """Return the statistics of all experts, each on its own training images or from its card.

    An expert that has a card is not run, whether the pool has images of it or not.

    Args:
        modelpool: has the experts as networks, and their data or cards.
        members: the experts' tensors, in the order of units that the statistics should have.
        names: of the statistics; :mod:`fusion.merging.statistics` lists them.
        layers: the layers to measure; by default all layers of the members.
        calibration: the sample of each expert's images.
        device: where to compute.
        cache_dir: folder in which statistics are stored under a hash of weights, images and
            options, and from which this and later calls read them tensor by tensor. Two concurrent
            calls gather once, a killed process leaves a complete folder or none, and a damaged one
            is detected by its checksums. By default all statistics are in memory and nothing is
            stored.
        progress: whether to show a progress bar; ``None`` shows it where there is a terminal.

    Raises:
        UserError: an unknown name, an expert without images, or a folder that cannot be written to.
    """
    check_statistics(modelpool, names)
    calibration = calibration or Calibration()
    layers = members.layers if layers is None else layers
    if cache_dir is not None:
        cache_dir = require_writable_folder(Path(cache_dir).expanduser(), "cache_dir")
    sources: list[TensorSource] = []
    for name in members.names:
        card = modelpool.card(name)
        if card is not None:
            sources.append(card)
            continue
        network = modelpool.load_model(name)
        network.load_state_dict(dict(members.experts[name]))
        sample = Sample(modelpool, name, calibration, progress)

        def found(
            network: nn.Module = network, sample: Sample = sample, name: str = name
        ) -> Iterator[tuple[str, Tensor]]:
            return collected(
                network,
                sample.batches(),
                names,
                layers=layers,
                seed=seed_from(calibration.seed, name),
                device=device,
            )

        if cache_dir is None:
            sources.append(StateDictSource(dict(found())))
            continue
        recipe = _recipe(network, sample, names, layers, calibration)
        folder = cache_dir / f"{name}-{_digest(recipe)[:_NAME_LENGTH]}.statistics"
        with only_one(folder, name):
            kept = read_statistics(folder, recipe)
            if kept is None:
                write_statistics(folder, recipe, found())
                kept = read_statistics(folder, recipe)
            else:
                log.info("%s: statistics found in the cache (%s)", name, folder.name)
        assert kept is not None
        sources.append(kept)
    return Statistics(sources)


def check_statistics(modelpool: BaseModelPool, names: Collection[str]) -> None:
    """Check, before any work, that statistics can be gathered.

    Raises:
        UserError: an unknown name, or an expert without images and without a card that has these
            statistics or, where true labels are requested, without outputs for its own classes.
    """
    check_names(names)
    missing = sorted(set(names) - set(CARD_STATISTICS))
    with_images: list[str] = []
    for name in modelpool.model_names:
        if not modelpool.has_card(name):
            with_images.append(name)
        elif missing:
            raise UserError(
                f"the merge needs {', '.join(missing)} of the experts' images, and the card of "
                f"'{name}' has only {', '.join(CARD_STATISTICS)}; choose method=regmean "
                f"method.rule.folded=true, which needs no more, or take '{name}' out of cards and "
                f"add its images to train_datasets"
            )
    lacking = [name for name in with_images if not modelpool.has_data("train", name)]
    if names and lacking:
        raise UserError(
            f"statistics ({', '.join(sorted(names))}) are measured on training images of each "
            f"expert, and the pool has none of {', '.join(lacking)}; add them to train_datasets, "
            f"or the experts' cards to cards"
        )
    for statistic in BY_LABELS:
        for name in with_images if statistic in names else ():
            check_labels(modelpool, name, statistic)


def check_labels(modelpool: BaseModelPool, name: str, statistic: str) -> None:
    """Check that an expert has an output for each class of its training data.

    Args:
        modelpool: has the expert and its data.
        name: of the expert.
        statistic: the statistic that uses the labels.

    Raises:
        UserError: an output is missing.
    """
    outputs, classes = modelpool.labels(name), label_space(modelpool.dataset(name))
    if outputs is not None and classes is not None and not outputs.covers(classes):
        raise UserError(
            f"{statistic}: the training data of '{name}' has the classes {classes}, and its "
            f"outputs stand for {outputs}; take labels from the model, or say which classes they "
            f"are"
        )


class Sample:
    """The images of one expert, drawn at random; every pass over them is the same.

    Args:
        modelpool: has the expert's data and classes.
        name: of the expert.
        calibration: how many images, in which batches, drawn with which seed.
        progress: whether to show a progress bar; ``None`` shows it where there is a terminal.
    """

    def __init__(
        self, modelpool: BaseModelPool, name: str, calibration: Calibration, progress: bool | None
    ) -> None:
        self._modelpool, self._name = modelpool, name
        self._dataset = modelpool.dataset(name)
        self._calibration = calibration
        self._hidden = None if progress is None else not progress

    def batches(self) -> Iterator[Batch]:
        """Yield images, and labels as numbers of the network's outputs where these are known."""
        size, limit = self._calibration.batch_size, self._calibration.images
        positions = _positions(self._modelpool, self._name)
        for images, labels in tqdm(
            self._drawn(),
            total=number_of_batches(self._dataset, batch_size=size, limit=limit),
            desc=f"{self._name}: statistics",
            unit="batch",
            disable=self._hidden,
        ):
            yield images, labels if positions is None else positions[labels]

    @property
    def images(self) -> int:
        """Number of images."""
        return min(self._calibration.images, len(self._dataset))

    @property
    def digest(self) -> str:
        """A hash of the images and labels."""
        digest = hashlib.sha256()
        for images, labels in self._drawn():
            digest.update(digest_tensors({"images": images, "labels": labels}).encode())
        return digest.hexdigest()

    def _drawn(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(
            self._dataset,
            batch_size=self._calibration.batch_size,
            shuffle=True,
            seed=seed_from(self._calibration.seed, "statistics"),
            limit=self._calibration.images,
        )


def _positions(modelpool: BaseModelPool, name: str) -> Tensor | None:
    """Return the output of each label of an expert's data, (classes of the data,).

    ``None`` where the classes of either are unknown, or the network has no output for one of them:
    labels are then taken to be numbers of outputs.
    """
    outputs, classes = modelpool.labels(name), label_space(modelpool.dataset(name))
    if outputs is None or classes is None:
        return None
    positions = outputs.positions(classes)
    return None if positions is None else torch.tensor(positions)


def _recipe(
    network: nn.Module,
    sample: Sample,
    names: Collection[str],
    layers: Sequence[Layer],
    calibration: Calibration,
) -> str:
    """Return everything that determines the statistics of one expert, as text."""
    weights = {k: t for k, t in network.state_dict().items() if isinstance(t, Tensor)}
    return json.dumps(
        {
            "format": FORMAT,
            "weights": digest_tensors(weights),
            "network": _digest(str(network)),
            "code": _code(network),
            "data": sample.digest,
            "names": sorted(names),
            "layers": [layer.weight for layer in layers],
            "images": calibration.images,
            "batch_size": calibration.batch_size,
            "seed": calibration.seed,
            "dtype": str(image_dtype(network)),
        },
        sort_keys=True,
    )


def _code(network: nn.Module) -> list[str]:
    """Return hashes of the files that define a network's classes, torch's own apart."""
    files = set()
    for kind in {type(module) for module in network.modules()}:
        if not kind.__module__.startswith("torch."):
            # A class that was typed into a shell has no file.
            with contextlib.suppress(TypeError):
                files.add(inspect.getsourcefile(kind))
    return sorted(hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
