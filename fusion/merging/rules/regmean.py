"""RegMean: the layer closest to each expert's on that expert's data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fusion.merging.rule import Need, Piece, Rule, mean_of_experts
from fusion.options import Share, checked
from fusion.weights.regression import Ridge, regression_mean


@checked
@dataclass(frozen=True, kw_only=True)
class RegMean(Rule):
    r"""The linear map closest to each expert's on the inputs of that expert.

    .. math::

        W = \bar W + \sum_i s_i (W_i - \bar W)\, \tilde G_i
        \Bigl(\sum_i s_i \tilde G_i + \rho I\Bigr)^{-1}, \qquad
        \tilde G_i = \alpha G_i + (1 - \alpha) \operatorname{diag} G_i, \qquad
        G_i = \frac{1}{N} \sum_x x x^T

    RegMean (Jin et al., 2023, arXiv 2212.09849, equation 2 and, for α, section 4), for inputs x of
    the layer in expert i. For ρ = 0 and regular Gram matrices that is the paper's
    :math:`(\sum_i G_i)^{-1} \sum_i G_i W_i^T`. They are not regular: a channel that never fires
    empties all of its columns. So the regression has a ridge ρ towards the mean of the experts
    :math:`\bar W`, not towards 0: directions without data are averaged. All arithmetic is float64.

    A convolution is a linear map of the patches under its kernel, one for each group, with the
    columns of :meth:`Piece.matrices <fusion.merging.Piece.matrices>`; depthwise kernels are
    solved, too. The bias is the weight of one more input that is 1, and is solved along with the
    weight; the paper averages biases, and other implementations take ``nn.Linear`` alone. Norm
    parameters, and weights and biases of layers that bring no Gram matrix (which the data never
    reaches), become the mean of the experts. Equal Gram matrices give the weighted mean, and n
    copies of an expert that expert, bit for bit. No base is needed.

    A weight brings ``statistics["gram"]``, (n, g, d+1, d+1) with d = in/g · kernel size: the mean
    over images and positions of the products of (x, 1).

    Args:
        off_diagonal: α, in [0, 1]; 0.9 as in the paper.
        ridge: ρ relative to the mean of the Gram matrices' diagonal, 1e-10 or more. With α below 1
            the default only has to settle columns without data.
        bias: whether biases are solved along with the weights; otherwise they are averaged.
        sequential: measure the Gram matrices behind the layers that are merged already, from the
            input to the output, instead of in the experts: RegMean++ (Nguyen et al., 2025, arXiv
            2508.03121). Refused where all experts share their images, for which it is the average.
        folded: first fold batch norm into the layer before it, so that a layer approximates each
            expert's layer and norm together. Then no images are needed to measure running
            statistics again.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[4.0, 4.0, 4.0]])]
        >>> gram = torch.stack([torch.diag(torch.tensor([1.0, 3.0, 0.0, 1.0])),
        ...                     torch.diag(torch.tensor([3.0, 1.0, 0.0, 1.0]))])[:, None]
        >>> merge_tensor(RegMean(), experts, statistics={"gram": gram}).round(decimals=3)
        tensor([[3., 1., 2.]])
    """

    off_diagonal: Share = 0.9
    ridge: Ridge = 1e-6
    bias: bool = True
    sequential: bool = False
    folded: bool = False

    needs = frozenset({Need.IMAGES})
    statistics = frozenset({"gram"})

    @property
    def affine(self) -> bool:
        """Whether biases are solved along with the weights."""
        return self.bias

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        if piece.key != piece.layer.weight or "gram" not in piece.statistics:
            return mean_of_experts(piece)
        weights, mean = piece.matrices(piece.experts), piece.matrices(mean_of_experts(piece))
        return piece.from_matrices(self._solve(piece, weights, mean)).to(piece.experts)

    def merge_affine(self, weight: Piece, bias: Piece) -> tuple[Tensor, Tensor]:
        """Return the merged weight and bias of one layer."""
        if not self.bias or "gram" not in weight.statistics:
            return self.merge(weight), self.merge(bias)
        weights, mean = weight.matrices(weight.experts), weight.matrices(mean_of_experts(weight))
        maps = weight.with_bias(weights, bias.experts)
        solved = self._solve(weight, maps, weight.with_bias(mean, mean_of_experts(bias)))
        merged, shift = weight.without_bias(solved)
        return merged.to(weight.experts), shift.to(bias.experts)

    def _solve(self, piece: Piece, matrices: Tensor, mean: Tensor) -> Tensor:
        """Return the regression mean of (n, g, out/g, columns), with or without the bias."""
        grams = piece.statistics["gram"]
        n, groups, _, columns = matrices.shape
        full = piece.experts[0].numel() // (groups * matrices.shape[2]) + 1
        if grams.shape != (n, groups, full, full):
            raise ValueError(
                f"the Gram matrices of '{piece.key}' have the shape {tuple(grams.shape)}, "
                f"not {(n, groups, full, full)}"
            )

        def terms() -> Iterator[tuple[Tensor, Tensor, float]]:
            for matrix, gram, share in zip(matrices, grams, piece.shares, strict=True):
                yield matrix, self._shrink(gram[..., :columns, :columns]), share

        return regression_mean(mean, terms(), ridge=self.ridge)

    def _shrink(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix with its entries off the diagonal multiplied by α."""
        shrunk = self.off_diagonal * gram.double()
        shrunk.diagonal(dim1=-2, dim2=-1).copy_(gram.diagonal(dim1=-2, dim2=-1))
        return shrunk
