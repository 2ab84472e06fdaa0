"""Fold batch norm into the preceding layer, so that a rule sees one affine map.

A convolution W with bias c and the batch norm behind it compute γ/σ · W x + β - γ/σ · (μ - c) in
evaluation. The folded form of a network has that map in tensors of the same names: the weight is
γ/σ · W, the norm's bias is the whole bias, the norm's weight is 1, its mean 0 and its variance 1 -
ε. It computes the same function, and the weights no longer contain the scale of a convolution that
its norm cancels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.models import Layer
from fusion.models.forward_pass import symbolic_graph
from fusion.models.layers import without_values
from fusion.weights import widened


@dataclass(frozen=True)
class Folding:
    """A layer and the batch norm that alone reads its output.

    Attributes:
        layer: the layer; not a transposed convolution.
        norm: dotted name of the norm.
        eps: ε of the norm.
        has_bias: whether the layer has a bias.
    """

    layer: Layer
    norm: str
    eps: float
    has_bias: bool

    def folded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the folded form of this layer and norm in a network with these tensors."""
        weight = tensors[self.layer.weight]
        variance = tensors[f"{self.norm}.running_var"].double()
        scale = tensors[f"{self.norm}.weight"].double() / (variance + self.eps).sqrt()
        shift = -tensors[f"{self.norm}.running_mean"].double()
        if self.has_bias:
            shift = shift + tensors[f"{self.layer.name}.bias"].double()
        bias = tensors[f"{self.norm}.bias"].double() + scale * shift
        mean, deviation = torch.zeros_like(bias), torch.ones_like(bias)
        state = {
            self.layer.weight: weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)),
            **self._norm(mean, deviation, bias),
        }
        return {key: tensor.to(widened(tensors[key]).dtype) for key, tensor in state.items()}

    def normalised(self, bias: Tensor, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
        """Return the tensors that, with the weight, represent a folded map x → W x + bias.

        The running statistics become those of the norm's inputs, so that they can be measured again
        on other images.

        Args:
            bias: of the folded map, (out,).
            mean: of W x over images and positions, (out,).
            variance: of W x, (out,).
        """
        return self._norm(mean, (variance + self.eps).sqrt(), bias + mean)

    def of_map(self, weight: Tensor, bias: Tensor, grams: Tensor | None) -> dict[str, Tensor]:
        """Return the tensors that, with the weight, represent a folded map x → W x + bias.

        The running statistics become those of W x, which the norm receives, so that they can be
        measured again on other images.

        Args:
            weight: W, in its own shape.
            bias: of the folded map, (out,).
            grams: of the layer's inputs, (n, g, d + 1, d + 1), which count alike; without any, the
                norm only adds the bias.
        """
        if grams is None:
            return self._norm(torch.zeros_like(bias), torch.ones_like(bias), bias)
        mean, variance = self._moments(weight, grams)
        return self._norm(mean, (variance + self.eps).sqrt(), bias.to(mean) + mean)

    def statistics(self, weight: Tensor, grams: Tensor) -> dict[str, Tensor]:
        """Return the running mean and variance of W x over inputs with these Gram matrices."""
        mean, variance = self._moments(weight, grams)
        return {f"{self.norm}.running_mean": mean, f"{self.norm}.running_var": variance}

    def _moments(self, weight: Tensor, grams: Tensor) -> tuple[Tensor, Tensor]:
        gram = grams.double().mean(0)
        matrices = weight.to(gram).reshape(len(gram), -1, gram.shape[-1] - 1)
        mean = (matrices @ gram[:, :-1, -1:]).flatten()
        squares = (matrices @ gram[:, :-1, :-1] * matrices).sum(-1).flatten()
        return mean, (squares - mean.square()).clamp(min=0)

    def _norm(self, mean: Tensor, deviation: Tensor, bias: Tensor) -> dict[str, Tensor]:
        state = {
            f"{self.norm}.running_mean": mean,
            f"{self.norm}.running_var": deviation.square() - self.eps,
            f"{self.norm}.weight": deviation,
            f"{self.norm}.bias": bias,
        }
        if self.has_bias:
            state[f"{self.layer.name}.bias"] = torch.zeros_like(bias)
        return state


def find_foldings(network: nn.Module, layers: Sequence[Layer]) -> dict[str, Folding]:
    """Return, by the layer's name, the batch norms directly behind a layer.

    Both must run once, as modules, and nothing else may read the layer's output. A network whose
    forward pass cannot be traced has none, because other readers of an output are unknown there.
    Transposed convolutions and norms without a weight or without running statistics have none
    either.

    Args:
        network: the network; it may live on the meta device.
        layers: its layers.
    """
    graph = symbolic_graph(without_values(network).eval())
    if isinstance(graph, str):
        return {}
    modules = dict(network.named_modules())
    by_name = {layer.name: layer for layer in layers if layer.kind != "conv_transpose"}
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        layer, norm = _before(node), modules.get(str(node.target))
        if (
            layer in by_name
            and isinstance(norm, _BatchNorm)
            and norm.affine
            and norm.running_mean is not None
            and calls[layer] == calls[str(node.target)] == 1
            and by_name[layer].weight == f"{layer}.weight"
            and set(_own_keys(norm, str(node.target))) <= set(by_name[layer].tensors)
        ):
            has_bias = getattr(modules[layer], "bias", None) is not None
            found[layer] = Folding(by_name[layer], str(node.target), norm.eps, has_bias)
    return found


def _before(node: fx.Node) -> str | None:
    """Return the name of the module whose output only this module reads."""
    parents = node.all_input_nodes
    if node.op != "call_module" or len(parents) != 1 or parents[0].op != "call_module":
        return None
    return str(parents[0].target) if list(parents[0].users) == [node] else None


def _own_keys(module: nn.Module, name: str) -> list[str]:
    return [f"{name}.{key}" for key in module.state_dict()]
