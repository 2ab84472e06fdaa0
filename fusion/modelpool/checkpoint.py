"""A member whose weights lie in a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fusion.errors import UserError
from fusion.modelpool.bare import without_pretrained_weights
from fusion.modelpool.bounded import bounded, bounds_of_file
from fusion.modelpool.fitting import Shapes, find_fit, is_counter
from fusion.modelpool.hub import hub_file
from fusion.modelpool.member import (
    Architecture,
    Member,
    WithoutRandomValues,
    build_architecture,
    on_meta,
)
from fusion.modelpool.trusted import require_registered
from fusion.modelpool.written import written_architecture, written_classes
from fusion.weights import (
    RenamedSource,
    SafetensorsSource,
    TensorSource,
    load_pickled,
    require_dense,
    state_dicts,
)

if TYPE_CHECKING:
    from fusion.modelpool.base import BaseModelPool

log = logging.getLogger(__name__)

_SAFETENSORS = ".safetensors"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # .tar as in model.pth.tar: torch.save's too
_PIECE = 1 << 20  # elements read at a time


class Checkpoint(Member):
    """Weights in a file and the architecture that they fill, key for key.

    Wrappers around the weights are taken off where what lies inside fits the architecture exactly:
    entries of a pickled file (``{"epoch": 3, "state_dict": …}``) and beginnings of names
    (``module.``, ``_orig_mod.``, ``model.`` of Lightning). The log says which.

    Args:
        path: a ``.safetensors`` file, or a file of ``torch.save`` (``.pt``, ``.pth``, ``.bin``,
            ``.ckpt``, ``.pth.tar``), which is read with ``weights_only=True``: no code in it is
            ever run. ``hf://org/name/file`` is a file on the Hugging Face hub, ``hf://org/name``
            the weights of that repository.
        architecture: a mapping with ``_target_``, a zero-argument callable or a module. Weights
            that torchvision or timm would fetch for it are not. A file that this package wrote
            names its architecture, and so does a repository of timm on the hub; left out, that is
            built if it is on the list of :mod:`fusion.modelpool.trusted`.
        key: where a file holds several state dicts that fit, the one to take: the dotted path of
            an entry, of the beginning of names in it, or of both (``"state_dict.ema_model"``).
        classes: the original labels of the network's outputs, in their order. Left out, they are
            read from the file where this package wrote them.
        trusted: import paths of further constructors, such as ``"mine.Net"``, that the file may
            name as its architecture. Nothing else that a file says is ever imported or called.
        revision: on the hub, the branch, tag or commit; None is the main branch.
        offline: on the hub, whether only what was fetched before is used; None leaves that to the
            environment (``HF_HUB_OFFLINE``).
    """

    def __init__(
        self,
        path: str | Path | None,
        architecture: Architecture | None = None,
        *,
        key: str | None = None,
        classes: Sequence[int] | None = None,
        trusted: Sequence[str] = (),
        revision: str | None = None,
        offline: bool | None = None,
    ) -> None:
        if not path:
            raise UserError("a checkpoint has no path; name its file (path.checkpoint=FILE)")
        self._given_path = path
        self._hub = hub_file(path, revision=revision, offline=offline)
        self._architecture = architecture
        self._key = key
        self._classes = None if classes is None else tuple(classes)
        if isinstance(trusted, str) or not all(isinstance(target, str) for target in trusted):
            raise UserError(f"trusted is {trusted!r}; give a list of import paths, [mine.Net]")
        self._trusted = tuple(trusted)
        self._told = False  # once is enough: a run opens a file several times

    @cached_property
    def path(self) -> Path:
        """The file; one on the hub is fetched into its cache when it is first asked for."""
        return self._hub.fetch() if self._hub else Path(self._given_path).expanduser()

    @property
    def classes(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """The original labels of the outputs, as given or as the file says."""
        if self._classes is None and self._is_safetensors and self.path.is_file():
            return written_classes(self.path)
        return self._classes

    @property
    def architecture_spec(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """The mapping that builds the bare architecture, as given or as the file says."""
        given = self._given_architecture()
        return without_pretrained_weights(given) if isinstance(given, Mapping) else None

    @property
    def _is_safetensors(self) -> bool:
        return self.path.suffix == _SAFETENSORS

    def build(self) -> nn.Module:
        """Return the architecture filled with the file's weights, strictly.

        Raises:
            UserError: the file is missing or unreadable, or its keys or shapes do not fit.
        """
        if self._architecture is None:
            self._opened(self._expected)  # nothing is allocated for what the file cannot fill
        with WithoutRandomValues():
            model = self._made(build_architecture)
        _fill(model, self._opened(_shapes(model)))
        return model

    def architecture(self) -> nn.Module:
        """Return the architecture on the meta device."""
        return self._made(on_meta)

    def stored(self) -> TensorSource:
        """Return the architecture's tensors in the file, each read when asked for."""
        return self._opened(self._expected)

    def check(self, name: str, pool: BaseModelPool) -> list[str]:
        """Return whether the file is there, readable, and fits the architecture."""
        del pool
        try:
            self._opened(self._expected)
        except UserError as error:
            return [f"model '{name}': {error}"]
        return []

    @cached_property
    def _expected(self) -> Shapes:
        return _shapes(self.architecture())

    def _opened(self, expected: Shapes) -> TensorSource:
        """Return the tensors of the file that fill an architecture, under its own keys."""
        sources = self._sources()
        shapes = {
            entry: {name: source.info(name).shape for name in source}
            for entry, source in sources.items()
        }
        try:
            fit = find_fit(shapes, expected, key=self._key)
        except UserError as error:
            raise UserError(f"checkpoint '{self._given_path}' {error}") from error
        source = sources[fit.entry]
        if not self._is_safetensors:
            require_dense(source, fit.names.values(), path=self.path)
        if not self._told and (told := fit.told()):
            log.info("%s: %s", self._given_path, told)
        self._told = True
        return RenamedSource(source, fit.names)

    def _sources(self) -> Mapping[str, TensorSource]:
        """Return every state dict in the file under the path of its entry."""
        self._require_file()
        if self._is_safetensors:
            return {"": SafetensorsSource(self.path)}
        return state_dicts(load_pickled(self.path))

    def _made(self, maker: Callable[[Architecture], nn.Module]) -> nn.Module:
        """Make the architecture; one that the file names only within bounds."""
        architecture = self._known_architecture()
        if self._architecture is None:
            assert isinstance(architecture, Mapping)
            require_registered(architecture, path=self.path, trusted=self._trusted)
            tensors = sum(map(len, self._sources().values()))
            bounds = bounds_of_file(tensors, self.path.stat().st_size)
            with bounded(bounds, path=self.path):
                return maker(without_pretrained_weights(architecture))
        if isinstance(architecture, Mapping):
            architecture = without_pretrained_weights(architecture)
        return maker(architecture)

    def _given_architecture(self) -> Architecture | None:
        if self._architecture is not None or not self.path.is_file():
            return self._architecture
        written = None
        if self._is_safetensors:
            written = written_architecture(self.path, trusted=self._trusted)
        if written is None and self._hub is not None:
            size = self.path.stat().st_size
            return self._hub.timm_architecture(size=size, trusted=self._trusted)
        return written

    def _known_architecture(self) -> Architecture:
        self._require_file()
        architecture = self._given_architecture()
        if architecture is None:
            raise UserError(
                f"checkpoint '{self._given_path}' does not say which architecture it fills; "
                f"give 'architecture' as a mapping with _target_"
            )
        return architecture

    def _require_file(self) -> None:
        if self.path.is_dir():
            raise UserError(f"checkpoint '{self._given_path}' is a folder; give the file in it")
        if not self.path.is_file():
            raise UserError(f"checkpoint '{self._given_path}': there is no such file")
        if not self._is_safetensors and self.path.suffix not in _PICKLED:
            raise UserError(
                f"checkpoint '{self._given_path}': expected a .safetensors file or one of "
                f"{', '.join(_PICKLED)}"
            )


def load(path: str | Path, architecture: Architecture | None = None) -> nn.Module:
    """Build the network that a file holds.

    Args:
        path: a file that this package wrote, or any other that :class:`Checkpoint` takes.
        architecture: what the weights fill; needed where the file does not name it.

    Raises:
        UserError: the file is missing or unreadable, names no architecture or one that is not
            trusted, or does not fit.

    Example::

        network = fusion.load("outputs/run/merged.safetensors")
    """
    return Checkpoint(path, architecture).build()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _fill(model: nn.Module, source: TensorSource) -> None:
    """Fill ``model`` piece by piece, so that the weights lie in memory once."""
    for key, tensor in model.state_dict().items():
        if key not in source and is_counter(key):
            continue
        if tensor.is_contiguous():
            flat = tensor.view(-1)
            for start in range(0, len(flat), _PIECE):
                flat[start : start + _PIECE].copy_(source.read(key, start, start + _PIECE))
        else:
            tensor.copy_(source[key])
