"""The alignment stage before a merge: permute experts to the unit order of a reference."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fusion.alignment import (
    Alignment,
    GroupAlignment,
    PermutationSpec,
    align,
    align_all,
    permutation_spec,
)
from fusion.alignment.align import By
from fusion.alignment.example import check_traceable, example_input_for
from fusion.data import seed_from
from fusion.errors import UserError
from fusion.merging.averaging import mean_network
from fusion.merging.batch_norm import Calibration
from fusion.merging.members import Members
from fusion.merging.merge_many import Joined, merge_many
from fusion.modelpool import BaseModelPool
from fusion.options import ImageShape, Seed, checked
from fusion.training.sampling import sample_images
from fusion.weights import ModuleSource, TensorSource, tensors_of

AlignBy = Literal["weights", "activations", "merge_many"]


@dataclass(frozen=True)
class AlignmentRecord:
    """Effect of alignment on one expert.

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
        """Gain of the objective."""
        return self.objective_after - self.objective_before

    @property
    def moved(self) -> int:
        """Number of units (and blocks) that changed place."""
        return sum(group.moved for group in self.groups)


@checked
@dataclass(frozen=True)
class AlignmentStage:
    """Options of the alignment of experts to one order of units.

    Attributes:
        by: match units by their ``weights``, or by their ``activations`` on training images, or
            ``merge_many``: by weights, each expert to the mean of the others until nothing moves
            (Git Re-Basin, arXiv 2209.04836, Algorithm 3), instead of to one reference.
        shape: of one input, (C, H, W); by default that of the pool's first training image, or
            else a guess from the first convolution.
        seed: of the order in which groups of units are visited.
        calibration: the sample of images, for ``activations``.

    Raises:
        UserError: an invalid option.
    """

    by: AlignBy = "weights"
    shape: ImageShape | None = None
    seed: Seed = 0
    calibration: Calibration = dataclasses.field(default_factory=Calibration)

    def check(self, modelpool: BaseModelPool) -> None:
        """Check, before any work, that the pool's networks can be aligned.

        Raises:
            UserError: the network cannot be traced, no example input fits it, or something that
                the stage needs is missing.
        """
        if self.by == "merge_many" and len(modelpool) < 2:
            raise UserError(
                "merge_many aligns experts with each other, and the pool has only one; align it "
                "to the pretrained model instead: by weights"
            )
        if self.by == "activations" and not modelpool.has_data("train"):
            raise UserError(
                "alignment by activations needs images, and the pool has no train_datasets; add "
                "them, or align by weights"
            )
        model = modelpool.architecture(modelpool.pretrained_or_first_name).eval()
        if self.shape is None and modelpool.has_data("train"):
            check_traceable(model)  # the pool's images suffice; loading them may take long
        else:
            example_input_for(model, self.shape)

    def run(
        self, members: Members, modelpool: BaseModelPool, *, device: torch.device | str
    ) -> tuple[Members, dict[str, AlignmentRecord]]:
        """Return the members with the experts' units in one order, and a record per expert.

        An expert of which nothing moves equals the pool's, bit for bit.

        Args:
            members: base and experts.
            modelpool: has the experts as networks, and images.
            device: where to compute.
        """
        reference = copy.deepcopy(members.network).eval()
        spec = symmetries(reference, modelpool, self.shape)
        if self.by == "merge_many":
            return self._many(members, modelpool, reference, spec, device)
        by: By = "activations" if self.by == "activations" else "weights"
        data = None
        if by == "activations":
            data = activation_images(modelpool, self.calibration)
        experts: dict[str, TensorSource] = {}
        records: dict[str, AlignmentRecord] = {}
        # By activations all at once, since the reference then sees the images once.
        together = [members.names] if by == "activations" else [(name,) for name in members.names]
        for names in together:
            models = {name: self._expert(name, members, modelpool, reference) for name in names}
            found = align_all(
                models,
                reference,
                spec=spec,
                by=by,
                data=data,
                seed=self.seed,
                device=device,
                cycle=True,
            )
            for name, one in found.items():
                experts[name] = ModuleSource(one.model) if one.changed else members.experts[name]
                records[name] = _record(one, one.cycle_consistency)
        return dataclasses.replace(members, experts=experts), records

    @staticmethod
    def _expert(
        name: str, members: Members, modelpool: BaseModelPool, reference: nn.Module
    ) -> nn.Module:
        """Return an expert; without a base, the first one is the reference."""
        if members.base is None and name == modelpool.pretrained_or_first_name:
            return reference
        return modelpool.load_model(name).eval()

    def _many(
        self,
        members: Members,
        modelpool: BaseModelPool,
        reference: nn.Module,
        spec: PermutationSpec,
        device: torch.device | str,
    ) -> tuple[Members, dict[str, AlignmentRecord]]:
        """Align the experts with each other, and the reference to their mean."""
        models = {name: model.eval() for name, model in modelpool.named_models()}
        found = merge_many(models, spec, seed=self.seed, device=device)
        records = {name: _record(joined) for name, joined in found.items()}
        experts: dict[str, TensorSource] = {
            name: ModuleSource(joined.model) for name, joined in found.items()
        }
        name = modelpool.pretrained_or_first_name
        if name in found:
            common = found[name].model
        else:
            mean = mean_network(reference, list(experts.values()), statistics="pretrained")
            common = align(reference, mean, spec=spec, seed=self.seed, device=device).model
        base = tensors_of(common) if members.base is not None else None
        return dataclasses.replace(members, network=common, base=base, experts=experts), records


def symmetries(
    model: nn.Module, modelpool: BaseModelPool, shape: Sequence[int] | None = None
) -> PermutationSpec:
    """Return the symmetries of ``model``, found with the pool's first image where it has any.

    Args:
        model: a network of the pool in eval mode.
        modelpool: the pool.
        shape: of one input, (C, H, W), where it is known.
    """
    example = modelpool.example_input() if shape is None else None
    return permutation_spec(model, example_input_for(model, shape) if example is None else example)


def activation_images(modelpool: BaseModelPool, calibration: Calibration) -> list[Tensor]:
    """Return the batches on which activations are compared, to be reused for every network."""
    return list(
        sample_images(
            modelpool.images(),
            images=calibration.images,
            batch_size=calibration.batch_size,
            seed=seed_from(calibration.seed, "activations"),
        )
    )


def _record(alignment: Alignment | Joined, cycle: float | None = None) -> AlignmentRecord:
    return AlignmentRecord(
        alignment.objective_before, alignment.objective_after, cycle, alignment.groups
    )
