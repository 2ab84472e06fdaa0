"""Heads that are not trained: vertices of a regular simplex, or a vector per class from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fusion.data import seed_from
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.fingerprint import digest_tensors
from fusion.models import Head
from fusion.weights import load_safetensors, tensors_of


class FixedHead(Protocol):
    """Where the rows of a head that is not trained come from."""

    @property
    def option(self) -> str:
        """The option as a user writes it, for messages."""

    @property
    def recipe(self) -> str:
        """What determines the rows, as text."""

    def rows(self, known: LabelSpace, outputs: Sequence[int], features: int) -> Tensor:
        """Return the row of each output.

        Args:
            known: the classes of the whole data set.
            outputs: position in ``known`` of the class of each output.
            features: length of a row.

        Returns:
            (outputs, features) float32.
        """


@dataclass(frozen=True)
class Simplex:
    """A vertex of a regular simplex for each class: :func:`simplex_vertices`."""

    @property
    def option(self) -> str:
        """The option as a user writes it."""
        return "head=simplex"

    @property
    def recipe(self) -> str:
        """The kind of head; the classes of the data set determine the rest."""
        return "simplex"

    def rows(self, known: LabelSpace, outputs: Sequence[int], features: int) -> Tensor:
        """Return the vertices of the outputs' classes, of a simplex of all known classes.

        Raises:
            UserError: there are fewer features than classes.
        """
        return simplex_vertices(len(known), features)[list(outputs)]


@dataclass(frozen=True)
class ClassVectors:
    """A vector for each class from a file, such as the features of its name by a text encoder.

    Args:
        path: safetensors file with a vector per class under the name of the class, all of one
            length. Classes without names go by their labels ("0", "1", ...).
    """

    path: Path

    @property
    def option(self) -> str:
        """The option as a user writes it."""
        return f"head={self.path}"

    @property
    def recipe(self) -> str:
        """The content of the file, independent of its path."""
        return f"vectors {digest_tensors(self._load())}"

    def rows(self, known: LabelSpace, outputs: Sequence[int], features: int) -> Tensor:
        """Return the vectors of the outputs' classes in the space of a network's features.

        All vectors of the file are placed together (:func:`placed`), so that networks of different
        classes share the file's angles.

        Raises:
            UserError: a class has no vector, the vectors differ in length or have no direction, or
                they do not fit into the features.
        """
        vectors = self._load()
        wanted = known.select(outputs).shown
        names = sorted(vectors)
        shapes = {tuple(vector.shape) for vector in vectors.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise UserError(
                f"{self.option}: its tensors have the shapes {sorted(shapes)}; give one vector "
                f"per class, all of the same length"
            )
        if missing := [name for name in wanted if name not in vectors]:
            raise UserError(
                f"{self.option}: no vector for class '{missing[0]}'; it has vectors for "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
        stacked = torch.stack([vectors[name].double() for name in names])
        lengths = stacked.norm(dim=1)
        if not bool((lengths.isfinite() & (lengths > 0)).all()):
            worst = names[int((~(lengths.isfinite() & (lengths > 0))).nonzero()[0])]
            raise UserError(
                f"{self.option}: the vector of class '{worst}' is zero or not finite; a class "
                f"needs a direction"
            )
        try:
            found = placed(stacked / lengths[:, None], features)
        except UserError as error:
            raise UserError(f"{self.option}: {error}") from error
        return found[[names.index(name) for name in wanted]]

    def _load(self) -> dict[str, Tensor]:
        try:
            return load_safetensors(self.path)
        except UserError as error:
            raise UserError(f"{self.option}: {error}") from error


def placed(vectors: Tensor, features: int) -> Tensor:
    """Return vectors with the same lengths and angles in a space of ``features`` dimensions.

    A fixed head fixes lengths and angles alone: training adapts a network's features to its
    directions. Vectors of length ``features`` are returned unchanged. Longer ones are replaced by
    the rows of the symmetric root of their Gram matrix, which has the same inner products in as
    many dimensions as there are vectors. Then all are turned by a random rotation, drawn for these
    sizes, so that separately trained networks share it.

    Args:
        vectors: (vectors, length).
        features: dimensions of the new space.

    Returns:
        (vectors, features) float32.

    Raises:
        UserError: the vectors are longer, and more than there are features.

    Example::

        >>> texts = torch.nn.functional.normalize(torch.randn(3, 512), dim=1)
        >>> rows = placed(texts, 8)
        >>> rows.shape, bool(torch.allclose(rows @ rows.T, texts @ texts.T, atol=1e-5))
        (torch.Size([3, 8]), True)
    """
    count, length = vectors.shape
    if length != features and min(count, length) > features:
        raise UserError(
            f"{count} vectors of length {length} do not fit into the {features} features of the "
            f"network; keep only the vectors of the classes of all networks to be merged, or take "
            f"a network with more features"
        )
    vectors = vectors.double()
    if length == features:
        return vectors.float()
    if length > features:
        values, directions = torch.linalg.eigh(vectors @ vectors.T)
        vectors = (directions * values.clamp(min=0).sqrt()) @ directions.T
    return (vectors @ _basis("vectors", vectors.shape[1], features).T).float()


def simplex_vertices(classes: int, features: int) -> Tensor:
    """Return one unit vector per class, any two of them at the same, largest possible angle.

    They are the columns of

    .. math:: \\sqrt{K / (K - 1)}\\; U (I_K - 1_K 1_K^\\top / K)

    for K classes, where U has orthonormal columns: a simplex equiangular tight frame, to which the
    last layer of a trained network tends (Papyan, Han and Donoho, "Prevalence of neural collapse",
    2020, equation 4), and which serves as a fixed classifier (Yang et al., "Inducing Neural
    Collapse in Imbalanced Learning", 2022, equation 1). U is random, drawn for these sizes, so that
    separately trained networks share it.

    Args:
        classes: K, two or more.
        features: length of the vectors, K or more.

    Returns:
        (classes, features) float32.

    Raises:
        UserError: there are fewer features than classes.

    Example::

        >>> vertices = simplex_vertices(3, 8)
        >>> (vertices @ vertices.T).round(decimals=4).tolist()
        [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    if classes < 2 or features < classes:
        raise UserError(
            f"a simplex of {classes} classes in {features} features: give two classes or more, "
            f"and a network with one feature or more per class"
        )
    basis = _basis("simplex", classes, features)
    vertices = basis - basis.mean(1, keepdim=True)
    scaled: Tensor = vertices * (classes / (classes - 1)) ** 0.5
    return scaled.T.to(torch.float32).contiguous()


def _basis(purpose: str, columns: int, features: int) -> Tensor:
    """Return (features, columns) float64 with orthonormal columns, the same in every network."""
    generator = torch.Generator().manual_seed(seed_from(purpose, columns, features))
    random = torch.randn(features, columns, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(random).Q
    return basis


@torch.no_grad()
def set_fixed_head(
    model: nn.Module, head: Head, fixed: FixedHead, known: LabelSpace, outputs: Sequence[int]
) -> list[str]:
    """Write the rows of a fixed head into the head of ``model``, in place; its bias becomes 0.

    Args:
        model: the network.
        head: its head: one linear layer.
        fixed: where the rows come from.
        known: the classes that share the fixed head.
        outputs: position in ``known`` of the class of each output.

    Returns:
        The names of the tensors that remain to be trained.

    Raises:
        UserError: the head is no linear layer with one output for each of ``outputs``, or ``fixed``
            has no rows for it.
    """
    tensors = tensors_of(model)
    shapes = {key: tuple(tensors[key].shape) for key in head.tensors}
    weights = [key for key, shape in shapes.items() if len(shape) == 2]
    sizes = {shape[0] for shape in shapes.values() if shape}
    if len(weights) != 1 or len(shapes) > 2 or sizes != {len(outputs)}:
        raise UserError(
            f"{fixed.option} needs a head of one linear layer with {len(outputs)} outputs, one for "
            f"each class; this network's is {shapes}; give it one, or another head"
        )
    (weight,) = weights
    rows = fixed.rows(known, outputs, shapes[weight][1])
    for key in shapes:
        tensors[key].zero_()
    tensors[weight].copy_(rows)
    return [key for key in tensors if key not in head]
