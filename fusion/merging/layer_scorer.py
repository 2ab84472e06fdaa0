"""Score every layer of a pool: signal against noise, direction and size of the experts' changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fusion.merging import layer_scores as scores
from fusion.merging import notebook
from fusion.merging.layer_scores import LayerRecord
from fusion.merging.members import Members
from fusion.modelpool import PRETRAINED
from fusion.spectrum import LayerSNR


@dataclass(frozen=True)
class LayerScorer:
    """Scorer of the layers for a selective merge.

    Attributes:
        snr: signal-to-noise ratio of a weight, given the number of its groups; ``None`` scores as
            the notebook did.
        with_task_vectors: also the SNR of each expert's change.
        device: where to compute.
        progress: whether to show a progress bar; ``None`` shows it where there is a terminal.
    """

    snr: Callable[..., LayerSNR] | None
    with_task_vectors: bool = False
    device: torch.device | str = "cpu"
    progress: bool | None = None

    def score(self, members: Members, *, with_head: bool) -> list[LayerRecord]:
        """Return one record for each layer, in the order of the forward pass.

        Args:
            members: base and experts.
            with_head: whether the head is a candidate like any layer.
        """
        assert members.base is not None
        records = []
        hidden = None if self.progress is None else not self.progress
        for layer in tqdm(members.layers, desc="Scoring layers", unit="layer", disable=hidden):
            record = LayerRecord(layer, tuple(members.base[layer.weight].shape))
            record.is_head = not with_head and any(key in members.head for key in layer.tensors)
            for name, member in {PRETRAINED: members.base, **members.experts}.items():
                record.snr[name] = self._of_weight(member[layer.weight], record)
            if not record.is_head:
                self._compare(record, members, members.base)
            records.append(record)
        return records

    def _of_weight(self, weight: Tensor, record: LayerRecord) -> LayerSNR:
        weight = weight.to(self.device)
        if self.snr is None:
            return notebook.score(weight)
        matrix = scores.weight_matrix(weight, record.layer)
        return self.snr(matrix, groups=record.layer.groups)

    def _compare(self, record: LayerRecord, members: Members, base: Mapping[str, Tensor]) -> None:
        """Compare the experts' changes to one layer: direction, size, and SNR if requested."""
        keys = members.parameters(record.layer)
        vectors = [
            torch.cat([member[key].to(self.device, torch.float64).flatten() for key in keys])
            for member in (base, *members.experts.values())
        ]
        record.similarity, record.relative_change = scores.change_statistics(
            vectors[0], vectors[1:]
        )
        if self.with_task_vectors:
            key = record.layer.weight
            found = [
                self._of_weight(source[key].double() - base[key].double(), record).snr
                for source in members.experts.values()
            ]
            record.task_vector_snr = sum(found) / len(found)
