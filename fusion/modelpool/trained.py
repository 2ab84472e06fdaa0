"""Members given by a training recipe: trained once, on first use, and cached."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fusion.data import ClassSubset, label_space, seed_from
from fusion.data.shared import load_dataset
from fusion.errors import UserError, suggestion
from fusion.files import only_one, require_writable_folder
from fusion.labels import LabelSpace
from fusion.modelpool.fingerprint import (
    canonical,
    canonical_text,
    data_fingerprint,
    digest_tensors,
)
from fusion.modelpool.fixed_head import ClassVectors, FixedHead, Simplex, set_fixed_head
from fusion.modelpool.inheriting import HeadOrigin, inherit
from fusion.modelpool.member import (
    Entry,
    Member,
    WithoutRandomValues,
    build_architecture,
    build_unfilled,
    on_meta,
)
from fusion.models import find_head
from fusion.options import (
    Classes,
    Count,
    FilePath,
    NonNegative,
    Positive,
    Seed,
    TargetMapping,
    Text,
    checked,
)
from fusion.target import check_options, locate
from fusion.training import fit
from fusion.training.devices import Accelerator, Precision, make_fabric
from fusion.training.fitting import OptimizerName
from fusion.training.schedule import Schedule
from fusion.weights import (
    SafetensorsSource,
    TensorSource,
    load_safetensors,
    load_tensors,
    read_metadata,
    save_safetensors,
    tensors_of,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

RECIPE_FORMAT = 2  # increase it when the same recipe would give other weights than before
_NAME_LENGTH = 16  # hexadecimal digits of the recipe's hash in a file name: 64 bits


class TrainedModel(Member):
    """A network given by its training recipe.

    On first use it is trained, on one device, and stored in ``cache_dir`` under a hash of the full
    recipe (including that of ``init_from`` and of the data). Concurrent runs train it once. A
    process killed at any moment leaves either nothing or a complete file. A damaged file is
    detected by its checksum and trained again with a warning.

    Args:
        architecture: mapping with ``_target_`` that builds the network with fresh weights.
        dataset: mapping with ``_target_`` that builds the training data.
        classes: labels of ``dataset`` (or names of its classes) to train on, all by default. The
            network's outputs stand for them in this order.
        init_from: name of another member of the pool whose weights training starts from.
        head: origin of the head: ``rows`` (the parent's rows for these classes), ``fresh`` (new
            weights), ``auto`` (rows where the parent has all classes, or where the classes are
            unknown and the shapes agree; else fresh). Two heads are not trained: ``simplex`` (a
            vertex of a regular simplex for each class of ``dataset``), and the name of a
            safetensors file with a vector for each class under its name, such as text features.
        epochs, lr, weight_decay, optimizer, batch_size, schedule, augment, channels_last, compile:
            of :func:`fusion.training.fit`.
        precision: Lightning Fabric's, for the training alone.
        accelerator: Lightning Fabric's, for the training alone.
        seed: of the fresh weights, the order of the images, dropout and augmentation.
        cache_dir: folder in which trained members are stored.
        fast_dev_run: train on one batch for one epoch.
    """

    @checked
    def __init__(
        self,
        architecture: TargetMapping,
        dataset: TargetMapping,
        *,
        classes: Classes | None = None,
        init_from: Text | None = None,
        head: HeadOrigin | Literal["simplex"] | FilePath = "auto",
        epochs: Count = 10,
        lr: Positive = 1e-3,
        weight_decay: NonNegative = 0.01,
        optimizer: OptimizerName = "adamw",
        batch_size: Count = 128,
        schedule: Schedule = "one_cycle",
        augment: bool = False,
        channels_last: bool = True,
        compile: bool = False,
        precision: Precision = "32-true",
        accelerator: Accelerator = "auto",
        seed: Seed = 0,
        cache_dir: FilePath = "~/.cache/fusion",
        fast_dev_run: bool = False,
    ) -> None:
        self.architecture_spec = architecture
        self.init_from = init_from
        self._classes = None if classes is None else tuple(classes)
        self._fixed = _fixed_head(head)
        self._head = cast(HeadOrigin, head) if self._fixed is None else "fresh"
        self._dataset = dataset
        self.epochs = 1 if fast_dev_run else epochs
        self.training_options: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "schedule": schedule,
            "augment": augment,
            "channels_last": channels_last,
            "compile": compile,
            "max_batches": 1 if fast_dev_run else None,
        }
        if optimizer != "adamw":  # members that were kept before there was a choice stay valid
            self.training_options["optimizer"] = optimizer
        self._precision = precision
        self._accelerator = accelerator
        self._seed = seed
        self._cache_dir = Path(cache_dir).expanduser()

    def check(self, entry: Entry) -> list[str]:
        """Return the problems of the recipe: its targets, their options, its data, its cache."""
        lines = []
        try:
            target = str(self._dataset["_target_"])
            options = {k: v for k, v in self._dataset.items() if not k.startswith("_")}
            check_options(locate(target), target, (), options)
            if self.path(entry).is_dir():
                raise UserError(f"cache_dir: '{self.path(entry)}' is a folder; remove it")
            if self._kept(entry) is None:
                require_writable_folder(self._cache_dir, "cache_dir")
                self._fabric()
                if entry.parent is not None:
                    self._inherited(entry, tensors_of(entry.parent.architecture()), on_meta)
                if self._fixed is not None:
                    self._with_fixed_head(self._fixed, entry, self.architecture())
        except UserError as error:
            lines.append(f"model '{entry.name}': {error}")
        return lines

    def architecture(self) -> nn.Module:
        """Return the architecture on the meta device; nothing is trained for that."""
        assert self.architecture_spec is not None
        return on_meta(self.architecture_spec)

    def architecture_key(self) -> str:
        """Return the mapping of the architecture as text."""
        return canonical_text(self.architecture_spec)

    def build(self, entry: Entry | None = None) -> nn.Module:
        """Return the trained network, training it first if necessary."""
        assert self.architecture_spec is not None
        with WithoutRandomValues():
            model = build_architecture(self.architecture_spec)
        load_tensors(model, load_safetensors(self._trained(self._placed(entry))))
        return model

    def labels(self, entry: Entry | None = None) -> LabelSpace | None:
        """Return the classes of the training data, in the order of the outputs."""
        kept = self._kept(self._placed(entry))
        if kept is not None:
            written = read_metadata(kept).get("labels")
            return None if written is None else LabelSpace.from_json(written)
        return label_space(self._data(entry))

    def train(self, entry: Entry, *, wait: bool = True) -> bool:
        """Train the network if it is not in the cache; return whether it is there now."""
        return self._kept(entry) is not None or self._train_under_lock(entry, wait=wait) is not None

    def stored(self, entry: Entry | None = None) -> TensorSource | None:
        """Return the cached weights, or None if it is not trained yet."""
        kept = self._kept(self._placed(entry))
        return None if kept is None else SafetensorsSource(kept)

    def unfilled(self, entry: Entry | None = None) -> nn.Module | None:
        """Return the architecture without values."""
        del entry
        assert self.architecture_spec is not None
        return build_unfilled(self.architecture_spec)

    def tensors(self, entry: Entry | None = None) -> TensorSource:
        """Return the trained weights, training the network first if necessary."""
        return SafetensorsSource(self._trained(self._placed(entry)))

    def fingerprint(self, entry: Entry | None = None) -> str:
        """Return the hash of everything that determines the weights."""
        return hashlib.sha256(self._recipe(self._placed(entry)).encode()).hexdigest()

    def path(self, entry: Entry | None = None) -> Path:
        """Return the path of the trained weights."""
        entry = self._placed(entry)
        return self._cache_dir / f"{entry.name}-{entry.fingerprint[:_NAME_LENGTH]}.safetensors"

    def _placed(self, entry: Entry | None) -> Entry:
        """Return the entry, or one for a recipe that is used without a pool."""
        if entry is not None:
            return entry
        if self.init_from is not None:
            raise UserError("TrainedModel: init_from needs a pool; put the model into one")
        return Entry("model", self)

    def _recipe(self, entry: Entry) -> str:
        parent = entry.parent
        return canonical_text(
            {
                "format": RECIPE_FORMAT,
                "name": entry.name,
                "architecture": self.architecture_spec,
                "dataset": data_fingerprint(self._dataset),
                "classes": self._classes,
                "init_from": None if parent is None else parent.fingerprint,
                "preprocessing": entry.preprocessing,
                "parent_classes": parent.known.to_json() if parent and parent.known else None,
                "head": [self._fixed.recipe if self._fixed else self._head, entry.head],
                "epochs": self.epochs,
                "options": self.training_options,
                "precision": self._precision,
                "seed": self._seed,
            }
        )

    def _data(self, entry: Entry | None) -> Any:
        data = load_dataset(self._dataset, None if entry is None else entry.preprocessing)
        return data if self._classes is None else ClassSubset(data, self._classes)

    def _trained(self, entry: Entry) -> Path:
        """Return the file of the weights, training them first if it is missing or damaged."""
        if (kept := self._kept(entry)) is None:
            kept = self._train_under_lock(entry, wait=True)
            assert kept is not None
        _note_found(entry.name, kept)
        return kept

    def _train_under_lock(self, entry: Entry, *, wait: bool) -> Path | None:
        """Train the weights unless another process does; None if it does and is not waited for."""
        with only_one(self.path(entry), entry.name, wait=wait) as held:
            if not held:
                return None
            # Another process may have trained it meanwhile.
            return self._kept(entry) or self._train_and_keep(entry)

    def _train_and_keep(self, entry: Entry) -> Path:
        path = self.path(entry)
        if path.is_file():
            log.warning("%s: %s is damaged; training again", entry.name, path)
        for unfinished in path.parent.glob(f".{path.stem}-*"):
            unfinished.unlink()  # of a run that was killed: the writer holds the lock
        log.info("%s: training for %d epochs", entry.name, self.epochs)
        state, metadata = self._train(entry)
        save_safetensors(path, state, {**metadata, "digest": digest_tensors(state)})
        return path

    def _kept(self, entry: Entry) -> Path | None:
        """Return the undamaged file in the cache with the weights of this recipe; else None."""
        path = self.path(entry)
        if not path.is_file():
            return None
        state = path.stat()
        whole = _is_whole(path, self._recipe(entry), state.st_size, state.st_mtime_ns)
        return path if whole else None

    def _train(self, entry: Entry) -> tuple[dict[str, Tensor], dict[str, str]]:
        data = self._data(entry)
        seed = seed_from(self._seed, entry.name)
        assert self.architecture_spec is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_architecture(self.architecture_spec)
        if entry.parent is not None:
            parent = tensors_of(entry.parent.build())
            load_tensors(model, self._inherited(entry, parent, lambda _: model))
        fixed = self._fixed
        trainable = None if fixed is None else self._with_fixed_head(fixed, entry, model)
        history = fit(
            model,
            data,
            epochs=self.epochs,
            seed=seed,
            fabric=self._fabric(),
            label=entry.name,
            trainable=trainable,
            **self.training_options,
        )
        last = history.epochs[-1].train
        log.info(
            "%s: trained in %.1f s, accuracy %.1f %% on its training images",
            entry.name,
            history.seconds,
            100 * last.accuracy,
        )
        metadata = {
            "recipe": self._recipe(entry),
            "architecture": json.dumps(canonical(self.architecture_spec)),
            "history": json.dumps([canonical(epoch) for epoch in history.epochs]),
        }
        labels = label_space(data)
        if labels is not None:
            metadata["labels"] = labels.to_json()
        return {key: value.cpu() for key, value in tensors_of(model).items()}, metadata

    def _with_fixed_head(self, fixed: FixedHead, entry: Entry, model: nn.Module) -> list[str]:
        """Set the head of ``model``; return the names of the tensors that are left to train."""
        data = load_dataset(self._dataset, entry.preprocessing)
        known, wanted = label_space(data), label_space(self._data(entry))
        outputs = None if known is None or wanted is None else known.positions(wanted)
        if known is None or outputs is None:
            raise UserError(
                f"{fixed.option}: the data set does not say what its classes are, and each has a "
                f"row of its own; give it class_names"
            )
        return set_fixed_head(model, find_head(model, named=entry.head), fixed, known, outputs)

    def _fabric(self) -> Fabric:
        """Return a single-process Fabric, so that only the recipe determines the weights."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment

        return make_fabric(
            {
                "accelerator": self._accelerator,
                "devices": 1,
                "precision": self._precision,
                "plugins": LightningEnvironment(),
            }
        )

    def _inherited(
        self, entry: Entry, parent: Mapping[str, Tensor], make: Any
    ) -> dict[str, Tensor]:
        assert entry.parent is not None
        return inherit(
            parent,
            make(self.architecture_spec),
            head=self._head,
            named_head=entry.head,
            known=entry.parent.labels(),
            wanted=self.labels(entry),
            parent_name=entry.parent.name,
        )


