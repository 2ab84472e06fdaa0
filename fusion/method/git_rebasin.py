"""Align networks and average them: Git Re-Basin (Ainsworth et al., arXiv 2209.04836)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from fusion.alignment import align
from fusion.alignment.align import By
from fusion.errors import UserError
from fusion.method.aligned import (
    AlignmentRecord,
    activation_images,
    align_experts,
    check_alignable,
    keep_alignment,
    record_of,
    symmetries,
)
from fusion.method.averaging import (
    INTERPOLATIONS,
    TREATMENTS,
    check_treatment,
    mean_network,
    treat,
)
from fusion.method.base import BaseAlgorithm
from fusion.method.batch_norm import check_sample
from fusion.method.choice import check_choice
from fusion.method.merge_many import merge_many
from fusion.modelpool import BaseModelPool

log = logging.getLogger(__name__)

BY = ("weights", "activations")


class GitReBasin(BaseAlgorithm):
    """Bring networks that were trained apart into one order of their units, and average them.

    All experts are aligned to the pretrained model, or to the first expert where there is none,
    and the result is the mean of the experts: a pretrained model is their reference, not a part
    of the mean. Tensors whose shape differs between members (heads) stay the reference's.

    After ``run`` the report says what moved; with an ``output_path`` it is in ``alignment.csv``
    and drawn in ``alignment.pdf`` and ``.png``. The control is the mean without alignment.

    Args:
        by: match units by their ``weights``, or by their ``activations`` on the pool's training
            images.
        merge_many: instead of to one reference, align each expert to the mean of the others until
            nothing moves (Algorithm 3, MergeMany); a pretrained model then only gives the head.
        interpolation: ``lerp`` (mean) or ``slerp`` (mean on the sphere), tensor by tensor.
        batch_norm: running statistics: ``pretrained`` (the reference's), ``merge`` (those of the
            mixture of the members' data), ``interpolate`` (their plain mean), ``recalibrate``
            (measured anew on a sample of the pool's training data), ``repair`` (every channel's
            mean and deviation brought to the mean of the members', also without batch norm),
            ``auto`` (recalibrate where the pool has data, else interpolate).
        calibration_images: how many images are looked at, at most.
        batch_size: images per forward pass.
        example_input: shape of one image, (C, H, W); by default the pool's first training image,
            or else a guess from the first convolution.
        plot: whether to draw the figure.
        seed: of the order of the descent and the sample of images.

    Raises:
        UserError: an option that has no meaning.
    """

    def __init__(
        self,
        *,
        by: By = "weights",
        merge_many: bool = False,
        interpolation: str = "lerp",
        batch_norm: str = "auto",
        calibration_images: int = 2000,
        batch_size: int = 128,
        example_input: Sequence[int] | None = None,
        plot: bool = True,
        seed: int = 0,
    ) -> None:
        check_choice("by", by, BY)
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        check_choice("batch_norm", batch_norm, TREATMENTS)
        if merge_many and by == "activations":
            raise UserError(
                "merge_many=true compares each network with a mean of networks, whose activations "
                "mean nothing before it is aligned; choose by=weights"
            )
        check_sample(calibration_images, batch_size)
        self.by: By = by
        self.merge_many = merge_many
        self.interpolation = interpolation
        self.batch_norm = batch_norm
        self.calibration_images = calibration_images
        self.batch_size = batch_size
        self.example_input = example_input
        self.plot = plot
        self.seed = seed

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the pool can be aligned and averaged with these options.

        Raises:
            UserError: says what is wrong and the cure.
        """
        if not len(modelpool):
            raise UserError("git_rebasin averages experts, and the pool has none; add some")
        modelpool.preflight()
        if self.merge_many and len(modelpool) < 2:
            raise UserError("merge_many=true aligns experts with each other; the pool has only one")
        if self.by == "activations" and not modelpool.train_dataset_names:
            raise UserError(
                "by=activations needs images, and the pool has no train_datasets; add them, or "
                "choose by=weights"
            )
        model = modelpool.architecture(modelpool.pretrained_or_first_name)
        check_treatment(self.batch_norm, modelpool, model)
        check_alignable(modelpool, self.example_input)

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the mean of the aligned experts; nothing in the pool is changed."""
        names = modelpool.model_names
        with self.profile("load members"):
            reference = modelpool.load_pretrained_or_first_model()
        treatment = check_treatment(self.batch_norm, modelpool, reference)
        unaligned: dict[str, Mapping[str, Tensor]] = {n: modelpool.tensors(n) for n in names}
        experts: dict[str, Mapping[str, Tensor]]
        with self.profile("align experts"):
            common = reference  # the result's own, where the members have nothing to average
            if self.merge_many:
                experts, records, common = self._merge_many(modelpool, reference)
            else:
                data = None
                if self.by == "activations":
                    data = activation_images(
                        modelpool,
                        batch_size=self.batch_size,
                        limit=self.calibration_images,
                        seed=self.seed,
                    )
                aligned, records = align_experts(
                    self, modelpool, reference, names, shape=self.example_input, by=self.by,
                    data=data, seed=self.seed,
                )  # fmt: skip
                experts = dict(aligned)
            keep_alignment(self, records, plot=self.plot)
        mean = partial(self._mean, treatment=treatment, modelpool=modelpool)
        with self.profile("average"):
            result = mean(experts, like=common)
        self.references["mean without alignment"] = partial(mean, unaligned, like=reference)
        self.report.update(experts=names, batch_norm=treatment)
        log.info("Mean of %d networks by %s; batch norm: %s", len(names), self.interpolation,
                 treatment)  # fmt: skip
        return result

    def _mean(
        self,
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        like: nn.Module,
        treatment: str,
        modelpool: BaseModelPool,
    ) -> nn.Module:
        result = mean_network(
            like,
            list(experts.values()),
            interpolation=self.interpolation,
            statistics=treatment if treatment in ("pretrained", "merge") else "interpolate",
        )
        members = []
        if treatment == "repair":
            for name, tensors in experts.items():
                member = modelpool.load_model(name)
                member.load_state_dict(dict(tensors))
                members.append(member)
        return treat(
            result,
            treatment,
            modelpool,
            self.fabric,
            members=members,
            images=self.calibration_images,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def _merge_many(
        self, modelpool: BaseModelPool, reference: nn.Module
    ) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, AlignmentRecord], nn.Module]:
        """Return the experts in the order they agree on, and the reference in that order too."""
        reference = copy.deepcopy(reference).eval()
        models = {name: model.eval() for name, model in modelpool.named_models()}
        spec = symmetries(reference, modelpool, self.example_input)
        device = self.fabric.device
        found = merge_many(models, spec, seed=self.seed, device=device)
        records = {name: record_of(alignment) for name, alignment in found.items()}
        experts = {name: alignment.model.state_dict() for name, alignment in found.items()}
        name = modelpool.pretrained_or_first_name
        if name in found:
            return dict(experts), records, found[name].model
        mean = mean_network(reference, list(experts.values()), statistics="pretrained")
        aligned = align(reference, mean, spec=spec, seed=self.seed, device=device)
        return dict(experts), records, aligned.model
