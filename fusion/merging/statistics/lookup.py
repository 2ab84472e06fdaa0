"""The statistics of all experts, stacked when a rule reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fusion.weights import TensorSource


class Statistics(Mapping[str, Mapping[str, Tensor]]):
    """State-dict key → name → statistic of all experts (n, …).

    A key has a statistic if every expert has it, in one shape. Nothing is cached: statistics on
    disk are read at each access, so that a loop over the layers holds one of them in memory.

    Args:
        experts: the statistics of each expert, by ``<name>/<key>``.
        device: device of the returned statistics.
    """

    def __init__(
        self, experts: Sequence[TensorSource], *, device: torch.device | str = "cpu"
    ) -> None:
        self._experts = tuple(experts)
        self._device = torch.device(device)
        self._names: dict[str, list[str]] = {}
        for full in experts[0]:
            name, _, key = full.partition("/")
            if len({e.info(full).shape if full in e else None for e in experts}) == 1:
                self._names.setdefault(key, []).append(name)

    def to(self, device: torch.device | str) -> Statistics:
        """Return the same statistics, moved to ``device`` when read."""
        return Statistics(self._experts, device=device)

    def each(self, name: str, key: str) -> list[Tensor | None]:
        """Return one statistic of each expert; the shapes may differ, ``None`` where one has none.

        Args:
            name: of the statistic.
            key: state-dict key.
        """
        full = f"{name}/{key}"
        return [e[full].to(self._device) if full in e else None for e in self._experts]

    def __getitem__(self, key: str) -> Mapping[str, Tensor]:
        return _OfTensor(self._names[key], lambda name: self._stacked(f"{name}/{key}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _stacked(self, full: str) -> Tensor:
        each = [expert[full].to(self._device) for expert in self._experts]
        # A rule sees a single number as (1,).
        return torch.stack([tensor if tensor.ndim else tensor.view(1) for tensor in each])


class _OfTensor(Mapping[str, Tensor]):
    """The statistics of one tensor by name."""

    def __init__(self, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
