"""Members whose weights are in a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.bare import without_pretrained_weights
from fusion.modelpool.bounded import bounded, bounds_of_file
from fusion.modelpool.hub import hub_file
from fusion.modelpool.member import (
    Architecture,
    Entry,
    Member,
    WithoutRandomValues,
    build_architecture,
    build_unfilled,
    on_meta,
)
from fusion.modelpool.opening import (
    fill,
    infos,
    is_safetensors,
    open_fitting,
    open_sources,
    require_file,
)
from fusion.modelpool.several_heads import assemble_tasks
from fusion.modelpool.trusted import require_registered
from fusion.modelpool.written import (
    written_architecture,
    written_cut,
    written_head,
    written_labels,
    written_tasks,
)
from fusion.models import CutNetwork, resize_head
from fusion.options import Classes, Text, checked
from fusion.weights import SafetensorsSource, TensorInfo, TensorSource

log = logging.getLogger(__name__)


class Checkpoint(Member):
    """Weights in a file and the architecture that they fill, key for key.

    Wrappers around the weights are removed if their content fits the architecture exactly:
    entries of a pickled file (``{"epoch": 3, "state_dict": …}``) and beginnings of names
    (``module.``, ``_orig_mod.``, ``model.`` of Lightning). The log names them.

    Args:
        path: a ``.safetensors`` file, or a file of ``torch.save`` (``.pt``, ``.pth``, ``.bin``,
            ``.ckpt``, ``.pth.tar``), which is read with ``weights_only=True``: no code in it is
            ever run. ``hf://org/name/file`` is a file on the Hugging Face hub, ``hf://org/name``
            the weights of that repository.
        architecture: a mapping with ``_target_``, a zero-argument callable or a module. Weights
            that torchvision or timm would fetch for it are not fetched. A file that this package
            wrote names its architecture, and so does a repository of timm on the hub. If this
            option is omitted, that architecture is built if it is on the list of
            :mod:`fusion.modelpool.trusted`.
        key: where a file holds several state dicts that fit, the one to take: the dotted path of
            an entry, of the beginning of names in it, or of both (``"state_dict.ema_model"``); an
            empty string for the file itself.
        classes: names (or original labels) of the classes of the network's outputs, in their
            order. By default they are read from the file if this package wrote it.
        trusted: import paths of further constructors, such as ``"mine.Net"``, that the file may
            name as its architecture. Nothing else that a file names is ever imported or called.
        revision: on the hub, the branch, tag or commit; None is the main branch.
        offline: on the hub, whether to use only the cache; None follows the environment
            (``HF_HUB_OFFLINE``).
    """

    @checked
    def __init__(
        self,
        path: str | Path | None,
        architecture: Architecture | None = None,
        *,
        key: str | None = None,
        classes: Classes | None = None,
        trusted: Sequence[str] = (),
        revision: Text | None = None,
        offline: bool | None = None,
    ) -> None:
        if not path:
            raise UserError("a checkpoint has no path; name its file (path.checkpoint=FILE)")
        self._given_path = path
        self.source = str(path)
        self._hub = hub_file(path, revision=revision, offline=offline)
        self._architecture = architecture
        self._key = key
        self._classes = None if classes is None else LabelSpace.of(classes)
        self._trusted = tuple(trusted)
        self._told = False  # once is enough: a run opens a file several times

    @cached_property
    def path(self) -> Path:
        """The file; one on the hub is fetched into its cache on first access."""
        return self._hub.fetch() if self._hub else Path(self._given_path).expanduser()

    def labels(self, entry: Entry | None = None) -> LabelSpace | None:
        """Return the classes of the outputs, as given or from the file."""
        del entry
        if self._classes is None and is_safetensors(self.path) and self.path.is_file():
            return written_labels(self.path)
        return self._classes

    @property
    def architecture_spec(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """The mapping that builds the bare architecture, as given or from the file."""
        given = self._given_architecture()
        return without_pretrained_weights(given) if isinstance(given, Mapping) else None

    def build(self, entry: Entry | None = None) -> nn.Module:
        """Return the architecture filled with the file's weights, strictly.

        Raises:
            UserError: the file is missing or unreadable, or its keys or shapes do not fit.
        """
        del entry
        if self._architecture is None:
            self.stored()  # nothing is allocated for tensors that the file cannot fill
        with WithoutRandomValues():
            model = self._made(build_architecture)
        if (tasks := self._tasks) is not None:
            return assemble_tasks(self.path, model, SafetensorsSource(self.path), tasks)
        fill(model, self._opened(infos(model)))
        return model

    def architecture(self) -> nn.Module:
        """Return the architecture on the meta device."""
        bare = self._made(on_meta)
        if (tasks := self._tasks) is not None:
            source = SafetensorsSource(self.path)
            known = {key: source.info(key) for key in source}
            shapes = {
                key: torch.empty(info.shape, dtype=info.dtype, device="meta")
                for key, info in known.items()
            }
            return assemble_tasks(self.path, bare, shapes, tasks)
        return bare

    def stored(self, entry: Entry | None = None) -> TensorSource:
        """Return the architecture's tensors in the file, each read on access.

        For a file with several heads these are the file's tensors, under their names in it.
        """
        del entry
        if self._tasks is not None:
            self.architecture()  # whether they fit
            return SafetensorsSource(self.path)
        return self._opened(self._expected)

    def unfilled(self, entry: Entry | None = None) -> nn.Module | None:
        """Return the architecture without values; ``None`` for a file with several heads."""
        del entry
        return None if self._tasks is not None else self._made(build_unfilled)

    def check(self, entry: Entry) -> list[str]:
        """Return whether the file exists, is readable, and fits the architecture."""
        try:
            self.stored()
        except UserError as error:
            return [f"model '{entry.name}': {error}"]
        return []

    @cached_property
    def _expected(self) -> Mapping[str, TensorInfo]:
        return infos(self.architecture())

    @property
    def _tasks(self) -> Mapping[str, LabelSpace | None] | None:
        """The tasks of a file with several heads; ``None`` for one of one network."""
        ours = is_safetensors(self.path) and self.path.is_file()
        return written_tasks(self.path) if ours else None

    def _opened(self, expected: Mapping[str, TensorInfo]) -> TensorSource:
        opened = open_fitting(self.path, expected, key=self._key)
        if not self._told and (told := opened.fit.told()):
            log.info("%s: %s", self._given_path, told)
        self._told = True
        return opened.source

    def _made(self, maker: Callable[[Architecture], nn.Module]) -> nn.Module:
        """Build the architecture, cut if the file records a cut."""
        model = self._uncut(maker)
        cut = written_cut(self.path) if is_safetensors(self.path) else None
        return model if cut is None else CutNetwork(model, cut[0], dense=cut[1])

    def _uncut(self, maker: Callable[[Architecture], nn.Module]) -> nn.Module:
        """Build the architecture; one that the file names is built within bounds."""
        architecture = self._known_architecture()
        if self._architecture is None:
            assert isinstance(architecture, Mapping)
            require_registered(architecture, path=self.path, trusted=self._trusted)
            tensors = sum(map(len, open_sources(self.path).values()))
            bounds = bounds_of_file(tensors, self.path.stat().st_size)
            with bounded(bounds, path=self.path):
                model = maker(without_pretrained_weights(architecture))
            if is_safetensors(self.path):
                source = SafetensorsSource(self.path)
                resize_head(
                    model, {k: source.info(k) for k in written_head(self.path) if k in source}
                )
            return model
        if isinstance(architecture, Mapping):
            architecture = without_pretrained_weights(architecture)
        return maker(architecture)

    def _given_architecture(self) -> Architecture | None:
        if self._architecture is not None or not self.path.is_file():
            return self._architecture
        written = None
        if is_safetensors(self.path):
            written = written_architecture(self.path, trusted=self._trusted)
        if written is None and self._hub is not None:
            size = self.path.stat().st_size
            return self._hub.timm_architecture(size=size, trusted=self._trusted)
        return written

    def _known_architecture(self) -> Architecture:
        require_file(self.path)
        architecture = self._given_architecture()
        if architecture is None:
            raise UserError(
                f"checkpoint '{self._given_path}' does not say which architecture it fills; "
                f"give 'architecture' as a mapping with _target_"
            )
        return architecture


def load(path: str | Path, architecture: Architecture | None = None) -> nn.Module:
    """Build the network that a file holds.

    Args:
        path: a file that this package wrote, or any other that :class:`Checkpoint` takes.
        architecture: the architecture; required if the file does not name it.

    Raises:
        UserError: the file is missing or unreadable, names no architecture or one that is not
            trusted, or does not fit.

    Example::

        >>> import tempfile, fusion
        >>> from fusion.models import CifarResNet
        >>> spec = {"_target_": "fusion.models.CifarResNet", "depth": 8}
        >>> pool = fusion.BaseModelPool({"_pretrained_": spec})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pool.save_model(CifarResNet(8), f"{folder}/merged.safetensors")
        ...     network = fusion.load(f"{folder}/merged.safetensors")
        >>> type(network).__name__
        'CifarResNet'
    """
    return Checkpoint(path, architecture).build()
