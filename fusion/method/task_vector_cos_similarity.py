"""Compare the experts' task vectors: cosines, sign conflicts, layer by layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fusion.errors import UserError
from fusion.files import write_text
from fusion.method.task_vectors import TaskVectorAnalysis, TaskVectors
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.models import find_layers
from fusion.options import FilePath, Seed, Whole, checked
from fusion.weights.task_vectors import TaskVectorSums

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


class TaskVectorCosSimilarity(TaskVectorAnalysis):
    """Compare the task vectors (expert − pretrained) of a pool; return the pretrained model.

    Writes ``task_vector_cos_similarity.csv`` (experts × experts), ``task_vector_summary.csv``
    (each expert's norm, norm relative to the base and share of unchanged entries; for each pair
    the share of sign conflicts weighted by magnitude) and, when asked,
    ``task_vector_cos_similarity.pdf`` and ``.png`` and the same per layer. After ``run`` the
    tables are :attr:`similarity`, :attr:`summary` and :attr:`layer_similarity`.

    The numbers are exact to 1e-7 of a cosine, read in blocks: memory grows with the number of
    experts, not with the networks. An expert that does not differ from the base has NaN cosines.

    Args:
        plot_heatmap: draw the figures.
        trainable_only: compare the base's trainable parameters only.
        max_points_per_model: estimate from this many entries, drawn once for all experts; None
            or 0 for all.
        output_path: folder for tables and figures; None for the run folder, or nowhere.
        per_layer: also write ``task_vector_layer_similarity.csv``, and its figure: the cosine of
            every pair in every layer, in the order of the forward pass.
        cluster: order the experts in the heatmap by hierarchical clustering.
        seed: of the draw.

    Raises:
        UserError: a negative number of points.
    """

    similarity: pd.DataFrame
    summary: pd.DataFrame
    layer_similarity: pd.DataFrame | None = None

    @checked
    def __init__(
        self,
        *,
        plot_heatmap: bool = True,
        trainable_only: bool = True,
        max_points_per_model: Whole | None = None,
        output_path: FilePath | None = None,
        per_layer: bool = False,
        cluster: bool = False,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            trainable_only=trainable_only,
            max_points_per_model=max_points_per_model,
            output_path=output_path,
            seed=seed,
        )
        self.plot_heatmap = plot_heatmap
        self.per_layer = per_layer
        self.cluster = cluster

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Compare, write the tables and figures, return the pretrained model."""
        vectors = self.task_vectors(modelpool)
        with self.profile("task vectors"):
            sums = self.sums(vectors)
        experts = list(vectors.experts)
        total = sums.total()
        for expert, changed in zip(experts, total.changed[0].tolist(), strict=True):
            if changed == 0 and self._rank == 0:
                log.warning(
                    "expert '%s' does not differ from the pretrained model in what is compared: "
                    "its cosines are NaN",
                    expert,
                )
        self.similarity = _square(total, experts)
        self.summary = _summary(total, experts, vectors)
        if self.per_layer:
            self.layer_similarity = _by_layer(sums, _layers(modelpool, vectors.names), experts)
        if self.writes_to is not None:
            with self.profile("write"):
                self._write(self.writes_to)
        return modelpool.load_pretrained_model()

    def _write(self, folder: Path) -> None:
        write_text(folder / "task_vector_cos_similarity.csv", self.similarity.to_csv())
        write_text(folder / "task_vector_summary.csv", self.summary.to_csv())
        layers = self.layer_similarity
        if layers is not None:
            write_text(folder / "task_vector_layer_similarity.csv", layers.to_csv(index=False))
        if not self.plot_heatmap:
            return
        from fusion.figures.layer_agreement import layer_agreement
        from fusion.figures.similarity_heatmap import similarity_heatmap
        from fusion.figures.style import save_figure

        heatmap = similarity_heatmap(self.similarity, cluster=self.cluster)
        save_figure(heatmap, folder, "task_vector_cos_similarity")
        if layers is not None and layers.empty:
            log.info("A single expert has no pairs to compare: no figure of the layers")
        elif layers is not None:
            save_figure(layer_agreement(layers), folder, "task_vector_layer_similarity")


def _square(total: TaskVectorSums, experts: list[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(total.cosines[0].numpy(), index=experts, columns=experts)


def _summary(total: TaskVectorSums, experts: list[str], vectors: TaskVectors) -> pd.DataFrame:
    import pandas as pd

    # A sum over a sample estimates the sum over all entries.
    scale = math.sqrt(vectors.entries / vectors.points)
    table = pd.DataFrame(
        {
            "norm": (scale * total.norms[0]).numpy(),
            "norm_relative_to_base": (total.norms[0] / total.base_square.sqrt()).numpy(),
            "unchanged_share": (1 - total.changed[0] / total.entries).numpy(),
        },
        index=pd.Index(experts, name="expert"),
    )
    for column, expert in enumerate(experts):
        table[f"sign_conflict_with_{expert}"] = total.sign_conflicts[0, :, column].numpy()
    return table


def _by_layer(
    sums: TaskVectorSums, layers: dict[str, list[int]], experts: list[str]
) -> pd.DataFrame:
    """Return one row for each layer and pair of experts."""
    import pandas as pd

    rows = []
    for position, (layer, tensors) in enumerate(layers.items()):
        total = sums.total(tensors)
        entries = int(total.entries)
        for (i, a), (j, b) in combinations(enumerate(experts), 2):
            rows.append((position, layer, entries, a, b, float(total.cosines[0, i, j])))
    columns = ["position", "layer", "entries", "expert_a", "expert_b", "cosine"]
    return pd.DataFrame(rows, columns=columns)


def _layers(modelpool: BaseModelPool, names: Sequence[str]) -> dict[str, list[int]]:
    """Group the compared tensors by layer: name → indices, in the order of the forward pass."""
    index = {name: at for at, name in enumerate(names)}
    try:
        found = {
            layer.name: [index[name] for name in layer.tensors if name in index]
            for layer in find_layers(modelpool.architecture(PRETRAINED))
        }
    except UserError as error:
        log.warning("Layers are in the order of the state dict: %s", error)
        found = {}
        for name, at in index.items():
            found.setdefault(name.rpartition(".")[0] or name, []).append(at)
    return {layer: tensors for layer, tensors in found.items() if tensors}
