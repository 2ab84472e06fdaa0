"""Conditions for streaming a merge from file to file."""

from __future__ import annotations

from collections.abc import Iterator

from fusion.merging.batch_norm import WITHOUT_IMAGES
from fusion.merging.rule import Need, Rule
from fusion.modelpool import BaseModelPool
from fusion.weights import ModuleSource

# Smaller networks fit any memory, and reading them whole takes no time.
STREAMED_FROM = 256 << 20
_DATA = {Need.IMAGES, Need.LABELS, Need.GRADIENTS}


def obstacles_to_streaming(modelpool: BaseModelPool, rule: Rule, treatment: str) -> list[str]:
    """Return the obstacles to merging a pool from file to file: one clause each, with its remedy.

    Args:
        modelpool: base and experts.
        rule: how one tensor is merged.
        treatment: of the running statistics of batch norm.
    """
    found = []
    name = type(rule).__name__
    if _DATA & rule.needs or rule.statistics:
        found.append(f"{name} uses the experts' images (choose another rule)")
    elif rule.affine or rule.folded or rule.sequential:
        found.append(f"{name} merges several tensors together (choose another rule)")
    if treatment not in WITHOUT_IMAGES:
        does = "uses the experts' images" if treatment == "grams" else "runs the result on images"
        found.append(f"batch_norm={treatment} {does} (choose batch_norm=merge)")
    stored = {member: modelpool.stored(member) for member in _merged(modelpool)}
    if names := [n for n, s in stored.items() if s is None or isinstance(s, ModuleSource)]:
        found.append(
            f"what is in memory cannot be read from a file: {', '.join(names)} (save it, and give "
            f"the pool a fusion.modelpool.Checkpoint)"
        )
    if not found and modelpool.unfilled(modelpool.pretrained_or_first_name) is None:
        found.append(
            f"the file of the model '{modelpool.pretrained_or_first_name}' holds several heads"
        )
    return found


def stored_bytes(modelpool: BaseModelPool) -> int:
    """Return the size of all weights that are merged, as far as they are stored."""
    sources = [modelpool.stored(member) for member in _merged(modelpool)]
    return sum(s.info(key).nbytes for s in sources if s is not None for key in s)


def _merged(modelpool: BaseModelPool) -> Iterator[str]:
    """Yield the names of the base, or the first expert, and of all experts."""
    yield from dict.fromkeys((modelpool.pretrained_or_first_name, *modelpool.model_names))
