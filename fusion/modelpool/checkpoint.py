"""A member whose weights lie in a file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.modelpool.bare import without_pretrained_weights
from fusion.modelpool.bounded import bounded, bounds_of_file
from fusion.modelpool.member import (
    Architecture,
    Member,
    WithoutRandomValues,
    build_architecture,
    on_meta,
)
from fusion.modelpool.trusted import require_registered
from fusion.modelpool.written import written_architecture, written_classes
from fusion.weights import SafetensorsSource, TensorSource, load_safetensors

if TYPE_CHECKING:
    from fusion.modelpool.base import BaseModelPool

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_PIECE = 1 << 20  # elements read at a time


class Checkpoint(Member):
    """Weights in a file and the architecture that they fill, key for key.

    Args:
        path: a ``.safetensors`` file, or a ``.pt``/``.pth`` file, which is read with
            ``weights_only=True``: no code in it is ever run.
        architecture: a mapping with ``_target_``, a zero-argument callable or a module. A file
            that this package wrote names its architecture; left out, that is built if it is on
            the list of :mod:`fusion.modelpool.trusted`.
        key: the entry of a pickled file that holds the state dict, as in
            ``{"epoch": 3, "state_dict": …}``; ``None`` when the file is the state dict.
        classes: the original labels of the network's outputs, in their order. Left out, they are
            read from the file where this package wrote them.
        trusted: import paths of further constructors, such as ``"mine.Net"``, that the file may
            name as its architecture. Nothing else that a file says is ever imported or called.
    """

    def __init__(
        self,
        path: str | Path | None,
        architecture: Architecture | None = None,
        *,
        key: str | None = None,
        classes: Sequence[int] | None = None,
        trusted: Sequence[str] = (),
    ) -> None:
        if not path:
            raise UserError("a checkpoint has no path; name its file (path.checkpoint=FILE)")
        self.path = Path(path).expanduser()
        self._architecture = architecture
        self._key = key
        self._classes = None if classes is None else tuple(classes)
        if isinstance(trusted, str) or not all(isinstance(target, str) for target in trusted):
            raise UserError(f"trusted is {trusted!r}; give a list of import paths, [mine.Net]")
        self._trusted = tuple(trusted)

    @property
    def classes(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """The original labels of the outputs, as given or as the file says."""
        if self._classes is None and self._is_safetensors and self.path.is_file():
            return written_classes(self.path)
        return self._classes

    @property
    def architecture_spec(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """The mapping that builds the architecture, as given or as the file says."""
        given = self._given_architecture()
        return given if isinstance(given, Mapping) else None

    @property
    def _is_safetensors(self) -> bool:
        return self.path.suffix == ".safetensors"

    def build(self) -> nn.Module:
        """Return the architecture filled with the file's weights, strictly.

        Raises:
            UserError: the file is missing or unreadable, or its keys or shapes do not fit.
        """
        if self._architecture is None and (wrong := self._misfit()):
            raise UserError(wrong[0])  # nothing is allocated for what a file says and does not hold
        with WithoutRandomValues():
            model = self._made(build_architecture)
        if _fill(model, self.stored()):
            return model
        try:
            model.load_state_dict(self._read())
        except RuntimeError as error:
            raise UserError(f"checkpoint '{self.path}': {error}") from error
        return model

    def architecture(self) -> nn.Module:
        """Return the architecture on the meta device."""
        return self._made(on_meta)

    def stored(self) -> TensorSource | None:
        """Return the file's tensors, each read when asked for; None for a pickled file."""
        return SafetensorsSource(self.path) if self._is_safetensors else None

    def check(self, name: str, pool: BaseModelPool) -> list[str]:
        """Return whether the file is there, readable, and fits the architecture."""
        del pool
        try:
            return [f"model '{name}': {what}" for what in self._misfit()]
        except UserError as error:
            return [f"model '{name}': {error}"]

    def _misfit(self) -> list[str]:
        expected = {key: tuple(t.shape) for key, t in self.architecture().state_dict().items()}
        source = self.stored()
        if source is None:
            found = {key: tuple(t.shape) for key, t in self._read().items()}
        else:
            found = {key: source.info(key).shape for key in source}
        # A file from before torch 0.4.1 has no counters of batch norm; loading starts them at 0.
        counters = {key for key in expected if key.endswith(".num_batches_tracked")}
        wrong = [f"lacks {key}" for key in expected if key not in found and key not in counters]
        wrong += [f"has {key}, unknown to the architecture" for key in found if key not in expected]
        wrong += [
            f"{key} is {found[key]}, the architecture has {shape}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ]
        return [f"checkpoint '{self.path}' {what}" for what in wrong]

    def _made(self, maker: Callable[[Architecture], nn.Module]) -> nn.Module:
        """Make the architecture; one that the file names only within bounds."""
        architecture = self._known_architecture()
        if self._architecture is None:
            assert isinstance(architecture, Mapping)
            require_registered(architecture, path=self.path, trusted=self._trusted)
            bounds = bounds_of_file(len(SafetensorsSource(self.path)), self.path.stat().st_size)
            with bounded(bounds, path=self.path):
                return maker(without_pretrained_weights(architecture))
        if isinstance(architecture, Mapping):
            architecture = without_pretrained_weights(architecture)
        return maker(architecture)

    def _given_architecture(self) -> Architecture | None:
        if self._architecture is None and self._is_safetensors and self.path.is_file():
            return written_architecture(self.path, trusted=self._trusted)
        return self._architecture

    def _known_architecture(self) -> Architecture:
        self._require_file()
        architecture = self._given_architecture()
        if architecture is None:
            raise UserError(
                f"checkpoint '{self.path}' does not say which architecture it fills; "
                f"give 'architecture' as a mapping with _target_"
            )
        return architecture

    def _require_file(self) -> None:
        if not self.path.is_file():
            raise UserError(f"checkpoint '{self.path}': there is no such file")
        if not self._is_safetensors and self.path.suffix not in _PICKLED:
            raise UserError(
                f"checkpoint '{self.path}': expected a .safetensors file or one of "
                f"{', '.join(_PICKLED)}"
            )

    def _read(self) -> dict[str, Tensor]:
        self._require_file()
        if self._is_safetensors:
            return load_safetensors(self.path)
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"checkpoint '{self.path}' cannot be read as plain tensors (weights_only=True); "
                f"save its state_dict() again, best as .safetensors"
            ) from error
        if self._key is not None:
            if not isinstance(content, Mapping) or self._key not in content:
                raise UserError(f"checkpoint '{self.path}' has no entry '{self._key}'")
            content = content[self._key]
        if not isinstance(content, Mapping) or not all(
            isinstance(value, Tensor) for value in content.values()
        ):
            entries = ", ".join(map(str, content)) if isinstance(content, Mapping) else ""
            raise UserError(
                f"checkpoint '{self.path}' is not a state dict (it holds "
                f"{entries or type(content).__name__}); name the entry that is with 'key'"
            )
        return dict(content)


def _fill(model: nn.Module, source: TensorSource | None) -> bool:
    """Fill ``model`` piece by piece, so that the weights lie in memory once; False if unfit."""
    state = model.state_dict()
    if source is None or state.keys() != set(source):
        return False
    if any(source.info(key).shape != tensor.shape for key, tensor in state.items()):
        return False
    for key, tensor in state.items():
        if tensor.is_contiguous():
            flat = tensor.view(-1)
            for start in range(0, len(flat), _PIECE):
                flat[start : start + _PIECE].copy_(source.read(key, start, start + _PIECE))
        else:
            tensor.copy_(source[key])
    return True
