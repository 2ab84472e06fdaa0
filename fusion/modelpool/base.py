"""A pool: one pretrained network, the experts fine-tuned from it, and their data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import ConcatDataset

from fusion.data import ImageTensors, concat
from fusion.errors import UserError, suggestion
from fusion.modelpool.fingerprint import canonical
from fusion.modelpool.member import Member, ModuleMember, as_member
from fusion.modelpool.preflight import check_finite, check_pool
from fusion.target import build, is_target
from fusion.weights import TensorSource, save_safetensors

PRETRAINED = "_pretrained_"


class BaseModelPool:
    """The networks that an algorithm merges or studies, each made only when it is asked for.

    Args:
        models: name → member. A member is a ``torch.nn.Module``, a mapping with ``_target_``, a
            zero-argument callable that returns a module, a ``Checkpoint`` or a ``TrainedModel``.
            ``_pretrained_`` is the base; every other name like ``_x_`` is special: kept, but not
            an expert. A list of members gets the names ``"0"``, ``"1"``, …
        train_datasets, val_datasets, test_datasets: name → dataset, or a mapping with
            ``_target_`` that builds one when it is asked for.
        classes: name → the original labels that a model's outputs stand for, for members that
            cannot know it themselves.
    """

    def __init__(
        self,
        models: Mapping[str, Any] | Sequence[Any],
        *,
        train_datasets: Mapping[str, Any] | None = None,
        val_datasets: Mapping[str, Any] | None = None,
        test_datasets: Mapping[str, Any] | None = None,
        classes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if not isinstance(models, Mapping):
            models = {str(index): model for index, model in enumerate(models)}
        self._members: dict[str, Member] = {}
        self._checked = False
        self._datasets = {
            "train": dict(train_datasets or {}),
            "val": dict(val_datasets or {}),
            "test": dict(test_datasets or {}),
        }
        for name, model in models.items():
            self.add_model(name, model)
        self._classes = {name: tuple(labels) for name, labels in (classes or {}).items()}
        for name in self._classes:
            if name not in self._members:
                raise UserError(f"classes: {self._unknown(name)}")

    # -- names ---------------------------------------------------------------------------------

    @staticmethod
    def is_special_model(name: str) -> bool:
        """Return whether ``name`` is special, like ``_pretrained_``: not an expert."""
        return len(name) > 2 and name.startswith("_") and name.endswith("_")

    @property
    def has_pretrained(self) -> bool:
        """Whether the pool has a base model."""
        return PRETRAINED in self._members

    @property
    def model_names(self) -> list[str]:
        """The names of the experts, in their order."""
        return [name for name in self._members if not self.is_special_model(name)]

    @property
    def all_model_names(self) -> list[str]:
        """The names of all members, special ones included, in their order."""
        return list(self._members)

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self.model_names)

    def __bool__(self) -> bool:
        """Return whether there is any member at all; a pool of only a base is not nothing."""
        return bool(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self.model_names)

    # -- models --------------------------------------------------------------------------------

    def member(self, name: str) -> Member:
        """Return the member called ``name`` as it waits in the pool, not yet a network.

        Raises:
            UserError: there is none.
        """
        if name not in self._members:
            raise UserError(self._unknown(name))
        return self._members[name]

    def load_model(self, name: str) -> nn.Module:
        """Return the network called ``name``: a new object at every call, safe to change.

        Raises:
            UserError: there is none, it cannot be built, or a weight of it is not finite.
        """
        member = self.member(name)
        model = member.build()
        if member.stored() is None:  # what is stored was looked at by the preflight
            check_finite(name, model.state_dict())
        return model

    def load_pretrained_model(self) -> nn.Module:
        """Return the base model.

        Raises:
            UserError: the pool has none.
        """
        if not self.has_pretrained:
            raise UserError(
                f"this needs a pretrained model, and the pool has only "
                f"{', '.join(self._members) or 'nothing'}; add a member named '{PRETRAINED}'"
            )
        return self.load_model(PRETRAINED)

    def load_pretrained_or_first_model(self) -> nn.Module:
        """Return the base model, or the first expert where there is no base.

        Raises:
            UserError: the pool is empty.
        """
        return self.load_model(self.pretrained_or_first_name)

    @property
    def pretrained_or_first_name(self) -> str:
        """The name of the base, or of the first expert where there is no base.

        Raises:
            UserError: the pool is empty.
        """
        if not self._members:
            raise UserError("the pool is empty; give it at least one model")
        names = self.model_names or self.all_model_names
        return PRETRAINED if self.has_pretrained else names[0]

    def models(self) -> Iterator[nn.Module]:
        """Yield the experts' networks, one at a time, never all in memory."""
        for _, model in self.named_models():
            yield model

    def named_models(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name, network) of the experts, one at a time, never all in memory."""
        for name in self.model_names:
            yield name, self.load_model(name)

    def add_model(self, name: str, model: object) -> None:
        """Add a member of any kind that the constructor takes.

        Raises:
            UserError: the name is taken, or the member is of no such kind.
        """
        if not isinstance(name, str) or not name or "/" in name:
            raise UserError(f"a model's name must be a non-empty string without '/', not {name!r}")
        if name in self._members:
            raise UserError(f"the pool already has a model '{name}'; choose another name")
        self._members[name] = as_member(name, model)
        self._members[name].joined(name, self)
        self._checked = False

    def save_model(
        self, model: nn.Module, path: str | Path, *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write ``model``'s weights to ``path`` as safetensors, whole or not at all.

        The base's architecture goes into the metadata where the pool knows it, so that
        ``Checkpoint(path)`` finds everything in the one file.
        """
        written = dict(metadata or {})
        if self and "architecture" not in written:
            name = self.pretrained_or_first_name
            spec = self.member(name).architecture_spec
            if spec is not None and self._fits(name, model):
                written["architecture"] = json.dumps(canonical(spec))
                labels = self.classes(name)
                if labels is not None:
                    written["classes"] = json.dumps(labels)
        save_safetensors(path, model.state_dict(), written)

    def tensors(self, name: str) -> TensorSource:
        """Return a member's weights tensor by tensor, without building it where possible."""
        return self.member(name).tensors()

    def architecture(self, name: str) -> nn.Module:
        """Return a member's structure on the meta device, without weights."""
        return self.member(name).architecture()

    def classes(self, name: str) -> tuple[int, ...] | None:
        """Return the original labels of a member's outputs, or None when nobody said."""
        return self._classes.get(name, self.member(name).classes)

    # -- data ----------------------------------------------------------------------------------

    @property
    def train_dataset_names(self) -> list[str]:
        """The names under which there is training data."""
        return list(self._datasets["train"])

    @property
    def val_dataset_names(self) -> list[str]:
        """The names under which there is validation data."""
        return list(self._datasets["val"])

    @property
    def test_dataset_names(self) -> list[str]:
        """The names under which there is test data."""
        return list(self._datasets["test"])

    def load_train_dataset(self, name: str) -> Any:
        """Return the training data called ``name``, built at the first call."""
        return self._dataset("train", name)

    def load_val_dataset(self, name: str) -> Any:
        """Return the validation data called ``name``, built at the first call."""
        return self._dataset("val", name)

    def load_test_dataset(self, name: str) -> Any:
        """Return the test data called ``name``, built at the first call."""
        return self._dataset("test", name)

    def calibration_dataset(self) -> Any | None:
        """Return the training data on which a merged model may be calibrated, or None.

        It is the base's where the pool has it, else that of all experts together.
        """
        names = self.train_dataset_names
        if PRETRAINED in names:
            return self.load_train_dataset(PRETRAINED)
        if not names:
            return None
        parts = [self.load_train_dataset(name) for name in names]
        if all(isinstance(part, ImageTensors) for part in parts):
            return concat(parts)
        return ConcatDataset(parts)

    # -- checks --------------------------------------------------------------------------------

    def preflight(self) -> None:
        """Check, before any work, that the members can be merged.

        Names, files, architectures, keys, shapes and kinds of dtype against the base (the first
        model where there is no base) and, where weights can be read without building a network,
        that they are finite. A head whose shape differs is not an error. The answer is remembered
        until a model is added.

        Raises:
            UserError: names every offending model and tensor.
        """
        if not self._checked:
            check_pool(self)
            self._checked = True

    def _dataset(self, split: str, name: str) -> Any:
        datasets = self._datasets[split]
        if name not in datasets:
            raise UserError(
                f"the pool has no {split} data named '{name}'{suggestion(name, datasets)} "
                f"(it has {', '.join(datasets) or 'none'})"
            )
        if is_target(datasets[name]):
            datasets[name] = build(datasets[name])
        return datasets[name]

    def _unknown(self, name: str) -> str:
        return (
            f"the pool has no model '{name}'{suggestion(name, self._members)} "
            f"(it has {', '.join(self._members) or 'none'})"
        )

    def _fits(self, name: str, model: nn.Module) -> bool:
        expected = {k: t.shape for k, t in self.architecture(name).state_dict().items()}
        return expected == {k: t.shape for k, t in model.state_dict().items()}


def as_modelpool(models: object) -> BaseModelPool:
    """Return ``models`` as a pool: a pool as it is, a mapping or a sequence of modules wrapped.

    A single module becomes a pool of just that base.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(models, BaseModelPool):
        return models
    if isinstance(models, nn.Module):
        return BaseModelPool({PRETRAINED: ModuleMember(models)})
    if isinstance(models, Mapping | list | tuple):
        return BaseModelPool(models)
    raise UserError(
        f"expected a model pool, a dict or a list of modules, not a {type(models).__name__}"
    )