def _fixed_head(head: str | Path) -> FixedHead | None:
    """Return the fixed head that the option names, or None for a head that is trained.

    Raises:
        UserError: it is neither an origin of a head nor a safetensors file.
    """
    if head == "simplex":
        return Simplex()
    if head in get_args(HeadOrigin):
        return None
    if Path(head).suffix != ".safetensors":
        origins = [*get_args(HeadOrigin), "simplex"]
        raise UserError(
            f"TrainedModel.head is '{head}'; give one of {', '.join(origins)}, or a safetensors "
            f"file with a vector per class{suggestion(str(head), origins)}"
        )
    return ClassVectors(Path(head).expanduser())


@cache
def _is_whole(path: Path, recipe: str, size: int, time: int) -> bool:
    """Return whether a cached file holds the weights of ``recipe``, undamaged and finite.

    The result of an earlier call is valid while size and time of the file are the same.
    """
    del size, time
    try:
        metadata = read_metadata(path)
        tensors = load_safetensors(path)
    except UserError:  # damaged: trained again
        return False
    finite = all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
    same = metadata.get("recipe") == recipe and metadata.get("digest") == digest_tensors(tensors)
    return finite and same


@cache
def _note_found(name: str, path: Path) -> None:
    """Log once in a process that a member came from the cache."""
    log.info("%s: found in the cache (%s)", name, path.name)
