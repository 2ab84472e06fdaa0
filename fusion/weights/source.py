"""Sources of named tensors that are read piece by piece, from memory or from files."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorInfo:
    """Description of a tensor before it is read.

    Attributes:
        shape: its size along each dimension.
        dtype: the type of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return self.numel * self.dtype.itemsize


class TensorSource(Mapping[str, Tensor]):
    """The tensors of one model: a mapping from state-dict keys that need not be in memory.

    ``source[name]`` reads a tensor whole. ``read`` gives a part of it as a flat vector, so that
    a loop over parts needs memory for a part only.
    """

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of the tensor ``name`` without reading it.

        Raises:
            KeyError: there is no such tensor.
        """

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements ``start`` to ``stop`` of the tensor ``name``, flattened in C order.

        Like a slice, it stops at the end of the tensor. The result may share memory with the
        source: do not write to it.

        Raises:
            KeyError: there is no such tensor.
        """

    def read_into(self, part: Tensor, name: str, start: int) -> None:
        """Read elements of the tensor ``name``, from ``start`` on, into the vector ``part``.

        Args:
            part: (k,) contiguous, of any dtype, on any device.
            name: the tensor; it has ``start + k`` elements or more.
            start: the first element, counted in C order.

        Raises:
            KeyError: there is no such tensor.
        """
        part.copy_(self.read(name, start, start + len(part)))

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor ``name``, without reading it."""
        try:
            self.info(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    def __getitem__(self, name: str) -> Tensor:
        info = self.info(name)
        return self.read(name, 0, info.numel).reshape(info.shape)


class StateDictSource(TensorSource):
    """Tensors in memory as a source; it returns these tensors, not copies."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of the tensor ``name``."""
        tensor = self._tensors[name]
        return TensorInfo(tuple(tensor.shape), tensor.dtype)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a part of the tensor ``name`` as a vector in C order."""
        tensor = self._tensors[name]
        if tensor.is_contiguous():
            return tensor.view(-1)[start:stop]
        # Another memory format must be copied to be flat: only the rows that the part touches.
        stop = min(stop, tensor.numel())
        row = tensor.numel() // len(tensor)
        first = start // row
        rows = tensor[first : -(-stop // row)].reshape(-1)
        return rows[start - first * row : stop - first * row]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def tensors_of(module: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module by their state-dict keys.

    Other entries of a state dict (extra state of any kind, packed weights of quantised layers) have
    no mean and no norm: they stay with their module.

    Args:
        module: the module.
        keep_vars: return the parameters themselves, by which tied ones are known, rather than
            tensors that share their values.

    Example::

        >>> import torch
        >>> from fusion.weights import tensors_of
        >>> list(tensors_of(torch.nn.BatchNorm2d(4)))
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    named |= dict(module.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
    state = module.state_dict(keep_vars=keep_vars)
    return {key: tensor for key, tensor in state.items() if key in named}


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the parameters and buffers of a module, in place.

    Args:
        module: the module; keys that are missing from ``tensors`` keep their values.
        tensors: state-dict keys and tensors, of the module's shapes.

    Example::

        >>> import torch
        >>> from fusion.weights import load_tensors, tensors_of
        >>> ours, theirs = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> load_tensors(ours, tensors_of(theirs))
        >>> torch.equal(ours.weight, theirs.weight)
        True
    """
    current = tensors_of(module)
    for key, tensor in tensors.items():
        current[key].copy_(tensor)


class ModuleSource(StateDictSource):
    """The tensors of a module as a source; it returns the module's own, not copies."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(tensors_of(module))


class RenamedSource(TensorSource):
    """Some tensors of another source, under other names.

    Args:
        source: where the tensors lie.
        names: new name → name in ``source``.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = dict(names)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of the tensor ``name``."""
        return self._source.info(self._names[name])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a part of the tensor ``name`` as a vector in C order."""
        return self._source.read(self._names[name], start, stop)

    def read_into(self, part: Tensor, name: str, start: int) -> None:
        """Read elements of the tensor ``name`` into ``part``."""
        self._source.read_into(part, self._names[name], start)

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ConvertedSource(TensorSource):
    """The tensors of another source in other dtypes.

    Args:
        source: where the tensors lie.
        dtypes: name → the dtype that it has here; its names are those of this source.
    """

    def __init__(self, source: TensorSource, dtypes: Mapping[str, torch.dtype]) -> None:
        self._source = source
        self._dtypes = dict(dtypes)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of the tensor ``name``."""
        return TensorInfo(self._source.info(name).shape, self._dtypes[name])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a part of the tensor ``name`` as a vector in C order."""
        return self._source.read(name, start, stop).to(self._dtypes[name])

    def read_into(self, part: Tensor, name: str, start: int) -> None:
        """Read elements of the tensor ``name`` into ``part``."""
        if self._source.info(name).dtype == self._dtypes[name]:
            self._source.read_into(part, name, start)
        else:
            super().read_into(part, name, start)

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)
