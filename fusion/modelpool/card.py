"""Merge cards: a file of statistics of one expert's images, for merging without the images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusion.errors import UserError, shown
from fusion.labels import LabelSpace
from fusion.modelpool.fingerprint import digest_tensors
from fusion.weights import SafetensorsSource, TensorInfo, TensorSource, save_safetensors
from fusion.weights.triangles import from_triangle, to_triangle, triangle_size

FORMAT = 1  # increase it when present readers could not read what is written
CARD_STATISTICS = ("gram", "moments", "classes")
_NOTE = "card"  # metadata: the card's note, as JSON
_DIGEST = "card.sha256"  # metadata: of the note and of all tensors
_SYMMETRIC = "gram/"  # prefix of the names of symmetric matrices


@dataclass(frozen=True)
class CardNote:
    """Note of a card on its origin.

    Attributes:
        weights: digest of the weights that it belongs to, see :func:`digest_weights`.
        images: number of images.
        labels: the classes of the network's outputs; ``None`` where they were unknown.
    """

    weights: str
    images: int
    labels: LabelSpace | None


class Card(TensorSource):
    """The statistics in a file that :func:`write` wrote, each read on access.

    Names are ``<statistic>/<state-dict key>``, see :mod:`fusion.merging.statistics`. The file has
    float32, symmetric matrices as upper triangles; values are returned as float64.

    Args:
        path: the file.

    Raises:
        UserError: there is no such file, or it is not a card, of another version, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._source = SafetensorsSource(self.path)
        text = self._source.metadata.get(_NOTE)
        if text is None:
            raise UserError(
                f"'{self.path}' is no merge card; write one with fusion_bench card=NAME to=FILE"
            )
        if self._source.metadata.get(_DIGEST) != _digest(text, self._source):
            raise self._damaged("its content is not what was written")
        self.note = self._read_note(text)

    def require_of(
        self, name: str, weights: TensorSource, labels: LabelSpace | None = None
    ) -> None:
        """Check that this is the card of a network.

        Args:
            name: of the network in its pool.
            weights: its tensors.
            labels: the classes of its outputs, where they are known.

        Raises:
            UserError: it is another network's.
        """
        layers = [full.partition("/")[2] for full in self if full.startswith(_SYMMETRIC)]
        strange = [key for key in layers if key not in weights]
        if strange:
            raise UserError(
                f"the card '{self.path}' has statistics of the layer '{strange[0]}', which "
                f"'{name}' lacks; give '{name}' a card of its own architecture"
            )
        mine = self.note.labels
        if labels is not None and mine is not None and not _alike(labels, mine):
            raise UserError(
                f"the card '{self.path}' is of a network with the classes {mine}, and '{name}' has "
                f"{labels}; give '{name}' its own card, or its owner's names as the pool's classes"
            )
        if digest_weights(weights) != self.note.weights:
            raise UserError(
                f"the card '{self.path}' belongs to other weights than those of '{name}'; write "
                f"the card again, from the weights that are merged"
            )

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a statistic, without reading it."""
        shape = self._source.info(name).shape
        if name.startswith(_SYMMETRIC):
            size = triangle_size(shape[1])
            shape = (shape[0], size, size)
        return TensorInfo(shape, torch.float64)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a part of a statistic as a vector in C order; a matrix is read whole for it."""
        if name.startswith(_SYMMETRIC):
            return self[name].flatten()[start:stop]
        return self._source.read(name, start, stop).double()

    def __getitem__(self, name: str) -> Tensor:
        values = self._source[name].double()
        if name.startswith(_SYMMETRIC):
            return from_triangle(values, triangle_size(values.shape[1]))
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def _read_note(self, text: str) -> CardNote:
        try:
            found = json.loads(text)
            version = found["format"]
            if version != FORMAT:
                raise UserError(
                    f"the card '{self.path}' has the format {shown(str(version))}, and this "
                    f"version reads {FORMAT}; write the card again"
                )
            labels = found["labels"]
            return CardNote(
                str(found["weights"]),
                int(found["images"]),
                None if labels is None else LabelSpace.from_json(labels),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged("its note cannot be read") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"the card '{self.path}' is damaged: {what}; ask its owner for it again")


def write(path: str | Path, note: CardNote, statistics: Iterable[tuple[str, Tensor]]) -> None:
    """Write a card, whole or not at all.

    Args:
        path: the file.
        note: the card's note.
        statistics: names ``<statistic>/<state-dict key>`` and statistics;
            symmetric matrices (g, c, c). They are consumed and compressed one by one.
    """
    tensors = {
        name: (to_triangle(tensor) if name.startswith(_SYMMETRIC) else tensor).float().contiguous()
        for name, tensor in statistics
    }
    text = json.dumps(
        {
            "format": FORMAT,
            "weights": note.weights,
            "images": note.images,
            "labels": None if note.labels is None else note.labels.to_json(),
        },
        sort_keys=True,
    )
    save_safetensors(path, tensors, {_NOTE: text, _DIGEST: _digest(text, tensors)})


def digest_weights(weights: TensorSource) -> str:
    """Return the SHA-256 of all floating-point tensors; counters of batches are ignored."""
    floating = [key for key in weights if weights.info(key).dtype.is_floating_point]
    return digest_tensors({key: weights[key] for key in floating})


def _alike(one: LabelSpace, other: LabelSpace) -> bool:
    """Return whether the classes are the same, regardless of the name of the task."""
    return one.for_task(None).equals(other.for_task(None))


def _digest(note: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256((note + digest_tensors(tensors)).encode()).hexdigest()
