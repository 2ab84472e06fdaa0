"""Write the result of a streamed merge, and find the source of each tensor in its file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion.merging.assembly import Assembly
from fusion.merging.members import Chosen
from fusion.merging.rule import Rule, TaskRule
from fusion.merging.streaming import (
    Contents,
    MemberNotFiniteError,
    ResultNotFiniteError,
    Stream,
    Target,
)
from fusion.modelpool.network_file import FileTensor, file_tensors, not_finite
from fusion.models import MultiTaskNetwork
from fusion.models.layers import with_tensors
from fusion.weights import TensorInfo, map_safetensors, tensors_of, writing_safetensors


def write_network(
    assembly: Assembly,
    rule: Rule,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """Merge the members of a pool of files into a file, and return the network in it.

    The file is the one that :meth:`fusion.modelpool.BaseModelPool.save_model` would have written of
    ``assembly``'s network. Tensors that pass through an elementwise rule or are copied take memory
    for blocks only. Other rules take whole tensors, one at a time. Heads that are not layers, and
    running statistics, are computed in memory.

    Args:
        assembly: its members are opened, not read (:meth:`fusion.merging.members.Members.open`).
        rule: how one tensor is merged; without data, and not affine.
        path: the file; it appears whole or not at all.
        metadata: further strings to keep in it.
        device: where to compute.
        seed: of everything random.

    Returns:
        The network. Its tensors are mapped from the file: each page is read when it is first used.

    Raises:
        UserError: a member or the result has entries that are NaN or infinite.
    """
    members, pool = assembly.members, assembly.modelpool
    chosen = list(members.chosen(assembly.choice, with_head=assembly.plan.head_is_a_layer))
    per_task = isinstance(rule, TaskRule) and rule.per_task
    held = tensors_of(members.network)
    own = {task: {c.key: held[c.key] for c in chosen} for task in pool.tasks} if per_task else {}
    heads = assembly.heads()
    result = assembly.filled(copy.deepcopy(members.network), {}, heads, own)
    entries = _tied_together(file_tensors(result))
    made = _Made(heads, {**assembly.statistics(), **heads.get("", {})})
    tasks = pool.tasks if per_task else None
    contents = _contents(entries, chosen, made, tasks, members.stored or {})
    labels = assembly.plan.labels
    notes = pool.file_metadata(
        result,
        labels=None if isinstance(result, MultiTaskNetwork) else labels,
        metadata=metadata,
    )
    infos = {
        kept.name: TensorInfo(tuple(kept.tensor.shape), kept.tensor.dtype) for kept, *_ in entries
    }
    tied = {other.name: kept.name for kept, *others in entries for other in others}
    stream = Stream(members, rule, device=device, seed=seed)
    try:
        plan = stream.prepare(chosen)
        with writing_safetensors(path, infos, notes, tied=tied) as writer:
            stream.write(writer, contents, plan)
    except MemberNotFiniteError as error:
        pool.preflight()  # reads all weights, and names those that are not
        raise not_finite(str(error), path) from None  # finite in the file's dtype alone
    except ResultNotFiniteError as error:
        raise not_finite(str(error), path) from None
    pool.note_finite((pool.pretrained_or_first_name, *members.names))
    mapped = map_safetensors(path)
    return with_tensors(result, [(kept.tensor, mapped[kept.name]) for kept, *_ in entries])


@dataclass(frozen=True, eq=False)
class _Made:
    """Tensors of the result that are in memory: those of each task's head, and all others."""

    heads: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]

    def find(self, entry: FileTensor) -> Tensor | None:
        head = {} if entry.task is None else self.heads.get(entry.task, {})
        found = head.get(entry.key)
        return self.shared.get(entry.key) if found is None else found


def _tied_together(entries: Sequence[FileTensor]) -> list[list[FileTensor]]:
    """Return the entries of each tensor: the first one is kept, the others are tied to it."""
    groups: dict[object, list[FileTensor]] = {}
    for entry in entries:
        # A tensor without entries has no place in a file that another name could share.
        identity = id(entry.tensor) if entry.tensor.numel() else entry.name
        groups.setdefault(identity, []).append(entry)
    return list(groups.values())


def _contents(
    entries: Sequence[Sequence[FileTensor]],
    chosen: Sequence[Chosen],
    made: _Made,
    tasks: Mapping[str, Sequence[str]] | None,
    stored: Mapping[str, Tensor],
) -> Contents:
    """Return the source of each tensor of the file.

    Args:
        entries: the tensors, with all their names.
        chosen: those that pass through the rule.
        made: those that are in memory.
        tasks: task → its experts, where the rule returns separate tensors for each task.
        stored: the base's tensors.
    """
    names: dict[str, list[FileTensor]] = {tensor.key: [] for tensor in chosen}
    copied: dict[str, str] = {}
    in_memory: dict[str, Tensor] = {}
    for group in entries:
        kept = group[0].name
        tensor = next((t for t in map(made.find, group) if t is not None), None)
        merged = next((entry for entry in group if entry.key in names), None)
        key = next((entry.key for entry in group if entry.key in stored), None)
        if tensor is not None:
            in_memory[kept] = tensor.to(group[0].tensor.dtype)
        elif merged is not None:
            names[merged.key].append(FileTensor(kept, merged.key, merged.task, merged.tensor))
        elif key is not None:
            copied[kept] = key
        else:  # a counter that the file does not have
            in_memory[kept] = group[0].tensor
    targets = []
    for wanted in chosen:
        found = names[wanted.key]
        if not found:
            continue
        experts = None if tasks is None else tuple(tuple(tasks[str(e.task)]) for e in found)
        targets.append(Target(wanted, tuple(entry.name for entry in found), experts))
    return Contents(targets, copied, in_memory)
