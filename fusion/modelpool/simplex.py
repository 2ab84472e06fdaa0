"""A fixed head: the vertices of a regular simplex."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusion.data import seed_from
from fusion.errors import UserError
from fusion.models import Head
from fusion.weights import tensors_of


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
    generator = torch.Generator().manual_seed(seed_from("simplex", classes, features))
    random = torch.randn(features, classes, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(random).Q
    vertices = basis - basis.mean(1, keepdim=True)
    scaled: Tensor = vertices * (classes / (classes - 1)) ** 0.5
    return scaled.T.to(torch.float32).contiguous()


@torch.no_grad()
def set_simplex_head(
    model: nn.Module, head: Head, rows: Sequence[int], *, classes: int
) -> list[str]:
    """Write vertices of a simplex into the head of ``model``, in place; its bias becomes 0.

    Args:
        model: the network.
        head: its head: one linear layer.
        rows: the vertex of each output.
        classes: number of vertices of the simplex.

    Returns:
        The names of the tensors that remain to be trained.

    Raises:
        UserError: the head is no linear layer with one output for each of ``rows``, or its
            features are too few.
    """
    tensors = tensors_of(model)
    shapes = {key: tuple(tensors[key].shape) for key in head.tensors}
    weights = [key for key, shape in shapes.items() if len(shape) == 2]
    outputs = {shape[0] for shape in shapes.values() if shape}
    if len(weights) != 1 or len(shapes) > 2 or outputs != {len(rows)}:
        raise UserError(
            f"head=simplex needs a head of one linear layer with {len(rows)} outputs, one for each "
            f"class; this network's is {shapes}; give it one, or another head"
        )
    (weight,) = weights
    vertices = simplex_vertices(classes, shapes[weight][1])
    for key in shapes:
        tensors[key].zero_()
    tensors[weight].copy_(vertices[list(rows)])
    return [key for key in tensors if key not in head]
