"""Align networks and average them: Git Re-Basin (Ainsworth et al., arXiv 2209.04836)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from fusion.errors import UserError
from fusion.merging import batch_norm as bn
from fusion.merging.assembly import Assembly
from fusion.merging.heads import HeadChoice
from fusion.merging.members import Members
from fusion.merging.rules import Mean, Slerp
from fusion.method.merge import Merge
from fusion.options import ImageShape, SampleSize, Seed, checked

By = Literal["weights", "activations"]
Interpolation = Literal["lerp", "slerp"]


class GitReBasin(Merge):
    """Align the units of separately trained networks, and average the networks.

    All experts are aligned to the pretrained model, or to the first expert where there is none,
    and the result is the mean of the experts: a pretrained model is their reference, not a part
    of the mean.

    After ``run`` the report lists the moved units; with an ``output_path`` it is in
    ``alignment.csv`` and drawn in ``alignment.pdf`` and ``.png``. Where a unit moved, one control
    is the mean without alignment.

    Args:
        by: match units by their ``weights``, or by their ``activations`` on the pool's training
            images.
        merge_many: instead of to one reference, align each expert to the mean of the others until
            nothing moves (Algorithm 3, MergeMany).
        interpolation: ``lerp`` (mean) or ``slerp`` (mean on the sphere), tensor by tensor.
        head, batch_norm, calibration_images, batch_size, example_input, plot, seed: see
            :class:`~fusion.method.Merge`; without images ``batch_norm=auto`` interpolates the
            running statistics, which midway between separately trained networks was better than
            those of the mixture on every pair that was tried.

    Raises:
        UserError: an invalid option.
    """

    without_images: ClassVar[str] = "interpolate"
    without_alignment: ClassVar[str] = ""

    @checked
    def __init__(
        self,
        *,
        by: By = "weights",
        merge_many: bool = False,
        interpolation: Interpolation = "lerp",
        head: HeadChoice = "auto",
        batch_norm: bn.Treatment = "auto",
        calibration_images: SampleSize = 2000,
        batch_size: SampleSize = 128,
        example_input: ImageShape | None = None,
        plot: bool = True,
        seed: Seed = 0,
    ) -> None:
        if merge_many and by == "activations":
            raise UserError(
                "merge_many=true compares each network with a mean of networks, whose activations "
                "mean nothing before it is aligned; choose by=weights"
            )
        super().__init__(
            rule=Slerp() if interpolation == "slerp" else Mean(),
            align="merge_many" if merge_many else by,
            head=head,
            batch_norm=batch_norm,
            calibration_images=calibration_images,
            batch_size=batch_size,
            example_input=example_input,
            plot=plot,
            seed=seed,
        )

    def add_controls(self, assembly: Assembly, unaligned: Members) -> None:
        """Name the networks that the result is compared with: also the mean without alignment."""
        if any(entry["changed"] for entry in self.report["alignment"].values()):
            naive = dataclasses.replace(assembly, members=unaligned)
            self.controls["mean without alignment"] = lambda: self.merged(self.measured(naive))
        super().add_controls(assembly, unaligned)
