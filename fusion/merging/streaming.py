"""Merge tensors from the members' files into another file, with memory for a few parts only.

An elementwise rule merges a long tensor in blocks. A block is read from every member's file,
merged, and written to its place in the result's file; threads, one for each core, work at different
blocks, so that one reads or writes while another computes. Any other rule merges whole tensors, one
in each thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusion.merging.members import Chosen, Members
from fusion.merging.rule import Piece, Rule, TaskRule
from fusion.weights import SafetensorsWriter, TensorSource, is_finite, weighted_mean
from fusion.weights.threads import threads_over_blocks

# Entries of a block: half a megabyte of float32 for each member. With fewer, the overhead of calls
# dominates; more do not fit the cache.
BLOCK = 1 << 17
MOST_THREADS = 8  # more do not write faster, and each has separate blocks


class MemberNotFiniteError(Exception):
    """A member has entries that are NaN or infinite; the argument is the tensor's key."""


class ResultNotFiniteError(Exception):
    """A tensor of the result has entries that are NaN or infinite; the argument is its name."""


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor that is merged, and the destination of the result.

    Attributes:
        chosen: the tensor.
        names: in the result's file.
        experts: for each name, the experts whose tensors are averaged, as
            :meth:`fusion.merging.rule.TaskRule.separate` gives them; ``None`` for the single tensor
            that :meth:`fusion.merging.rule.Rule.merge` gives.
    """

    chosen: Chosen
    names: tuple[str, ...]
    experts: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True, eq=False)
class Contents:
    """The sources of all tensors in a result's file.

    Attributes:
        merged: tensors that pass through the rule.
        copied: name in the file → key of the tensor that is copied from ``members.stored``.
        made: name in the file → a tensor in memory.
    """

    merged: Sequence[Target]
    copied: Mapping[str, str]
    made: Mapping[str, Tensor]


class Stream:
    """The members of a pool of files, merged by a rule into a file.

    Each entry of each member is checked to be finite when it is read.

    Args:
        members: opened, not read.
        rule: how one tensor is merged.
        device: where to compute.
        seed: of everything random.
    """

    def __init__(
        self,
        members: Members,
        rule: Rule,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if members.stored is None:
            raise ValueError("only members that were opened, not read, can be streamed")
        self._members = members
        self._stored = members.stored
        self._rule = rule
        self._device = device
        self._seed = seed

    def prepare(self, chosen: Sequence[Chosen]) -> Any:
        """Return the rule's plan of the whole network.

        Raises:
            MemberNotFiniteError: a member has entries that are not.
        """
        in_parts = self._rule.elementwise and self._rule.prepares_in_parts

        def pieces() -> Iterator[Piece]:
            for tensor in chosen:
                for part in self._parts(tensor, in_parts):
                    yield self._piece(tensor, part)

        return self._rule.prepare(pieces)

    def write(self, writer: SafetensorsWriter, contents: Contents, plan: object) -> None:
        """Fill the result's file.

        Args:
            writer: the file.
            contents: everything in the file.
            plan: the rule's plan of the whole network.

        Raises:
            MemberNotFiniteError: a member has entries that are not.
            ResultNotFiniteError: the result has some.
        """
        places = {name: place for place, name in enumerate(writer)}
        jobs = list(self._jobs(writer, contents, plan))
        # Writing is fastest in the order of the file; what is only checked comes last.
        jobs.sort(key=lambda job: places.get(job[0], len(places)))
        with threads_over_blocks(self._device, most=MOST_THREADS) as each:
            deque(each(_call, (job for _, job in jobs)), maxlen=0)

    def _jobs(
        self, writer: SafetensorsWriter, contents: Contents, plan: object
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield the name of a tensor in the file, or an empty one, and its writer."""
        for target in contents.merged:
            for part in self._parts(target.chosen, self._rule.elementwise):
                yield target.names[0], partial(self._merge, writer, target, part, plan)
        for name, key in contents.copied.items():
            for block in _blocks(self._stored, key):
                yield name, partial(_copy, self._stored, key, block, writer, name)
        for name, tensor in contents.made.items():
            yield name, partial(_write, writer, name, 0, tensor)
        for source, key in self._unused(contents):
            for block in _blocks(source, key):
                yield "", partial(_read_finite, source, key, block)

    def _parts(self, chosen: Chosen, in_parts: bool) -> Iterator[tuple[int, int] | None]:
        """Yield the blocks of a tensor, or ``None`` for the whole of it."""
        return _blocks(self._stored, chosen.key) if in_parts else iter([None])

    def _piece(self, chosen: Chosen, part: tuple[int, int] | None, plan: object = None) -> Piece:
        piece = self._members.piece(
            chosen, device=self._device, seed=self._seed, plan=plan, part=part
        )
        operands = [piece.experts, *([] if piece.base is None else [piece.base])]
        if not all(map(is_finite, operands)):
            raise MemberNotFiniteError(chosen.key)
        return piece

    def _merge(
        self,
        writer: SafetensorsWriter,
        target: Target,
        part: tuple[int, int] | None,
        plan: object,
    ) -> None:
        piece = self._piece(target.chosen, part, plan)
        if target.experts is None:
            merged = [self._rule.merge(piece)]
        else:
            assert isinstance(self._rule, TaskRule)
            each = dict(zip(piece.names, self._rule.separate(piece), strict=True))
            merged = [weighted_mean([each[name] for name in names]) for names in target.experts]
        dtype = self._stored.info(target.chosen.key).dtype
        for name, tensor in zip(target.names, merged, strict=True):
            _write(writer, name, piece.start, tensor.to("cpu", dtype))

    def _unused(self, contents: Contents) -> Iterator[tuple[TensorSource, str]]:
        """Yield the tensors that nothing in the file is made of, which must be finite, too."""
        used = {target.chosen.key for target in contents.merged}
        for source in self._members.experts.values():
            yield from ((source, key) for key in source if key not in used)
        if self._members.base is not None:
            used |= set(contents.copied.values())
            yield from ((self._stored, key) for key in self._stored if key not in used)


def _call(job: Callable[[], object]) -> None:
    job()


def _blocks(source: TensorSource, key: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each block of a tensor."""
    length = source.info(key).numel
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _read_finite(source: TensorSource, key: str, block: tuple[int, int]) -> Tensor:
    part = source.read(key, *block)
    if not is_finite(part):
        raise MemberNotFiniteError(key)
    return part


def _copy(
    source: TensorSource, key: str, block: tuple[int, int], writer: SafetensorsWriter, name: str
) -> None:
    writer.write(name, block[0], _read_finite(source, key, block))


def _write(writer: SafetensorsWriter, name: str, start: int, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise ResultNotFiniteError(name)
    writer.write(name, start, tensor.reshape(-1))
