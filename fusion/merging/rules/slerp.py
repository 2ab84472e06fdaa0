"""The mean on the sphere: SLERP, and its extension to any number of experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusion.merging.rule import Piece, Rule
from fusion.options import checked
from fusion.weights import spherical_mean


@checked
@dataclass(frozen=True)
class Slerp(Rule):
    r"""The mean of the experts' directions on the sphere and of their norms on the line.

    For two experts, with the angle :math:`\Omega` between them as flat vectors and the share t of
    the second, the direction is

    .. math::

        \frac{\sin((1-t)\Omega)}{\sin\Omega} \frac{\theta_1}{\lVert\theta_1\rVert}
        + \frac{\sin(t\Omega)}{\sin\Omega} \frac{\theta_2}{\lVert\theta_2\rVert}

    (Shoemake, 1985) and the norm :math:`(1-t)\lVert\theta_1\rVert + t\lVert\theta_2\rVert`; for
    more it is the weighted Karcher mean (Buss and Fillmore, 2001). Each tensor is one vector:
    kernels, norm parameters and biases alike. Tensors that are parallel, opposite or 0 have no arc
    and are averaged on the line; see :func:`fusion.weights.spherical_mean`. No base is needed. The
    mean of n copies of an expert is that expert, bit for bit.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> merge_tensor(Slerp(), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
        tensor([0.7071, 0.7071])
    """

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        return spherical_mean(list(piece.experts), piece.shares)
