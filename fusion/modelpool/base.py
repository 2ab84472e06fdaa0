"""A pool: one pretrained network, the experts fine-tuned from it, their classes and their data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from fusion.data import Preprocessing, label_space
from fusion.data.shared import load_dataset
from fusion.errors import UserError, check_choice, suggestion
from fusion.labels import LabelSpace
from fusion.modelpool.card import Card
from fusion.modelpool.member import Entry, Member, ModuleMember, as_member
from fusion.modelpool.network_file import network_metadata, save_network
from fusion.modelpool.preflight import check_alike, check_entries, check_finite, raise_all
from fusion.modelpool.soundness import require_sound, unwrapped
from fusion.models import Head, find_head
from fusion.models.forward_pass import is_traceable
from fusion.options import Classes, FilePath, Names, TargetMapping, Text, checked
from fusion.target import is_target
from fusion.weights import TensorSource, tensors_of

log = logging.getLogger(__name__)

PRETRAINED = "_pretrained_"
SPLITS = ("train", "val", "test")

T = TypeVar("T")


class BaseModelPool:
    """The networks that an algorithm merges or analyses, each built only on request.

    ``len(pool)``, ``iter(pool)`` and ``name in pool`` refer to the experts alone, in one order, so
    that every ``name`` in a loop can be merged. :attr:`has_pretrained` states whether there is a
    base; :attr:`all_model_names` lists every member. A pool is false only if it has no member at
    all: a base alone can be measured and saved.

    Args:
        models: name → member. A member is a ``torch.nn.Module``, a mapping with ``_target_``, a
            zero-argument callable that returns a module, a ``Checkpoint`` or a ``TrainedModel``.
            ``_pretrained_`` is the base; every other name like ``_x_`` is special: kept, but not
            an expert. A list of members gets the names ``"0"``, ``"1"``, …
        train_datasets, val_datasets, test_datasets: name of a member → its data set, or a mapping
            with ``_target_`` that builds one on request. ``_pretrained_`` is the default for
            members without an entry.
        classes: name → names of the classes (or their original labels) that a member's outputs
            stand for, for members that do not state them.
        tasks: name of an expert → name of its task, where that is not the expert's own name.
            Several experts may share one task.
        head: modules or tensors that make up the head of the members' architecture; by default
            the last layer of each output, found from the graph.
        only: names of the experts that are included, all by default; the others are ignored
            together with their data. Special members are always kept.
        cards: name of an expert → file of its merge card (:mod:`fusion.merging.cards`): statistics
            of images that are not available here. They replace a pass over its images.

    Raises:
        UserError: an invalid option, or one that names an unknown member.
    """

    @checked
    def __init__(
        self,
        models: Mapping[str, Any] | Sequence[Any],
        *,
        train_datasets: Mapping[str, Dataset[Any] | TargetMapping] | None = None,
        val_datasets: Mapping[str, Dataset[Any] | TargetMapping] | None = None,
        test_datasets: Mapping[str, Dataset[Any] | TargetMapping] | None = None,
        classes: Mapping[str, Classes] | None = None,
        tasks: Mapping[str, Text] | None = None,
        head: Names | None = None,
        only: Names | None = None,
        cards: Mapping[str, FilePath] | None = None,
    ) -> None:
        if not isinstance(models, Mapping):
            models = {str(index): model for index, model in enumerate(models)}
        left_out = self._left_out(models, only)
        self._members: dict[str, Member] = {}
        self._entries: dict[str, Entry] = {}
        self._labels: dict[str, LabelSpace | None] = {}
        self._finite: set[str] = set()
        self._checked = False
        self._named_head = None if head is None else tuple(head)
        self._tasks = _without(left_out, tasks)
        self._classes = {
            name: LabelSpace.of(list(given)) for name, given in _without(left_out, classes).items()
        }
        for name, model in _without(left_out, models).items():
            self.add_model(name, model)
        self._datasets: dict[str, dict[str, Any]] = {
            "train": _without(left_out, train_datasets),
            "val": _without(left_out, val_datasets),
            "test": _without(left_out, test_datasets),
        }
        self._card_files = _without(left_out, cards)
        self._cards: dict[str, Card] = {}
        self._cards_checked: set[str] = set()
        given = {f"{split}_datasets": self._datasets[split] for split in SPLITS}
        for option, names in {**given, "classes": self._classes, "tasks": self._tasks}.items():
            for name in names:
                if name not in self._members and name != PRETRAINED:
                    raise UserError(f"{option}: {self._unknown(name)}")
        for name in self._card_files:
            if name not in self:
                raise UserError(f"cards: {self._unknown(name)}; only experts have cards")

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
        """Return the number of experts, as many as iteration yields."""
        return len(self.model_names)

    def __bool__(self) -> bool:
        """Return whether there is any member at all, so that a pool of only a base is true."""
        return bool(self._members)

    def __contains__(self, name: object) -> bool:
        """Return whether there is an expert called ``name``."""
        return name in self.model_names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the experts."""
        return iter(self.model_names)

    # -- models --------------------------------------------------------------------------------

    def entry(self, name: str) -> Entry:
        """Return the member called ``name``, without building its network.

        Raises:
            UserError: there is none, or it starts from an unknown member.
        """
        if name not in self._entries:
            self._entries[name] = self._resolved(name, ())
        return self._entries[name]

    def load_model(self, name: str) -> nn.Module:
        """Return the network called ``name``: a new object at every call, safe to change.

        Raises:
            UserError: there is none, it cannot be built, or a weight of it is not finite.
        """
        model = unwrapped(self.entry(name).build())
        require_sound(name, model)
        self._require_finite(name, tensors_of(model))
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

    def train(self) -> None:
        """Train every member that remains to be trained, together with other processes.

        Processes that need the same pool (jobs of a sweep) do not wait for each other while a
        member can be trained at once; after that each waits for the first one that is busy.
        Without a call each member is trained on first use.
        """
        left = [self.entry(name) for name in self.all_model_names]
        while left:
            busy = [entry for entry in left if not entry.train(wait=False)]
            if len(busy) == len(left):
                busy[0].train()
            left = busy

    def distinct_architectures(self, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name, structure without weights) of members, one for each architecture."""
        seen: set[str] = set()
        for name in names:
            key = self.entry(name).architecture_key
            if key not in seen:
                seen.add(key)
                yield name, self.architecture(name)

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
        self._entries.clear()  # an entry names its parent, which may have been missing
        self._checked = False

    def save_model(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        labels: LabelSpace | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a network made from this pool to ``path`` as safetensors, whole or not at all.

        The base's architecture is written to the metadata if the pool has it, so that
        ``Checkpoint(path)`` needs nothing else.

        Args:
            model: the network, of the members' architecture up to the head.
            path: the file.
            labels: the classes of its outputs.
            metadata: further strings to store.
        """
        save_network(path, model, labels=labels, metadata=metadata, **self._written())

    def file_metadata(
        self,
        model: nn.Module,
        *,
        labels: LabelSpace | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Return the metadata that :meth:`save_model` would write to the file of a network."""
        return network_metadata(model, labels=labels, metadata=metadata, **self._written())

    def _written(self) -> dict[str, Any]:
        """Return the description of the architecture for the file of a network from this pool."""
        spec = None
        if self:
            spec = self.entry(self.pretrained_or_first_name).member.architecture_spec
        return {"architecture": spec, "head": () if spec is None else self.head.tensors}

    def tensors(self, name: str) -> TensorSource:
        """Return a member's weights tensor by tensor, without building it where possible.

        Raises:
            UserError: a weight is not finite.
        """
        source = self.entry(name).tensors()
        self._require_finite(name, source)
        return source

    def architecture(self, name: str) -> nn.Module:
        """Return a member's structure on the meta device, without weights."""
        return self.entry(name).architecture()

    def stored(self, name: str) -> TensorSource | None:
        """Return a member's weights where they can be read without building it; unchecked."""
        return self.entry(name).stored()

    def unfilled(self, name: str) -> nn.Module | None:
        """Return a member's network without the values that :meth:`stored` has, if there is one.

        Raises:
            UserError: it could not be a member's network.
        """
        model = self.entry(name).unfilled()
        if model is None or unwrapped(model) is not model:
            return None
        require_sound(name, model, filled=False)
        return model

    # -- heads, classes, tasks -----------------------------------------------------------------

    @cached_property
    def head(self) -> Head:
        """The tensors of the members' architecture that belong to one task alone."""
        name = self.pretrained_or_first_name
        bare = self.architecture(name)
        if self._named_head is not None or is_traceable(bare.eval()):
            return find_head(bare, named=self._named_head)
        return find_head(self.load_model(name), self.example_input())

    def labels(self, name: str) -> LabelSpace | None:
        """Return the classes of a member's outputs, or ``None`` where they are unknown.

        Sources are the option ``classes``, the member itself (a recipe's data, a file's metadata),
        its own data set where it has an entry, and its card.
        """
        if name not in self._labels:
            space = self.entry(name).labels()
            for split in SPLITS:
                if space is None and name in self._datasets[split]:
                    space = label_space(self.dataset(name, split))
            if space is None and name in self._card_files:
                space = self._card(name).note.labels
            task = self._tasks.get(name)
            self._labels[name] = space if space is None or task is None else space.for_task(task)
        return self._labels[name]

    def task(self, name: str) -> str:
        """Return the task of an expert: its own name, unless the option ``tasks`` names another."""
        return self._tasks.get(name, name)

    def named_task(self, name: str) -> str | None:
        """Return the task that the pool's user gave to a member, or ``None`` if none was given."""
        return self._tasks.get(name)

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The tasks of the experts, in their order: task → its experts."""
        found: dict[str, list[str]] = {}
        for name in self.model_names:
            found.setdefault(self.task(name), []).append(name)
        return found

    # -- data ----------------------------------------------------------------------------------

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Preprocessing that the base's weights expect; the default for data without any."""
        return self.entry(self.pretrained_or_first_name).preprocessing if self else None

    def has_data(self, split: str = "train", name: str | None = None) -> bool:
        """Return whether there is data of a split: of the member ``name``, or of every expert."""
        datasets = self._datasets[split]
        names = [name] if name is not None else self.model_names or self.all_model_names
        return PRETRAINED in datasets or all(wanted in datasets for wanted in names)

    def dataset(self, name: str, split: str = "train") -> Any:
        """Return the data of the member ``name``, built at the first call.

        A member without an entry uses the data of ``_pretrained_``.

        Raises:
            UserError: there is neither, or no such split.
        """
        check_choice("split", split, SPLITS)
        datasets = self._datasets[split]
        owner = name if name in datasets else PRETRAINED
        if owner not in datasets:
            raise UserError(
                f"the pool has no {split} data of '{name}'{suggestion(name, datasets)} (it has "
                f"{', '.join(datasets) or 'none'}); add it to {split}_datasets, or "
                f"'{PRETRAINED}' for all members"
            )
        if is_target(datasets[owner]):
            datasets[owner] = load_dataset(datasets[owner], self.preprocessing)
        return datasets[owner]

    def load_train_dataset(self, name: str) -> Any:
        """Return the training data of the member ``name``, built at the first call."""
        return self.dataset(name, "train")

    def load_val_dataset(self, name: str) -> Any:
        """Return the validation data of the member ``name``, built at the first call."""
        return self.dataset(name, "val")

    def load_test_dataset(self, name: str) -> Any:
        """Return the test data of the member ``name``, built at the first call."""
        return self.dataset(name, "test")

    def images(self, names: Sequence[str] | None = None, split: str = "train") -> Any:
        """Return the data of several members, to draw unlabelled images from.

        Args:
            names: of the members; all experts by default (the base where there is no expert).
            split: ``train``, ``val`` or ``test``.

        Returns:
            one data set where all share it, else a mapping from names to data sets, of which
            functions such as :func:`fusion.training.recalibrate_batch_norm` draw equal numbers.

        Raises:
            UserError: a member has no data.
        """
        names = list(names or self.model_names or self.all_model_names)
        found = {name: self.dataset(name, split) for name in names}
        distinct = {id(dataset): name for name, dataset in reversed(found.items())}
        kept = {name: found[name] for name in found if name in distinct.values()}
        return next(iter(kept.values())) if len(kept) == 1 else kept

    def example_input(self) -> Tensor | None:
        """Return the first image of the pool's data, (1, C, H, W), or ``None`` without any."""
        for split in SPLITS:
            for name in self._datasets[split]:
                image = self.dataset(name, split)[0][0]
                return image[None] if isinstance(image, Tensor) else None
        return None

    # -- cards ---------------------------------------------------------------------------------

    def has_card(self, name: str | None = None) -> bool:
        """Return whether the expert ``name`` has a card, or whether every expert has one."""
        names = [name] if name is not None else self.model_names
        return bool(names) and all(wanted in self._card_files for wanted in names)

    def card(self, name: str) -> Card | None:
        """Return the card of an expert, checked against its weights and classes, if it has one.

        Raises:
            UserError: the card cannot be read, is damaged, or is another network's.
        """
        if name not in self._card_files:
            return None
        card = self._card(name)
        if name not in self._cards_checked:
            card.require_of(name, self.tensors(name), self.labels(name))
            self._cards_checked.add(name)
            log.info("%s: its card has the statistics of %d images", name, card.note.images)
        return card

    def _card(self, name: str) -> Card:
        if name not in self._cards:
            self._cards[name] = Card(self._card_files[name])
        return self._cards[name]

    # -- checks --------------------------------------------------------------------------------

    def preflight(self, *, values: bool = True) -> None:
        """Check, before any work, that the members can be merged.

        Names, files, architectures, keys, shapes and kinds of dtype against the base (the first
        model where there is no base) and, where weights can be read without building a network,
        that they are finite; and the cards, against the weights. Heads may differ in shape. The
        result is cached until a model is added.

        Args:
            values: whether to read all weights; otherwise the caller must check that they are
                finite and record it with :meth:`note_finite`.

        Raises:
            UserError: names every offending model and tensor.
        """
        reference = self.pretrained_or_first_name
        names = list(dict.fromkeys((reference, *self.model_names)))
        lines: list[str] = []
        whole = names
        if not self._checked:
            entries = {name: self.entry(name) for name in self.all_model_names}
            alone = {name: check_entries({name: entry}) for name, entry in entries.items()}
            lines = [line for found in alone.values() for line in found]
            whole = [name for name in names if not alone[name]]
            if not alone[reference]:
                lines += check_alike(entries, reference, whole, self.head)
        if values:
            stored = {name: self.stored(name) for name in whole if name not in self._finite}
            found = {name: source for name, source in stored.items() if source is not None}
            lines += check_finite(found)
        raise_all(lines)
        for name in self._card_files if values else ():
            self.card(name)
        self._checked = True
        if values:
            self.note_finite(found)

    def note_finite(self, names: Iterable[str]) -> None:
        """Record that all stored weights of some members were read and are finite."""
        self._finite.update(names)

    def _resolved(self, name: str, children: tuple[str, ...]) -> Entry:
        if name not in self._members:
            raise UserError(self._unknown(name))
        member = self._members[name]
        start = member.init_from
        parent = None
        if start is not None:
            path = [*children, name]
            if start in path:
                raise UserError(
                    f"model '{path[0]}': init_from goes in a circle, {' → '.join([*path, start])}"
                )
            if start not in self._members:
                raise UserError(
                    f"model '{name}': init_from names '{start}', which the pool lacks"
                    f"{suggestion(start, self._members)}"
                )
            parent = self._entries.get(start) or self._resolved(start, (*children, name))
            self._entries[start] = parent
        return Entry(name, member, parent, self._named_head, self._classes.get(name))

    def _require_finite(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if name not in self._finite:
            raise_all(check_finite({name: tensors}))
            if self.entry(name).stored() is not None:
                self._finite.add(name)

    @classmethod
    def _left_out(cls, models: Mapping[str, Any], only: Sequence[str] | None) -> set[str]:
        if only is None:
            return set()
        experts = [name for name in models if not cls.is_special_model(name)]
        for name in only:
            check_choice("only", name, experts)
        return set(experts) - set(only)

    def _unknown(self, name: str) -> str:
        return (
            f"the pool has no model '{name}'{suggestion(name, self._members)} "
            f"(it has {', '.join(self._members) or 'none'})"
        )


def _without(left_out: Set[str], given: Mapping[str, T] | None) -> dict[str, T]:
    return {name: value for name, value in (given or {}).items() if name not in left_out}


def as_modelpool(models: object) -> BaseModelPool:
    """Return ``models`` as a pool: a pool unchanged, a mapping or a sequence of modules wrapped.

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
