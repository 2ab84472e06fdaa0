"""Statistics of the experts' data for rules: names, shapes, and functions that gather them.

A rule names what it needs in :attr:`Rule.statistics <fusion.merging.rule.Rule.statistics>` and
reads it from a piece, for n experts:

``piece.statistics["gram"]``, (n, g, d + 1, d + 1), of a weight with g groups and d columns in each:
    the mean of x̃ᵀx̃ over images and output positions, where x̃ is the input patch of the position
    (the values multiplied by the columns of ``piece.matrices``) and a 1. So for a weight and bias
    W̃, row by row, diag(W̃ G W̃ᵀ) is the mean square of the layer's outputs. Layers that do not
    run, or not as a module of torch's own kind, have none.
``piece.statistics["fisher"]``, (n, *shape), of every parameter: the mean over examples of the
    squared gradient of log p(y | x), y as the model predicts it.
``piece.statistics["empirical_fisher"]``, (n, *shape), of every parameter:
    the same with y the true label.
``piece.statistics["moments"]``, (n, 2, c), of the running mean of a batch norm: mean and variance
    of the norm's inputs. Rules receive no running statistics; those of the result can be computed
    from these moments.
``piece.statistics["classes"]``, (n, k, d + 1), of the weight of a linear head with k outputs: the
    mean over images of e_y x̃ᵀ, where e_y is 1 at the label's output and 0 elsewhere, and x̃ the
    features and a 1. Experts with heads of different size have separate ones.
``piece.statistics["cross"]``, (n, g, out/g, d + 1), for sequential rules alone: the mean of y x̃ᵀ,
    where y is the output of the expert's layer, bias included, on the same images as x̃, which is
    taken behind the layers that are merged already.

All are float64. :func:`gather` measures each expert on its own training images, all requested
statistics in one pass, or reads them from the expert's card (:mod:`fusion.merging.cards`), and
:func:`collect` does so for one network. Merging layer after layer takes :func:`stages` and
:func:`prefix_moments`.
"""

from fusion.merging.statistics.collecting import STATISTICS, collect
from fusion.merging.statistics.gathering import check_statistics, gather
from fusion.merging.statistics.lookup import Statistics
from fusion.merging.statistics.prefix import Moments, prefix_moments
from fusion.merging.statistics.stages import stages

__all__ = [
    "STATISTICS",
    "Moments",
    "Statistics",
    "check_statistics",
    "collect",
    "gather",
    "prefix_moments",
    "stages",
]
