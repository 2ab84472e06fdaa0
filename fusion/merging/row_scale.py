"""Rescale experts to the base, channel by channel, where batch norm makes the scale arbitrary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fusion.merging.folding import Folding, find_foldings
from fusion.merging.members import Members
from fusion.weights import StateDictSource, widened


def with_rows_of_base(members: Members) -> Members:
    r"""Return the members with each expert's kernels scaled to the row norms of the base.

    Batch norm undoes any positive factor of a channel that enters it, so the row norms of a kernel
    before it do not affect the function, but do affect a rule that compares or adds kernels. With

    .. math::
        s_r = \lVert W_{0,r} \rVert / \lVert W_r \rVert, \qquad
        W_r \to s_r W_r, \quad \mu_r \to s_r \mu_r, \quad
        \sigma^2_r + \epsilon \to s_r^2 (\sigma^2_r + \epsilon)

    each expert computes the same function, up to rounding (and up to :math:`\epsilon` where a
    variance would fall below 0). Without a base the first expert is the reference. Rows of zeros
    are not changed.
    """
    foldings = find_foldings(members.network, members.layers)
    reference = members.base or next(iter(members.experts.values()))

    def form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {key: tensors[key] for key in tensors}
        for folding in foldings.values():
            found |= _scaled(folding, tensors, reference[folding.layer.weight])
        return found

    experts = {name: StateDictSource(form(found)) for name, found in members.experts.items()}
    return replace(members, experts=experts)


def _scaled(
    folding: Folding, tensors: Mapping[str, Tensor], reference: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of one layer and its norm at the row norms of ``reference``."""
    weight = tensors[folding.layer.weight]
    own, wanted = (tensor.double().flatten(1).norm(dim=1) for tensor in (weight, reference))
    factor = torch.where((own > 0) & (wanted > 0), wanted / own.where(own > 0, 1), 1)
    mean, variance = (f"{folding.norm}.running_{which}" for which in ("mean", "var"))
    spread = factor.square() * (tensors[variance].double() + folding.eps) - folding.eps
    state = {
        folding.layer.weight: weight.double() * factor.view(-1, *[1] * (weight.ndim - 1)),
        mean: tensors[mean].double() * factor,
        variance: spread.clamp(min=0),
    }
    if folding.has_bias:
        bias = f"{folding.layer.name}.bias"
        state[bias] = tensors[bias].double() * factor
    return {key: tensor.to(widened(tensors[key]).dtype) for key, tensor in state.items()}
