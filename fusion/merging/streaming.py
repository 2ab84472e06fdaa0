"""Merge tensors block by block, from the members' files into another one: memory for blocks only.

A rule that is elementwise may merge a long tensor in parts. Here a part is read from every member's
file, merged, and written to its place in the result's file; threads, one for each core, work at
different parts, so that one reads or writes while another computes. What is held at a time is a
block of each member, and what the rule makes of it, for each thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusion.data import seed_from
from fusion.merging.members import Chosen, Members
from fusion.merging.rule import Piece, Rule, TaskRule
from fusion.weights import SafetensorsWriter, TensorSource, weighted_mean, working_dtype
from fusion.weights.sums import CHUNK
from fusion.weights.threads import threads_over_blocks

# Entries of a block: half a megabyte of float32 for each member. Fewer cost more calls than work,
# more do not fit the cache. Sums over a network are the same for every multiple of CHUNK.
BLOCK = 128 * CHUNK
MOST_THREADS = 8  # more do not write faster, and each has blocks of its own
AHEAD = 2  # blocks that are read before they are asked for


class MemberNotFiniteError(Exception):
    """A member has entries that are NaN or infinite; the argument is the tensor's key."""


class ResultNotFiniteError(Exception):
    """A tensor of the result has entries that are NaN or infinite; the argument is its name."""


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor that is merged, and where the result goes.

    Attributes:
        chosen: the tensor.
        names: in the result's file.
        experts: for each of these the experts the mean of whose own tensors it is, as
            :meth:`fusion.merging.rule.TaskRule.separate` gives them; ``None`` for the one tensor
            that :meth:`fusion.merging.rule.Rule.merge` gives.
    """

    chosen: Chosen
    names: tuple[str, ...]
    experts: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True, eq=False)
class Contents:
    """Where everything in a result's file comes from.

    Attributes:
        merged: tensors that pass through the rule.
        copied: name in the file → key of the tensor that is copied from ``members.stored``.
        made: name in the file → a tensor in memory.
    """

    merged: Sequence[Target]
    copied: Mapping[str, str]
    made: Mapping[str, Tensor]


class Stream:
    """The members of a pool of files, read block by block.

    Each entry of each member is checked to be finite when it is first read.

    Args:
        members: opened, not read.
        device: where to compute.
        seed: of everything random.
    """

    def __init__(
        self,
        members: Members,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if members.stored is None:
            raise ValueError("only members that were opened, not read, can be streamed")
        self._members = members
        self._stored = members.stored
        self._device = torch.device(device)
        self._seed = seed_from(seed, "merge")
        self._finite: set[str] = set()  # chosen tensors that were read to their end

    def prepare(self, rule: Rule, chosen: Sequence[Chosen]) -> Any:
        """Return what a rule makes of the whole network.

        Raises:
            MemberNotFiniteError: a member has entries that are not.
        """
        return rule.prepare(partial(self._walk, chosen))

    def write(
        self, writer: SafetensorsWriter, rule: Rule, contents: Contents, plan: object
    ) -> None:
        """Fill the result's file.

        Args:
            writer: the file.
            rule: how a tensor is merged.
            contents: everything in the file.
            plan: what the rule made of the whole network.

        Raises:
            MemberNotFiniteError: a member has entries that are not.
            ResultNotFiniteError: the result has some.
        """
        places = {name: place for place, name in enumerate(writer)}
        jobs: list[tuple[int, partial[None]]] = []
        for target in contents.merged:
            check = target.chosen.key not in self._finite
            for start, stop in _blocks(self._stored, target.chosen.key):
                job = partial(self._merge, writer, rule, target, plan, start, stop, check)
                jobs.append((places[target.names[0]], job))
        for name, key in contents.copied.items():
            for start, stop in _blocks(self._stored, key):
                jobs.append((places[name], partial(self._copy, writer, name, key, start, stop)))
        for name, tensor in contents.made.items():
            jobs.append((places[name], partial(_write, writer, name, 0, tensor.reshape(-1))))
        # What nothing is made of has to be finite, too.
        read = {target.chosen.key for target in contents.merged}
        sources = list(self._members.experts.values())
        if self._members.base is not None:
            sources.append(self._stored)
        for source in sources:
            rest = source.keys() - read
            if source is self._stored:
                rest -= set(contents.copied.values())
            for key in sorted(rest):
                for start, stop in _blocks(source, key):
                    jobs.append((len(places), partial(_check, source, key, start, stop)))
        jobs.sort(key=lambda job: job[0])
        with threads_over_blocks(self._device, most=MOST_THREADS) as each:
            deque(each(_call, (job for _, job in jobs)), maxlen=0)

    def _walk(self, chosen: Iterable[Chosen]) -> Iterator[Piece]:
        """Yield all blocks in order, the next ones being read meanwhile."""
        blocks = ((tensor, *block) for tensor in chosen for block in _blocks(self._stored, tensor.key))
        waiting: deque[tuple[Any, str, bool]] = deque()
        with ThreadPoolExecutor(1) as reader:
            for tensor, start, stop in blocks:
                check = tensor.key not in self._finite
                piece = reader.submit(self._piece, tensor, None, start, stop, check)
                waiting.append((piece, tensor.key, stop == self._stored.info(tensor.key).numel))
                if len(waiting) > AHEAD:
                    yield self._arrived(*waiting.popleft())
            while waiting:
                yield self._arrived(*waiting.popleft())

    def _arrived(self, piece: Any, key: str, is_last: bool) -> Piece:
        found: Piece = piece.result()
        if is_last:
            self._finite.add(key)
        return found

    def _piece(self, chosen: Chosen, plan: object, start: int, stop: int, check: bool) -> Piece:
        """Read a block of a tensor in the base and in every expert."""
        members = self._members
        sources = list(members.experts.values())
        if members.base is not None:
            sources.insert(0, self._stored)
        dtypes = [torch.empty(0, dtype=source.info(chosen.key).dtype) for source in sources]
        rows = torch.empty(len(sources), stop - start, dtype=working_dtype(dtypes))
        for source, row in zip(sources, rows, strict=True):
            source.read_into(chosen.key, start, row)
        if check and not _is_finite(rows):
            raise MemberNotFiniteError(chosen.key)
        rows = rows.to(self._device)
        return Piece(
            key=chosen.key,
            layer=chosen.layer,
            depth=chosen.depth,
            base=None if members.base is None else rows[0],
            experts=rows if members.base is None else rows[1:],
            names=members.names,
            shares=chosen.shares,
            plan=plan,
            seed=self._seed,
            start=start,
        )

    def _merge(
        self,
        writer: SafetensorsWriter,
        rule: Rule,
        target: Target,
        plan: object,
        start: int,
        stop: int,
        check: bool,
    ) -> None:
        piece = self._piece(target.chosen, plan, start, stop, check)
        if target.experts is None:
            merged = [rule.merge(piece)]
        else:
            assert isinstance(rule, TaskRule)
            each = dict(zip(piece.names, rule.separate(piece), strict=True))
            merged = [weighted_mean([each[name] for name in names]) for names in target.experts]
        dtype = self._stored.info(target.chosen.key).dtype
        for name, part in zip(target.names, merged, strict=True):
            _write(writer, name, start, part.to("cpu", dtype))

    def _copy(self, writer: SafetensorsWriter, name: str, key: str, start: int, stop: int) -> None:
        part = self._stored.read(key, start, stop)
        if not _is_finite(part):
            raise MemberNotFiniteError(key)
        writer.write(name, start, part)


def _call(job: partial[None]) -> None:
    job()


def _blocks(source: TensorSource, key: str) -> Iterator[tuple[int, int]]:
    """Yield where each block of a tensor begins and ends."""
    length = source.info(key).numel
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))


def _write(writer: SafetensorsWriter, name: str, start: int, part: Tensor) -> None:
    if not _is_finite(part):
        raise ResultNotFiniteError(name)
    writer.write(name, start, part)


def _check(source: TensorSource, key: str, start: int, stop: int) -> None:
    if not _is_finite(source.read(key, start, stop)):
        raise MemberNotFiniteError(key)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite: the smallest and the largest say it."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.to(working_dtype([tensor]))
    return all(math.isfinite(extreme) for extreme in map(float, torch.aminmax(wide)))
