"""Task arithmetic with coefficients learned on unlabelled images: AdaMerging."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from fusion.errors import UserError
from fusion.files import write_text
from fusion.merging import batch_norm as bn
from fusion.merging.adaptation import (
    Coefficients,
    adapt_coefficients,
    merge_with_coefficients,
)
from fusion.merging.alignment import AlignBy
from fusion.merging.assembly import Assembly
from fusion.merging.heads import HeadChoice
from fusion.merging.rule import Need
from fusion.merging.rules import TaskArithmetic
from fusion.method.merge import Merge
from fusion.models import MultiTaskNetwork
from fusion.options import Count, ImageShape, Positive, SampleSize, Seed, checked

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Granularity = Literal["layer", "task"]


class AdaMerging(Merge):
    r"""Merge by task arithmetic with coefficients that minimise the entropy of the predictions.

    .. math::
        \theta_l = \theta_{0,l} + \sum_i \lambda_{l,i} \tau_{i,l}, \qquad
        \min_\lambda \sum_t \mathbb{E}_{x \sim D_t} H\bigl(p(y \mid x; \theta(\lambda))\bigr)

    AdaMerging (Yang et al., 2024, arXiv 2310.02575): entropy minimisation by Adam. The paper adapts
    on the unlabelled *test* images; here the training images are used, and the test set is never
    used. The network stays in evaluation mode, with running statistics recalibrated once at the
    initial coefficients; implementations that adapt in training mode also move the running
    statistics. Normalisation and biases have the coefficient of their layer.

    Args:
        granularity: ``layer`` (one coefficient per expert and layer) or ``task`` (one per expert).
        initial: initial value of all coefficients; 0.3 as in the paper.
        steps: of Adam; the paper takes 500.
        learning_rate: learning rate of Adam; 0.001 as in the paper.
        adaptation_batch: images of each task per step; 16 as in the paper.
        align, head, batch_norm, calibration_images, batch_size, example_input, plot, seed: see
            :class:`~fusion.method.Merge`.

    Raises:
        UserError: an invalid option.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE, Need.IMAGES, Need.GRADIENTS})

    @checked
    def __init__(
        self,
        *,
        granularity: Granularity = "layer",
        initial: float = 0.3,
        steps: Count = 500,
        learning_rate: Positive = 1e-3,
        adaptation_batch: Count = 16,
        align: AlignBy | None = None,
        head: HeadChoice = "auto",
        batch_norm: bn.Treatment = "auto",
        calibration_images: SampleSize = 2000,
        batch_size: SampleSize = 128,
        example_input: ImageShape | None = None,
        plot: bool = True,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            rule=TaskArithmetic(scale=initial),
            align=align,
            head=head,
            batch_norm=batch_norm,
            calibration_images=calibration_images,
            batch_size=batch_size,
            example_input=example_input,
            plot=plot,
            seed=seed,
        )
        self.granularity = granularity
        self.initial = initial
        self.steps = steps
        self.learning_rate = learning_rate
        self.adaptation_batch = adaptation_batch
        self._found: Coefficients | None = None

    def merged(self, assembly: Assembly) -> nn.Module:
        """Adapt the coefficients, and return the network merged with them."""
        start = super().merged(assembly)
        plan, members = assembly.plan, assembly.members
        device = self.fabric.device
        with self.profile("adapt coefficients"):
            self._found = adapt_coefficients(
                start.for_task if isinstance(start, MultiTaskNetwork) else lambda _: start,
                members,
                assembly.choice,
                assembly.modelpool,
                with_head=plan.head_is_a_layer,
                per_layer=self.granularity == "layer",
                initial=self.initial,
                steps=self.steps,
                learning_rate=self.learning_rate,
                batch_size=self.adaptation_batch,
                seed=self.seed,
                device=device,
                progress=self.progress,
            )
        state = merge_with_coefficients(
            self._found,
            members,
            assembly.choice,
            with_head=plan.head_is_a_layer,
            device=device,
        )
        heads = assembly.heads()
        first, last = self._found.losses[0], self._found.losses[-1]
        log.info("Entropy of the predictions: %.3f → %.3f nats", first, last)
        self.report.update(entropy_before=first, entropy_after=last)
        if self.output_path is not None and self.fabric.is_global_zero:
            table = self.coefficient_table(members.names)
            write_text(self.output_path / "coefficients.csv", table.to_csv(index=False))
        with self.profile("batch norm"):
            return assembly.network(state, heads)

    def coefficient_table(self, names: Sequence[str]) -> pd.DataFrame:
        """Return one row per layer (or a single row) with a coefficient for each expert.

        Raises:
            UserError: nothing has been merged yet.
        """
        import pandas as pd

        if self._found is None:
            raise UserError("there are no coefficients before the first run")
        table = pd.DataFrame(self._found.values.tolist(), columns=list(names))
        table.insert(0, "layer", [name or "all" for name in self._found.layers])
        return table
