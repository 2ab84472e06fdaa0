"""A member that is a recipe: trained once, when it is first asked for, and kept."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from fusion.data import ClassSubset, seed_from
from fusion.errors import UserError
from fusion.modelpool.fingerprint import canonical, digest_tensors
from fusion.modelpool.member import Member, build_architecture, on_meta
from fusion.models import head_names, slice_head
from fusion.target import build, check_options, locate
from fusion.training import fit
from fusion.weights import SafetensorsSource, TensorSource, load_safetensors, save_safetensors

if TYPE_CHECKING:
    from fusion.modelpool.base import BaseModelPool

log = logging.getLogger(__name__)

RECIPE_FORMAT = 1  # raise it when the same recipe would give other weights than before
_NAME_LENGTH = 16  # hexadecimal digits of the recipe's hash in a file name: 64 bits


class TrainedModel(Member):
    """A network given by how it is trained.

    Asked for, it is trained once, on one device, and kept in ``cache_dir`` under a hash of the
    full recipe (that of ``init_from`` included). Two runs at once train it once; a kill at any
    moment leaves either nothing or a whole file; a damaged file is found by its checksum and
    trained again with a warning.

    Args:
        architecture: mapping with ``_target_`` that builds the network with fresh weights.
        dataset: mapping with ``_target_`` that builds the training data.
        classes: labels of ``dataset`` to train on, all by default. The network's outputs stand
            for them in this order.
        init_from: name of another member of the pool whose weights training starts from; where
            its head is of another size, its rows for the kept classes.
        epochs, lr, weight_decay, batch_size, schedule, augment, channels_last, compile: of
            :func:`fusion.training.fit`.
        precision: Lightning Fabric's, for the training alone.
        accelerator: Lightning Fabric's, for the training alone.
        seed: of the fresh weights, the order of the images, dropout and augmentation.
        cache_dir: where trained members are kept.
        fast_dev_run: train on one batch for one epoch.
    """

    def __init__(
        self,
        architecture: Mapping[str, Any],
        dataset: Mapping[str, Any],
        *,
        classes: Sequence[int] | None = None,
        init_from: str | None = None,
        epochs: int = 10,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 128,
        schedule: str = "one_cycle",
        augment: bool = False,
        channels_last: bool = True,
        compile: bool = False,
        precision: str = "32-true",
        accelerator: str = "auto",
        seed: int = 0,
        cache_dir: str | Path = "~/.cache/fusion",
        fast_dev_run: bool = False,
    ) -> None:
        for option, value in (("architecture", architecture), ("dataset", dataset)):
            if not isinstance(value, Mapping) or "_target_" not in value:
                raise UserError(
                    f"TrainedModel: {option} must be a mapping with _target_, not a "
                    f"{type(value).__name__}: a recipe is kept under what it says"
                )
        for count, number in (("epochs", epochs), ("batch_size", batch_size)):
            if number < 1:
                raise UserError(f"TrainedModel: {count} is {number}; give 1 or more")
        self.architecture_spec = architecture
        self.classes = None if classes is None else tuple(classes)
        self.init_from = init_from
        self._dataset = dataset
        self._epochs = 1 if fast_dev_run else epochs
        self._options: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "schedule": schedule,
            "augment": augment,
            "channels_last": channels_last,
            "compile": compile,
            "max_batches": 1 if fast_dev_run else None,
        }
        self._precision = precision
        self._accelerator = accelerator
        self._seed = seed
        self._cache_dir = Path(cache_dir).expanduser()
        self._name = ""
        self._told = False  # once is enough: a run asks for a member several times
        self._pool: BaseModelPool | None = None

    def joined(self, name: str, pool: BaseModelPool) -> None:
        """Remember the pool, to find ``init_from`` in it, and the name there."""
        self._name, self._pool = name, pool

    def check(self, name: str, pool: BaseModelPool) -> list[str]:
        """Return what is wrong with the recipe: its parents, its targets and their options."""
        lines = []
        seen, at = [name], self.init_from
        while at is not None:
            if at not in pool:
                lines.append(f"model '{seen[-1]}': init_from names '{at}', which the pool lacks")
                break
            if at in seen:
                lines.append(
                    f"model '{name}': init_from goes in a circle, {' → '.join([*seen, at])}"
                )
                break
            seen.append(at)
            parent = pool.member(at)
            at = parent.init_from if isinstance(parent, TrainedModel) else None
        try:
            target = str(self._dataset["_target_"])
            options = {k: v for k, v in self._dataset.items() if not k.startswith("_")}
            check_options(locate(target), target, (), options)
            if self.init_from is not None and not lines:
                self._inherited(self._parent().architecture().state_dict(), self.architecture())
        except UserError as error:
            lines.append(f"model '{name}': {error}")
        return lines

    def architecture(self) -> nn.Module:
        """Return the architecture on the meta device; nothing is trained for that."""
        assert self.architecture_spec is not None
        return on_meta(self.architecture_spec)

    def build(self) -> nn.Module:
        """Return the trained network, training it now if nobody has yet."""
        assert self.architecture_spec is not None
        model = build_architecture(self.architecture_spec)
        model.load_state_dict(self._weights())
        return model

    def stored(self) -> TensorSource | None:
        """Return the kept weights, or None while it is not trained."""
        return SafetensorsSource(self.path) if self.path.is_file() else None

    def tensors(self) -> TensorSource:
        """Return the trained weights, training the network now if nobody has yet."""
        self._weights()
        return SafetensorsSource(self.path)

    def fingerprint(self) -> str:
        """Return the hash of everything that decides the weights."""
        return hashlib.sha256(json.dumps(self._recipe(), sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """Where the trained weights are kept."""
        return self._cache_dir / f"{self._name}-{self.fingerprint()[:_NAME_LENGTH]}.safetensors"

    def _recipe(self) -> dict[str, Any]:
        parent = None if self.init_from is None else self._parent().fingerprint()
        return {
            "format": RECIPE_FORMAT,
            "name": self._name,
            "architecture": canonical(self.architecture_spec),
            "dataset": canonical(self._dataset),
            "classes": canonical(self.classes),
            "init_from": parent,
            "epochs": self._epochs,
            "options": canonical(self._options),
            "precision": self._precision,
            "seed": self._seed,
        }

    def _parent(self) -> Member:
        if self._pool is None or self.init_from is None:
            raise UserError("TrainedModel: init_from needs a pool; put the model into one")
        return self._pool.member(self.init_from)

    def _weights(self) -> dict[str, Tensor]:
        """Return the kept weights; train and keep them first if they are not there or damaged."""
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            kept = self._kept(path)
            if kept is not None:
                if not self._told:
                    log.info("%s: found in the cache", self._name)
                self._told = True
                return kept
            for unfinished in path.parent.glob(f".{path.stem}-*"):
                unfinished.unlink()  # of a run that was killed: whoever writes holds the lock
            log.info("%s: training for %d epochs", self._name, self._epochs)
            self._told = True
            state, metadata = self._train()
            metadata["digest"] = digest_tensors(state)
            save_safetensors(path, state, metadata)
        return state

    def _kept(self, path: Path) -> dict[str, Tensor] | None:
        if not path.is_file():
            return None
        try:
            source = SafetensorsSource(path)
            state = load_safetensors(path)
            whole = source.metadata.get("digest") == digest_tensors(state)
        except UserError:
            whole = False
        if whole:
            return state
        log.warning("%s: %s is damaged; training again", self._name, path)
        return None

    def _train(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        from lightning.fabric import Fabric
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment

        data = build(self._dataset)
        if self.classes is not None:
            data = ClassSubset(data, self.classes)
        seed = seed_from(self._seed, self._name)
        assert self.architecture_spec is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_architecture(self.architecture_spec)
        if self.init_from is not None:
            parent = self._parent().build().state_dict()
            model.load_state_dict(self._inherited(parent, model))
        # One process of its own, whatever the run uses: the recipe alone decides the weights.
        fabric = Fabric(
            accelerator=self._accelerator,
            devices=1,
            precision=self._precision,  # type: ignore[arg-type]
            plugins=LightningEnvironment(),
        )
        history = fit(
            model,
            data,
            epochs=self._epochs,
            seed=seed,
            fabric=fabric,
            label=self._name,
            **self._options,
        )
        last = history.epochs[-1].train
        log.info(
            "%s: trained in %.1f s, accuracy %.1f %% on its training images",
            self._name,
            history.seconds,
            100 * last.accuracy,
        )
        labels = getattr(data, "original_labels", None)
        metadata = {
            "recipe": json.dumps(self._recipe(), sort_keys=True),
            "architecture": json.dumps(canonical(self.architecture_spec)),
            "history": json.dumps([canonical(epoch) for epoch in history.epochs]),
        }
        if labels is not None:
            metadata["classes"] = json.dumps(list(labels))
        return {key: value.cpu() for key, value in model.state_dict().items()}, metadata

    def _inherited(self, parent: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return the parent's weights, with its head's rows for the classes kept here.

        Raises:
            UserError: they do not fit ``model``, or the parent does not know a class.
        """
        if self.classes is None:
            if odd := head_names(parent, model):
                raise UserError(
                    f"the head of '{self.init_from}' has another size ({', '.join(odd)}); say "
                    f"which of its classes to keep with 'classes'"
                )
            return dict(parent)
        known = list(self._parent().classes or range(max(self.classes) + 1))
        missing = [label for label in self.classes if label not in known]
        if missing:
            raise UserError(
                f"'{self.init_from}' has no rows for the classes {missing}; it knows {known}"
            )
        return slice_head(parent, like=model, rows=[known.index(label) for label in self.classes])
