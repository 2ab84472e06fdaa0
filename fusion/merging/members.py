"""What is merged: the base and the experts as layers, tensors and heads, read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusion.data import seed_from
from fusion.merging.batch_norm import statistics_keys
from fusion.merging.folding import Folding, find_foldings
from fusion.merging.rule import Piece
from fusion.modelpool import BaseModelPool
from fusion.models import Head, Layer, find_layers
from fusion.models.forward_pass import is_traceable
from fusion.weights import StateDictSource, TensorSource, tensors_of, working_dtype


@dataclass(frozen=True)
class LayerChoice:
    """Which layers are merged, and how much of each expert goes into each of them.

    Attributes:
        shares: layer → one number for each expert, summing to 1; a layer that is not named stays
            as the base has it.
    """

    shares: Mapping[str, tuple[float, ...]]

    def __contains__(self, layer: object) -> bool:
        return layer in self.shares


def layers_of(network: nn.Module, modelpool: BaseModelPool) -> tuple[Layer, ...]:
    """Return the layers of a pool's architecture; one that cannot be traced runs on an image."""
    if is_traceable(network):
        return find_layers(network)
    return find_layers(network, modelpool.example_input())


def every_layer(members: Members, weights: tuple[float, ...] | None = None) -> LayerChoice:
    """Return the choice of all layers, with the same shares in each; equal ones by default."""
    count = len(members.names)
    shares = tuple(1 / count for _ in range(count)) if weights is None else weights
    return LayerChoice({layer.name: shares for layer in members.layers})


@dataclass(frozen=True, eq=False)
class Members:
    """Base and experts of a pool, ready to be merged.

    Attributes:
        network: the base, or the first expert where there is no base: what is not merged is its.
        base: the base's state dict; ``None`` where there is no base.
        experts: name → the expert's tensors, in the order of the reference's units.
        layers: the layers in the order of the forward pass.
        head: the tensors that belong to one task alone.
        foldings: layer → the norm that base and experts have folded into it; see :meth:`folded`.
    """

    network: nn.Module
    base: Mapping[str, Tensor] | None
    experts: Mapping[str, TensorSource]
    layers: tuple[Layer, ...]
    head: Head
    foldings: Mapping[str, Folding] = field(default_factory=dict)

    @classmethod
    def read(cls, modelpool: BaseModelPool) -> Members:
        """Read the members of a pool; its experts are read tensor by tensor where possible."""
        network = modelpool.load_pretrained_or_first_model()
        return cls(
            network=network,
            base=tensors_of(network) if modelpool.has_pretrained else None,
            experts={name: modelpool.tensors(name) for name in modelpool.model_names},
            layers=layers_of(network, modelpool),
            head=modelpool.head,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(self.experts)

    def folded(self) -> Members:
        """Return the members with batch norm folded into the layer before it.

        Tensors keep their names, and the members compute what they did; see
        :mod:`fusion.merging.folding`. What is not merged stays as ``network`` has it.
        """
        foldings = find_foldings(self.network, self.layers)

        def form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = {key: tensors[key] for key in tensors}
            for folding in foldings.values():
                found |= folding.folded(tensors)
            return found

        return replace(
            self,
            base=None if self.base is None else form(self.base),
            experts={name: StateDictSource(form(found)) for name, found in self.experts.items()},
            foldings=foldings,
        )

    def bias(self, layer: Layer) -> str:
        """Return the state-dict key that the bias of a layer has, or would have."""
        if layer.name in self.foldings:
            return f"{self.foldings[layer.name].norm}.bias"
        owner = layer.weight.rpartition(".")[0]
        return f"{owner}.bias" if owner else "bias"

    def parameters(self, layer: Layer) -> tuple[str, ...]:
        """Return the floating-point tensors of a layer, running statistics of batch norm apart."""
        statistics = {key for pair in statistics_keys(self.network, layer.norms) for key in pair}
        state = tensors_of(self.network)
        return tuple(
            key
            for key in layer.tensors
            if key not in statistics and key in state and state[key].is_floating_point()
        )

    def pieces(
        self,
        choice: LayerChoice,
        *,
        with_head: bool,
        device: torch.device | str = "cpu",
        seed: int = 0,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
        plan: Any = None,
    ) -> Iterator[Piece]:
        """Yield the tensors that are merged, in the order of the forward pass, one at a time.

        A tensor that stands under several names comes once, under its first.

        Args:
            choice: which layers, and the experts' shares.
            with_head: whether the head is merged like any layer.
            device: where the tensors are wanted.
            seed: of everything random.
            statistics: state-dict key → name → statistics of the experts' data.
            plan: what the rule made of the whole network.
        """
        seen: set[int] = set()
        state = self.network.state_dict(keep_vars=True)
        last = max(len(self.layers) - 1, 1)
        for position, layer in enumerate(self.layers):
            if layer.name not in choice:
                continue
            for key in self.parameters(layer):
                if id(state[key]) in seen or (key in self.head and not with_head):
                    continue
                seen.add(id(state[key]))
                tensors = [self.experts[name][key] for name in self.names]
                base = None if self.base is None else self.base[key]
                dtype = working_dtype([*tensors, *([] if base is None else [base])])
                yield Piece(
                    key=key,
                    layer=layer,
                    bias=self.bias(layer),
                    depth=position / last,
                    base=None if base is None else _plain(base, device, dtype),
                    experts=torch.stack([_plain(t, device, dtype) for t in tensors]),
                    names=self.names,
                    shares=choice.shares[layer.name],
                    statistics=(statistics or {}).get(key, {}),
                    plan=plan,
                    seed=seed_from(seed, "merge"),
                )


def _plain(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return a tensor as rules see it: contiguous, and a single number as (1,)."""
    plain = tensor.detach().to(device, dtype).contiguous()
    return plain if plain.ndim else plain.view(1)
