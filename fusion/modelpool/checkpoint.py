"""A member whose weights lie in a file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.member import (
    Architecture,
    Entry,
    Member,
    WithoutRandomValues,
    build_architecture,
    on_meta,
)
from fusion.weights import SafetensorsSource, TensorSource, load_safetensors, read_metadata

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_PIECE = 1 << 20  # elements read at a time


class Checkpoint(Member):
    """Weights in a file and the architecture that they fill, key for key.

    Args:
        path: a ``.safetensors`` file, or a ``.pt``/``.pth`` file, which is read with
            ``weights_only=True``: no code in it is ever run.
        architecture: a mapping with ``_target_``, a zero-argument callable or a module. A file
            that this package wrote knows its own architecture; then it may be left out.
        key: the entry of a pickled file that holds the state dict, as in
            ``{"epoch": 3, "state_dict": …}``; ``None`` when the file is the state dict.
        classes: names (or original labels) of the classes of the network's outputs, in their
            order. Left out, they are read from the file where this package wrote them.
    """

    def __init__(
        self,
        path: str | Path | None,
        architecture: Architecture | None = None,
        *,
        key: str | None = None,
        classes: Sequence[int | str] | None = None,
    ) -> None:
        if not path:
            raise UserError("a checkpoint has no path; name its file (path.checkpoint=FILE)")
        self.path = Path(path).expanduser()
        self._architecture = architecture
        self._key = key
        self._classes = None if classes is None else LabelSpace.of(classes)

    def labels(self, entry: Entry | None = None) -> LabelSpace | None:
        """Return the classes of the outputs, as given or as the file says."""
        del entry
        if self._classes is None and self._is_safetensors and self.path.is_file():
            written = read_metadata(self.path).get("labels")
            return None if written is None else LabelSpace.from_json(written)
        return self._classes

    @property
    def architecture_spec(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """The mapping that builds the architecture, as given or as the file says."""
        given = self._given_architecture()
        return given if isinstance(given, Mapping) else None

    @property
    def _is_safetensors(self) -> bool:
        return self.path.suffix == ".safetensors"

    def build(self, entry: Entry | None = None) -> nn.Module:
        """Return the architecture filled with the file's weights, strictly.

        Raises:
            UserError: the file is missing or unreadable, or its keys or shapes do not fit.
        """
        del entry
        with WithoutRandomValues():
            model = build_architecture(self._known_architecture())
        if _fill(model, self.stored()):
            return model
        try:
            model.load_state_dict(self._read())
        except RuntimeError as error:
            raise UserError(f"checkpoint '{self.path}': {error}") from error
        return model

    def architecture(self) -> nn.Module:
        """Return the architecture on the meta device."""
        return on_meta(self._known_architecture())

    def stored(self, entry: Entry | None = None) -> TensorSource | None:
        """Return the file's tensors, each read when asked for; None for a pickled file."""
        del entry
        return SafetensorsSource(self.path) if self._is_safetensors else None

    def check(self, entry: Entry) -> list[str]:
        """Return whether the file is there, readable, and fits the architecture."""
        name = entry.name
        try:
            expected = {key: tuple(t.shape) for key, t in self.architecture().state_dict().items()}
            source = self.stored()
            if source is None:
                found = {key: tuple(t.shape) for key, t in self._read().items()}
            else:
                found = {key: source.info(key).shape for key in source}
        except UserError as error:
            return [f"model '{name}': {error}"]
        # A file from before torch 0.4.1 has no counters of batch norm; loading starts them at 0.
        counters = {key for key in expected if key.endswith(".num_batches_tracked")}
        wrong = [f"lacks {key}" for key in expected if key not in found and key not in counters]
        wrong += [f"has {key}, unknown to the architecture" for key in found if key not in expected]
        wrong += [
            f"{key} is {found[key]}, the architecture has {shape}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ]
        return [f"model '{name}': checkpoint '{self.path}' {what}" for what in wrong]

    def _given_architecture(self) -> Architecture | None:
        if self._architecture is None and self._is_safetensors and self.path.is_file():
            written = read_metadata(self.path).get("architecture")
            return None if written is None else json.loads(written)
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
