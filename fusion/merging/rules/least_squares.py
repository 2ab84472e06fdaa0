"""Layer-wise least squares: fit each expert's outputs behind the layers merged already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.merging.rule import Need, Piece, Pieces, Rule
from fusion.merging.rules.iso_c import IsoC
from fusion.merging.rules.mean import Mean
from fusion.merging.rules.task_arithmetic import TaskArithmetic
from fusion.options import checked
from fusion.weights.regression import Ridge, ridge_step

PRIORS: Mapping[str, Rule] = {
    "average": Mean(),
    "iso_c": IsoC(),
    "base": TaskArithmetic(scale=0.0),
}


@checked
@dataclass(frozen=True, kw_only=True)
class LeastSquares(Rule):
    r"""The linear map from outputs of the preceding merged layers to those of each expert's layer.

    .. math::

        \min_W \sum_i s_i \frac{1}{N_i} \lVert W X_i - Y_i \rVert^2
        + \rho \lVert W - W_0 \rVert^2,
        \qquad
        W = W_0 + \sum_i s_i (C_i - W_0 G_i) \Bigl(\sum_i s_i G_i + \rho I\Bigr)^{-1}

    Layers are merged from the input to the output. :math:`X_i` are the inputs of the layer behind
    the merged prefix on the images of expert i, :math:`Y_i` the outputs of that expert's own layer
    on the same images; :math:`G_i` is the mean of :math:`x x^T` and :math:`C_i` of :math:`y x^T`.
    So a layer also compensates for errors of the preceding layers. The regression is that of PLeaS
    (Nasery et al., 2024, arXiv 2407.02447, section 3.2), which takes gradient steps and starts from
    aligned networks; here it is solved in closed form, in float64, for any number of experts, for
    each group of a convolution, with the bias as the weight of an input that is 1.

    The ridge ρ pulls towards a prior :math:`W_0`, not towards 0: directions without data (a channel
    that never fires) are kept from the prior. Tensors other than weights and biases are those of
    the prior.

    A weight brings ``statistics["gram"]``, (n, g, d+1, d+1), and ``statistics["cross"]``,
    (n, g, out/g, d+1), for d = in/g · kernel size columns; see :mod:`fusion.merging.statistics`.

    Args:
        prior: :math:`W_0`: ``average``, ``iso_c``, ``base``, or a rule.
        ridge: ρ relative to the mean of the Gram matrices' diagonal, 1e-10 or more.
        folded: whether batch norm is folded into the layer before it, so that :math:`Y_i` is the
            output of the norm; otherwise it is the output of the convolution, whose location and
            scale the norm removes.

    Raises:
        UserError: an option is outside of its range, or the prior takes statistics of the data.

    Example, of one expert that returns 2 x₁, where the inputs have x₁ = 1 and x₂ = 0::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> statistics = {"gram": torch.diag(torch.tensor([1.0, 0.0, 1.0])).double()[None, None],
        ...               "cross": torch.tensor([2.0, 0.0, 0.0]).double()[None, None, None]}
        >>> rule = LeastSquares(ridge=1e-6)
        >>> expert = torch.tensor([[5.0, 7.0]])
        >>> merge_tensor(rule, [expert], statistics=statistics).round(decimals=3)
        tensor([[2., 7.]])
    """

    prior: Literal["average", "iso_c", "base"] | Rule = "average"
    ridge: Ridge = 1e-2
    folded: bool = True

    statistics = frozenset({"gram", "cross"})
    affine = True
    sequential = True

    def __post_init__(self) -> None:
        if self._prior.statistics:
            raise UserError(
                f"LeastSquares.prior: {type(self._prior).__name__} measures the experts' data "
                f"itself; choose {', '.join(PRIORS)}, or another rule on weights alone"
            )

    @property
    def _prior(self) -> Rule:
        return PRIORS[self.prior] if isinstance(self.prior, str) else self.prior

    @property
    def needs(self) -> frozenset[Need]:
        """Images, and the requirements of the prior."""
        return self._prior.needs | {Need.IMAGES}

    def prepare(self, pieces: Pieces) -> Any:
        """Return the plan of the prior."""
        return self._prior.prepare(pieces)

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        prior = self._prior.merge(piece)
        if piece.key != piece.layer.weight or "cross" not in piece.statistics:
            return prior
        return piece.from_matrices(self._solve(piece, piece.matrices(prior))).to(piece.experts)

    def merge_affine(self, weight: Piece, bias: Piece) -> tuple[Tensor, Tensor]:
        """Return the merged weight and bias of one layer."""
        priors = self._prior.merge_affine(weight, bias)
        if "cross" not in weight.statistics:
            return priors
        prior = weight.with_bias(weight.matrices(priors[0]), priors[1])
        merged, shift = weight.without_bias(self._solve(weight, prior))
        return merged.to(weight.experts), shift.to(bias.experts)

    def _solve(self, piece: Piece, prior: Tensor) -> Tensor:
        """Return the solution (g, out/g, columns), with or without a column for the bias."""
        columns = prior.shape[-1]
        prior = prior.double()
        shares = piece.statistics["gram"].new_tensor(piece.shares)
        gram = torch.einsum(
            "n,ngij->gij", shares, piece.statistics["gram"][..., :columns, :columns]
        )
        cross = torch.einsum("n,ngij->gij", shares, piece.statistics["cross"][..., :columns])
        return prior + ridge_step(cross - prior @ gram, gram, ridge=self.ridge)
