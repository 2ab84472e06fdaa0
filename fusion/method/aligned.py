"""Experts in the order of a reference: the step before a merge, and what is told of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fusion.alignment import (
    Alignment,
    GroupAlignment,
    PermutationSpec,
    align_all,
    cycle_consistency,
    permutation_spec,
)
from fusion.alignment.align import By
from fusion.alignment.example import check_traceable, example_input_for
from fusion.data import seed_from
from fusion.files import write_text
from fusion.method.base import BaseAlgorithm
from fusion.method.merge_many import Joined
from fusion.modelpool import BaseModelPool
from fusion.training.sampling import sample_images
from fusion.weights import ModuleSource, TensorSource

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

COLUMNS = ("expert", "group", "kind", "size", "moved", "gain")  # of alignment.csv


@dataclass(frozen=True)
class AlignmentRecord:
    """What alignment did to one expert.

    Attributes:
        objective_before: agreement with the reference, 1 at most; see `Alignment`.
        objective_after: the same, aligned.
        cycle_consistency: mean squared change of the expert's parameters when it is aligned to the
            reference and the reference to it: 0 where both found the same permutation. None where
            there is no single reference.
        groups: one row for each group of units.
    """

    objective_before: float
    objective_after: float
    cycle_consistency: float | None
    groups: tuple[GroupAlignment, ...]

    @property
    def gain(self) -> float:
        """What the objective gained."""
        return self.objective_after - self.objective_before

    @property
    def moved(self) -> int:
        """How many units (and blocks) changed place."""
        return sum(group.moved for group in self.groups)


def check_alignable(modelpool: BaseModelPool, shape: Sequence[int] | None = None) -> None:
    """Check, before any work, that the symmetries of the pool's architecture can be found.

    Raises:
        UserError: the network cannot be traced, or no example input fits it.
    """
    model = modelpool.architecture(modelpool.pretrained_or_first_name).eval()
    if shape is None and modelpool.train_dataset_names:
        check_traceable(model)  # the pool's own images will do; loading them may be long work
    else:
        example_input_for(model, shape)


def symmetries(
    model: nn.Module, modelpool: BaseModelPool, shape: Sequence[int] | None = None
) -> PermutationSpec:
    """Return the symmetries of ``model``, found with the pool's first image where it has any.

    Args:
        model: a network of the pool in eval mode.
        modelpool: the pool.
        shape: of one input, (C, H, W), where it is known.
    """
    if shape is None and modelpool.train_dataset_names:
        example = next(images_of(modelpool, batch_size=1, limit=1, seed=0))
    else:
        example = example_input_for(model, shape)
    return permutation_spec(model, example)


def images_of(
    modelpool: BaseModelPool, *, batch_size: int, limit: int, seed: int
) -> Iterator[Tensor]:
    """Return batches of a shuffled sample of the pool's training images, as an iterator."""
    dataset: Any = modelpool.calibration_dataset()
    return sample_images(dataset, images=limit, batch_size=batch_size, seed=seed)


def activation_images(
    modelpool: BaseModelPool, *, batch_size: int, limit: int, seed: int
) -> list[Tensor]:
    """Return the batches on which activations are compared, held to be read for every network."""
    own = seed_from(seed, "activations")
    return list(images_of(modelpool, batch_size=batch_size, limit=limit, seed=own))


def align_experts(
    algorithm: BaseAlgorithm,
    modelpool: BaseModelPool,
    reference: nn.Module,
    names: Sequence[str],
    *,
    shape: Sequence[int] | None = None,
    by: By = "weights",
    data: Iterable[Any] | None = None,
    seed: int = 0,
) -> tuple[dict[str, TensorSource], dict[str, AlignmentRecord]]:
    """Bring the experts' units into the order of ``reference``, one expert at a time.

    An expert of which nothing moves is the pool's own, bit for bit.

    Args:
        algorithm: on whose device the work is done.
        modelpool: has the experts.
        reference: the network to align to; it is not changed.
        names: of the experts.
        shape: of one input, (C, H, W), where it cannot be guessed and the pool has no images.
        by: ``weights`` or ``activations``.
        data: batches of images, for ``activations``.
        seed: of the order in which groups of units are visited.

    Returns:
        name → weights, and name → what was done.
    """
    reference = copy.deepcopy(reference).eval()
    spec = symmetries(reference, modelpool, shape)
    device = algorithm.fabric.device
    sources: dict[str, TensorSource] = {}
    records: dict[str, AlignmentRecord] = {}
    for name in names:
        expert = modelpool.load_model(name).eval()
        found = align_all(
            {name: expert}, reference, spec=spec, by=by, data=data, seed=seed, device=device
        )[name]
        cycle = cycle_consistency(
            expert, reference, spec=spec, by=by, data=data, seed=seed, device=device, forth=found
        )
        sources[name] = ModuleSource(found.model) if found.changed else modelpool.tensors(name)
        records[name] = record_of(found, cycle)
    return sources, records


def record_of(alignment: Alignment | Joined, cycle: float | None = None) -> AlignmentRecord:
    """Return what is told of an alignment, without its network."""
    return AlignmentRecord(
        alignment.objective_before, alignment.objective_after, cycle, alignment.groups
    )


def keep_alignment(
    algorithm: BaseAlgorithm, records: Mapping[str, AlignmentRecord], *, plot: bool
) -> None:
    """Tell what alignment did: in the report, the log and ``alignment.csv``.

    The figure ``alignment.pdf`` (and ``.png``) is drawn only where a unit moved: of experts that
    were fine-tuned from the reference usually none does, and an empty figure tells nothing that
    the log's line does not.
    """
    algorithm.report["alignment"] = {
        name: {
            "changed": record.moved > 0,
            "moved": record.moved,
            "units": sum(group.size for group in record.groups),
            "objective_before": record.objective_before,
            "objective_after": record.objective_after,
            "gain": record.gain,
            "cycle_consistency": record.cycle_consistency,
        }
        for name, record in records.items()
    }
    for name, record in records.items():
        if not record.moved:
            log.info("Alignment of %s: no unit moved", name)
            continue
        cycle = record.cycle_consistency
        log.info(
            "Alignment of %s: %d of %d units moved, objective %.4f → %.4f%s",
            name,
            record.moved,
            sum(group.size for group in record.groups),
            record.objective_before,
            record.objective_after,
            "" if cycle is None else f", cycle consistency {cycle:.2g}",
        )
    if algorithm.output_path is not None and algorithm.fabric.is_global_zero:
        table = alignment_table(records)
        write_text(algorithm.output_path / "alignment.csv", table.to_csv(index=False))
        if plot and table["moved"].any():
            from fusion.figures.alignment import alignment_figure
            from fusion.figures.style import save_figure

            save_figure(alignment_figure(table), algorithm.output_path, "alignment")


def alignment_table(records: Mapping[str, AlignmentRecord]) -> pd.DataFrame:
    """Return a row for each expert and group of units; the columns of ``alignment.csv``.

    ``size`` is the number of units (or blocks) of the group, ``moved`` how many changed place,
    ``gain`` what that added to the objective.
    """
    import pandas as pd

    rows = [{"expert": name, **vars(g)} for name, record in records.items() for g in record.groups]
    return pd.DataFrame(rows, columns=list(COLUMNS))
