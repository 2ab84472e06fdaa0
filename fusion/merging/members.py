"""Members of a merge: the base and the experts as layers, tensors and heads, read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from fusion.models.layers import with_tensors, without_values
from fusion.weights import (
    ConvertedSource,
    StateDictSource,
    TensorSource,
    tensors_of,
    working_dtype,
)


@dataclass(frozen=True)
class LayerChoice:
    """The layers that are merged, and the share of each expert in each of them.

    Attributes:
        shares: layer → one number for each expert, summing to 1; layers that are not named are kept
            from the base.
    """

    shares: Mapping[str, tuple[float, ...]]

    def __contains__(self, layer: object) -> bool:
        return layer in self.shares


@dataclass(frozen=True)
class Chosen:
    """A tensor that is merged.

    Attributes:
        key: its state-dict key; the first one of a tensor with several keys.
        layer: the layer that owns it.
        depth: position of the layer in the forward pass, from 0 (first) to 1 (last).
        shares: the experts' coefficients, summing to 1.
    """

    key: str
    layer: Layer
    depth: float
    shares: tuple[float, ...]


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


def choice_of(choice: LayerChoice, names: Sequence[str], some: Sequence[str]) -> LayerChoice:
    """Return the choice of the same layers in which only some experts count, all alike.

    Args:
        choice: the layers.
        names: of all experts, in the order of the shares.
        some: those that count.
    """
    shares = tuple(1 / len(some) if name in some else 0.0 for name in names)
    return LayerChoice(dict.fromkeys(choice.shares, shares))


@dataclass(frozen=True, eq=False)
class Members:
    """Base and experts of a pool, ready to be merged.

    Attributes:
        network: the base, or the first expert where there is no base; source of unmerged tensors.
        base: the base's state dict; ``None`` where there is no base.
        experts: name → the expert's tensors, in the order of the reference's units.
        layers: the layers in the order of the forward pass.
        head: the tensors that belong to one task alone.
        stored: the tensors of ``network`` in its file, where ``network`` itself has no values.
        foldings: layer → the norm that base and experts have folded into it; see :meth:`folded`.
    """

    network: nn.Module
    base: Mapping[str, Tensor] | None
    experts: Mapping[str, TensorSource]
    layers: tuple[Layer, ...]
    head: Head
    stored: TensorSource | None = None
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

    @classmethod
    def open(cls, modelpool: BaseModelPool) -> Members:
        """Open the members of a pool, all of which are files, without reading or checking them.

        Raises:
            UserError: a member could not be built.
        """
        name = modelpool.pretrained_or_first_name
        network = modelpool.unfilled(name)
        sources = {n: modelpool.stored(n) for n in (name, *modelpool.model_names)}
        found = {n: source for n, source in sources.items() if source is not None}
        if network is None or found.keys() != sources.keys():
            raise ValueError("only a pool of files can be opened")
        held = tensors_of(network)
        stored = ConvertedSource(
            found[name], {k: t.dtype for k, t in held.items() if k in found[name]}
        )
        bare = without_values(network, list(stored))
        # A network that cannot be traced has to be run once, and so to be built.
        run = bare if is_traceable(bare) else modelpool.load_pretrained_or_first_model()
        return cls(
            network=bare,
            base=stored if modelpool.has_pretrained else None,
            experts={n: found[n] for n in modelpool.model_names},
            layers=layers_of(run, modelpool),
            head=modelpool.head,
            stored=stored,
        )

    def body(self) -> nn.Module:
        """Return a copy of the network, with its values."""
        if self.stored is None:
            return copy.deepcopy(self.network)
        held = tensors_of(self.network, keep_vars=True)
        filled: dict[int, tuple[Tensor, Tensor]] = {}
        for key in self.stored:
            if id(held[key]) not in filled:
                tensor = torch.empty_like(held[key], device="cpu", requires_grad=False)
                tensor.copy_(self.stored[key])
                filled[id(held[key])] = held[key], tensor
        return with_tensors(self.network, filled.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names."""
        return tuple(self.experts)

    def folded(self) -> Members:
        """Return the members with batch norm folded into the layer before it.

        Tensors keep their names, and the members compute the same functions; see
        :mod:`fusion.merging.folding`. Unmerged tensors are kept from ``network``.
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
        state = tensors_of(self.network, keep_vars=True)
        pairs = statistics_keys(self.network, layer.norms)
        # A norm that runs twice has them under two names.
        statistics = {id(state[key]) for pair in pairs for key in pair}
        return tuple(
            key
            for key in layer.tensors
            if key in state and id(state[key]) not in statistics and state[key].is_floating_point()
        )

    def chosen(self, choice: LayerChoice, *, with_head: bool) -> Iterator[Chosen]:
        """Yield the tensors that are merged, in the order of the forward pass.

        A tensor with several names is yielded once, under its first.

        Args:
            choice: which layers, and the experts' shares.
            with_head: whether the head is merged like any layer.
        """
        seen: set[int] = set()
        state = tensors_of(self.network, keep_vars=True)
        last = max(len(self.layers) - 1, 1)
        for position, layer in enumerate(self.layers):
            if layer.name not in choice:
                continue
            for key in self.parameters(layer):
                if id(state[key]) in seen or (key in self.head and not with_head):
                    continue
                seen.add(id(state[key]))
                yield Chosen(key, layer, position / last, choice.shares[layer.name])

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

        Args:
            choice: which layers, and the experts' shares.
            with_head: whether the head is merged like any layer.
            device: device of the yielded tensors.
            seed: of everything random.
            statistics: state-dict key → name → statistics of the experts' data.
            plan: result of the rule's ``prepare``.
        """
        for chosen in self.chosen(choice, with_head=with_head):
            found = (statistics or {}).get(chosen.key, {})
            yield self.piece(chosen, device=device, seed=seed, statistics=found, plan=plan)

    def piece(
        self,
        chosen: Chosen,
        *,
        device: torch.device | str,
        seed: int,
        statistics: Mapping[str, Tensor] | None = None,
        plan: object = None,
        part: tuple[int, int] | None = None,
    ) -> Piece:
        """Return a tensor that is merged, as a rule receives it.

        Args:
            chosen: the tensor.
            device, seed, plan: see :meth:`pieces`.
            statistics: name → statistics of the experts' data.
            part: start and end of the requested part of the tensor, counted in C order; only for
                opened members. A part is flat.
        """
        read = self._whole if part is None else partial(self._part, part)
        base, experts = read(chosen.key, torch.device(device))
        return Piece(
            key=chosen.key,
            layer=chosen.layer,
            bias=self.bias(chosen.layer),
            depth=chosen.depth,
            base=base,
            experts=experts,
            names=self.names,
            shares=chosen.shares,
            statistics=statistics or {},
            plan=plan,
            seed=seed_from(seed, "merge"),
            start=0 if part is None else part[0],
        )

    def _whole(self, key: str, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Return the base's tensor and those of the experts, (n, *shape)."""
        tensors = [self.experts[name][key] for name in self.names]
        base = None if self.base is None else self.base[key]
        dtype = working_dtype([*tensors, *([] if base is None else [base])])
        experts = torch.stack([_plain(tensor, device, dtype) for tensor in tensors])
        return None if base is None else _plain(base, device, dtype), experts

    def _part(
        self, part: tuple[int, int], key: str, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        """Return a part of the base's tensor and of those of the experts, (n, length)."""
        start, stop = part
        sources = [self.experts[name] for name in self.names]
        if self.base is not None:
            assert isinstance(self.base, TensorSource)
            sources.insert(0, self.base)
        dtype = working_dtype(source.info(key) for source in sources)
        rows = torch.empty(len(sources), stop - start, dtype=dtype)
        for row, source in zip(rows, sources, strict=True):
            source.read_into(row, key, start)
        rows = rows.to(device)
        return (None, rows) if self.base is None else (rows[0], rows[1:])


def _plain(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor as rules see it: contiguous, and a single number as (1,)."""
    plain = tensor.detach().to(device, dtype).contiguous()
    return plain if plain.ndim else plain.view(1)
