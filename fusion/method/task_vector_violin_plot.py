"""Distribution of the values of the experts' task vectors (Shen et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fusion.files import atomic_path
from fusion.method.task_vectors import TaskVectorAnalysis, TaskVectors
from fusion.modelpool import BaseModelPool
from fusion.options import FilePath, Seed, Whole, checked

if TYPE_CHECKING:
    import pandas as pd


class TaskVectorViolinPlot(TaskVectorAnalysis):
    """Draw the distribution of each expert's task vector; return the pretrained model.

    As in Shen et al., "Efficient and Effective Weight-Ensembling Mixture of Experts for Multi-Task
    Model Merging" (arXiv 2410.21804). Writes ``task_vector_violin.pdf`` (values) and
    ``task_vector_violin_abs.pdf`` (absolute values), each as ``.png`` too, and what was drawn as
    ``task_vector_violin.csv``: tensor, flat index in it, and one column per expert. After
    ``run`` that table is :attr:`points`.

    With several processes the first one does all of it.

    Args:
        trainable_only: show the base's trainable parameters only.
        max_points_per_model: number of drawn entries, the same ones for every expert; None or 0 for
            all, which then have to fit in memory.
        fig_kwargs: passed on to ``matplotlib.pyplot.subplots``, such as ``figsize``.
        output_path: folder for table and figures; None for the run folder, or nowhere.
        seed: of the draw.

    Raises:
        UserError: a negative number of points.
    """

    points: pd.DataFrame

    @checked
    def __init__(
        self,
        *,
        trainable_only: bool = True,
        max_points_per_model: Whole | None = 1000,
        fig_kwargs: Mapping[str, Any] | None = None,
        output_path: FilePath | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            trainable_only=trainable_only,
            max_points_per_model=max_points_per_model,
            output_path=output_path,
            seed=seed,
        )
        self.fig_kwargs = dict(fig_kwargs or {})

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Draw the points, write table and figures, return the pretrained model."""
        if self._rank == 0:
            vectors = self.task_vectors(modelpool)
            with self.profile("task vectors"):
                self.points = _table(vectors, self.sample(vectors))
            if self.writes_to is not None:
                with self.profile("write"):
                    self._write(self.writes_to, vectors)
        return modelpool.load_pretrained_model()

    def _write(self, folder: Path, vectors: TaskVectors) -> None:
        from fusion.figures.style import save_figure
        from fusion.figures.violins import violins

        with atomic_path(folder / "task_vector_violin.csv") as temporary:
            self.points.to_csv(temporary)
        drawn = f"{vectors.points:,} of {vectors.entries:,} points of each expert"
        for stem, absolute in (("task_vector_violin", False), ("task_vector_violin_abs", True)):
            figure = violins(self.points, drawn, absolute=absolute, fig_kwargs=self.fig_kwargs)
            save_figure(figure, folder, stem)


def _table(vectors: TaskVectors, values: Tensor) -> pd.DataFrame:
    """Return one row per point, indexed by tensor and flat index, and one column per expert."""
    import numpy as np
    import pandas as pd

    sizes = [info.numel for info in vectors.infos.values()]
    indices = [np.arange(size) for size in sizes]
    if vectors.positions is not None:
        indices = [vectors.positions[name].numpy() for name in vectors.names]
    codes = np.repeat(np.arange(len(sizes)), [len(index) for index in indices])
    places = pd.MultiIndex.from_arrays(
        [
            pd.Categorical.from_codes(codes, categories=pd.Index(vectors.names)),
            np.concatenate(indices),
        ],
        names=["tensor", "index"],
    )
    return pd.DataFrame(values.T.numpy(), index=places, columns=list(vectors.experts))
