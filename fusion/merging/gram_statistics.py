"""Running statistics of a merged network from the Gram matrices of its experts' inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion.merging.batch_norm import mixture_statistics, statistics_keys
from fusion.merging.folding import find_foldings
from fusion.merging.members import LayerChoice, Members
from fusion.merging.statistics import Statistics
from fusion.weights import tensors_of


def statistics_from_grams(
    members: Members, choice: LayerChoice, network: nn.Module, statistics: Statistics
) -> dict[str, Tensor]:
    r"""Return the running statistics that the merged layers have on the experts' inputs.

    .. math::

        \mu = W m + c, \qquad \sigma^2 = \operatorname{diag}(W G W^T) - (W m)^2, \qquad
        \begin{pmatrix} G & m \\ m^T & 1 \end{pmatrix} = \sum_i s_i \tilde G_i

    for a layer with the merged weight W and bias c, and :math:`\tilde G_i` the Gram matrix of the
    layer's inputs in expert i, with a column of ones. This accounts, without images, for the
    variance that averaging weights loses, but not for the merging of the preceding layers. Norms
    that are not right behind a layer get mean and variance of the mixture of what they receive in
    the experts.

    Args:
        members: base and experts.
        choice: the merged layers, and the experts' shares in them.
        network: the merged network.
        statistics: ``gram`` and ``moments`` of the experts.

    Returns:
        State-dict key → running mean or variance, for the norms of the chosen layers; those of the
        head are left out.
    """
    state = tensors_of(network)
    foldings = find_foldings(members.network, members.layers)
    found: dict[str, Tensor] = {}
    for layer in members.layers:
        if layer.name not in choice:
            continue
        shares = choice.shares[layer.name]
        folding = foldings.get(layer.name)
        if folding is not None and "gram" in statistics.get(layer.weight, {}):
            grams = statistics[layer.weight]["gram"]
            mixture = torch.einsum("n,n...->...", grams.new_tensor(shares), grams)
            made = folding.statistics(state[layer.weight], mixture[None])
            if folding.has_bias:
                made[f"{folding.norm}.running_mean"] += state[f"{layer.name}.bias"].double()
            found |= made
        for mean_key, variance_key in statistics_keys(members.network, layer.norms):
            moments = statistics.get(mean_key, {}).get("moments")
            if moments is not None and mean_key not in found:
                mean, variance = mixture_statistics(
                    list(moments[:, 0]), list(moments[:, 1]), shares
                )
                found |= {mean_key: mean, variance_key: variance}
    return {
        key: tensor.to(state[key].dtype) for key, tensor in found.items() if key not in members.head
    }
