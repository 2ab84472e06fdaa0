"""Label spaces: the classes of a task, in the order of a network's outputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fusion.errors import UserError


@dataclass(frozen=True)
class LabelSpace:
    """The classes of one task, in the order of a network's outputs.

    Two classes are the same where their names are equal. If one side has no names, their original
    labels decide: the numbers that the full data set gives to its classes. Such numbers mean
    nothing across two different tasks, so two spaces without names that belong to tasks of
    different names have no class in common.

    Attributes:
        labels: original label of each class; ``None`` where only names are known.
        names: name of each class; ``None`` where only original labels are known.
        task: name of the task, if given.

    Raises:
        UserError: no classes, a class that occurs twice, or names and labels of different number.

    Example::

        >>> pets = LabelSpace.of(["cat", "dog"])
        >>> pets.covers(LabelSpace.of(["dog"]))
        True
        >>> pets.positions(LabelSpace.of(["dog"]))
        [1]
    """

    labels: tuple[int, ...] | None
    names: tuple[str, ...] | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        known = [values for values in (self.labels, self.names) if values is not None]
        if not known or any(not values for values in known):
            raise UserError("a label space has at least one class; name its classes")
        if len({len(values) for values in known}) > 1:
            raise UserError(
                f"a label space has {len(known[0])} labels and {len(known[1])} names; give one "
                f"name for each label"
            )
        for values in known:
            if len(set(values)) < len(values):
                raise UserError(f"a class stands twice in {_listed(values)}; name each class once")

    @classmethod
    def of(cls, classes: Sequence[int | str], task: str | None = None) -> LabelSpace:
        """Return the space of ``classes`` as a user writes them: all labels, or all names.

        Raises:
            UserError: they are neither.
        """
        if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
            raise UserError(
                f"classes is {classes!r}; give a list of class names, or of original labels"
            )
        if all(isinstance(value, str) for value in classes):
            return cls(None, tuple(map(str, classes)), task)
        if all(isinstance(value, int) and not isinstance(value, bool) for value in classes):
            return cls(tuple(int(value) for value in classes), None, task)
        raise UserError(
            f"classes mixes kinds in {_listed(classes)}; give names only, or original labels only"
        )

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.names if self.names is not None else self.labels or ())

    @property
    def shown(self) -> tuple[str, ...]:
        """Name of each class in a table."""
        return self.names if self.names is not None else tuple(map(str, self.labels or ()))

    def positions(self, other: LabelSpace) -> list[int] | None:
        """Return the position of each class of ``other``, or ``None`` if one is unknown."""
        mine, theirs = self._comparable(other)
        place = {value: index for index, value in enumerate(mine)}
        if not theirs or any(value not in place for value in theirs):
            return None
        return [place[value] for value in theirs]

    def covers(self, other: LabelSpace) -> bool:
        """Return whether every class of ``other`` is among these."""
        return self.positions(other) is not None

    def equals(self, other: LabelSpace) -> bool:
        """Return whether both have the same classes in the same order."""
        return self.positions(other) == list(range(len(self)))

    def is_disjoint(self, other: LabelSpace) -> bool:
        """Return whether no class is in both."""
        mine, theirs = self._comparable(other)
        return set(mine).isdisjoint(theirs)

    def select(self, positions: Sequence[int]) -> LabelSpace:
        """Return the classes at ``positions``, in that order."""
        return replace(
            self,
            labels=None if self.labels is None else tuple(self.labels[p] for p in positions),
            names=None if self.names is None else tuple(self.names[p] for p in positions),
        )

    def for_task(self, task: str | None) -> LabelSpace:
        """Return the same classes as those of the task called ``task``."""
        return replace(self, task=task)

    def to_json(self) -> str:
        """Return the space as a JSON object, for a file's metadata."""
        return json.dumps({"labels": self.labels, "names": self.names, "task": self.task})

    @classmethod
    def from_json(cls, text: str) -> LabelSpace:
        """Return what :meth:`to_json` wrote.

        Raises:
            UserError: it is something else.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the classes are not written as JSON: {text[:60]!r}") from error
        fields = found if isinstance(found, dict) else {}
        labels, names, task = (fields.get(key) for key in ("labels", "names", "task"))
        if (
            set(fields) != {"labels", "names", "task"}
            or not _is_list_of(labels, int)
            or not _is_list_of(names, str)
            or not isinstance(task, str | None)
        ):
            raise UserError(f"the classes are not written as a label space: {text[:60]!r}")
        return cls(
            None if labels is None else tuple(labels), None if names is None else tuple(names), task
        )

    def __str__(self) -> str:
        return _listed(self.shown)

    def _comparable(self, other: LabelSpace) -> tuple[Sequence[object], Sequence[object]]:
        """Return both sides' classes as names or labels, whichever both have; nothing otherwise."""
        if self.names is not None and other.names is not None:
            return self.names, other.names
        apart = self.task is not None and other.task is not None and self.task != other.task
        if apart or self.labels is None or other.labels is None:
            return (), ()
        return self.labels, other.labels


def joint_space(spaces: Iterable[LabelSpace]) -> LabelSpace | None:
    """Return all classes of several tasks as one space, or ``None`` where two tasks share one.

    A class is called ``<class>``, or ``<task>/<class>`` where two tasks have classes of one name.
    """
    spaces = list(spaces)
    for index, space in enumerate(spaces):
        for other in spaces[:index]:
            if not space.is_disjoint(other):
                return None
    names = [name for space in spaces for name in space.shown]
    if len(set(names)) < len(names):
        names = [f"{space.task}/{name}" for space in spaces for name in space.shown]
    return LabelSpace(None, tuple(names)) if len(set(names)) == len(names) else None


def _is_list_of(value: object, kind: type) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _listed(values: Sequence[object], most: int = 8) -> str:
    rest = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + rest
