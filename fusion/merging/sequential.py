"""Sequential merging from input to output, with statistics behind the layers merged already."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusion.data import seed_from
from fusion.merging.batch_norm import Calibration, statistics_keys
from fusion.merging.members import LayerChoice, Members
from fusion.merging.rule import Piece, Rule
from fusion.merging.statistics import Moments, prefix_moments, stages
from fusion.merging.tensors import Statistics, merge_pieces
from fusion.modelpool import BaseModelPool
from fusion.models import Layer
from fusion.training import recalibrate_batch_norm
from fusion.training.sampling import sample_images
from fusion.weights import exact_device, load_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def merge_in_stages(
    members: Members,
    choice: LayerChoice,
    rule: Rule,
    modelpool: BaseModelPool,
    *,
    with_head: bool,
    treatment: str,
    calibration: Calibration,
    device: torch.device | str = "cpu",
    seed: int = 0,
    fabric: Fabric | None = None,
) -> dict[str, Tensor]:
    """Return the merged tensors of the chosen layers, on the CPU.

    The layers are merged in stages (:func:`~fusion.merging.statistics.stages`). For each stage the
    statistics ``gram`` and ``cross`` are measured on every expert's images, ``gram`` of the layers'
    inputs behind the merged ones, and ``cross`` of these with the outputs of the expert's layer.
    Then its layers are merged and the running statistics behind them are updated, before the next
    stage.

    A stage takes one pass of both networks over the images, which ends behind the stage: in total
    about as many whole passes as there are stages. The images, the experts and the merged network
    stay in memory; activations do not. Several processes share the images of each batch and add up
    their moments; each then merges the same layers.

    Args:
        members: base and experts.
        choice: which layers, and the experts' shares.
        rule: how one tensor is merged.
        modelpool: has the experts as networks, and their images.
        with_head: whether the head is merged like any layer.
        treatment: of running statistics; under ``recalibrate_per_task`` each task's images pass
            through statistics of that task's own.
        calibration: the sample of each expert's images.
        device: where to compute.
        seed: of everything random.
        fabric: of several processes that merge together; by default one process does it all.
    """
    walk = _Walk(members, modelpool, treatment, calibration, device, fabric)

    def pieces(
        some: LayerChoice, found: Statistics | None = None, plan: object = None
    ) -> Iterator[Piece]:
        return members.pieces(
            some,
            with_head=with_head,
            device=exact_device(device),
            seed=seed,
            statistics=found,
            plan=plan,
        )

    plan = rule.prepare(lambda: pieces(choice))
    merged: dict[str, Tensor] = {}
    in_order = stages(members.network, members.layers)
    for stage in tqdm(in_order, desc="merge", unit="stage", disable=None):
        chosen = [layer for layer in stage if layer.name in choice]
        found = walk.measure(
            [layer for layer in chosen if with_head or layer.weight not in members.head]
        )
        some = LayerChoice({layer.name: choice.shares[layer.name] for layer in chosen})
        tensors = merge_pieces(
            rule, pieces(some, found, plan), members, device=exact_device(device)
        )
        walk.advance(stage, tensors, found)
        merged |= tensors
    return merged


class _Walk:
    """The network that is being merged, alongside the experts."""

    def __init__(
        self,
        members: Members,
        modelpool: BaseModelPool,
        treatment: str,
        calibration: Calibration,
        device: torch.device | str,
        fabric: Fabric | None,
    ) -> None:
        self._members = members
        self._fabric = fabric if fabric is not None and fabric.world_size > 1 else None
        self._calibration = calibration
        self._device = device
        self._per_task = treatment == "recalibrate_per_task"
        self._remeasured = treatment.startswith("recalibrate")
        # Experts of a group share the network that their images pass through.
        self._groups = modelpool.tasks if self._per_task else {"": list(members.names)}
        self._networks = {group: copy.deepcopy(members.network) for group in self._groups}
        self._experts: dict[str, nn.Module] = {}
        self._datasets = {name: modelpool.dataset(name) for name in members.names}
        self._images: dict[str, list[Tensor]] = {}
        for name, tensors in members.experts.items():
            self._experts[name] = modelpool.load_model(name)
            load_tensors(self._experts[name], tensors)
            drawn = sample_images(
                self._datasets[name],
                images=calibration.images,
                batch_size=calibration.batch_size,
                seed=seed_from(calibration.seed, "statistics"),
            )
            self._images[name] = [mine for batch in drawn if len(mine := self._share(batch))]

    def measure(self, layers: Sequence[Layer]) -> dict[str, dict[str, Tensor]]:
        """Return the statistics of the layers that run as separate modules."""
        each: dict[str, Mapping[str, Moments]] = {}
        for group, names in self._groups.items() if layers else ():
            for name in names:
                moments = prefix_moments(
                    self._networks[group],
                    self._experts[name],
                    layers,
                    self._images[name],
                    device=self._device,
                )
                each[name] = {key: self._of_all(part) for key, part in moments.items()}
        found = {}
        for layer in layers:
            if all(layer.weight in measured for measured in each.values()):
                own = {name: each[name][layer.weight] for name in self._experts}
                found[layer.weight] = {
                    "gram": torch.stack([of_expert.xx for of_expert in own.values()]),
                    "cross": torch.stack([self._cross(layer, *item) for item in own.items()]),
                }
        return found

    def advance(
        self, stage: Sequence[Layer], merged: Mapping[str, Tensor], found: Statistics
    ) -> None:
        """Update the networks with the merged tensors of a stage."""
        for group, names in self._groups.items():
            network = self._networks[group]
            load_tensors(network, merged)
            known = set()
            for layer in stage:
                folding = self._members.foldings.get(layer.name)
                if folding is not None and layer.weight in found:
                    known.add(folding.norm)
                    if not self._per_task:
                        continue  # those of the mixture were merged
                    numbers = [self._members.names.index(name) for name in names]
                    grams = found[layer.weight]["gram"][numbers]
                    load_tensors(network, folding.statistics(merged[layer.weight], grams))
            norms = {norm for layer in stage for norm in layer.norms} - known
            if self._remeasured and statistics_keys(network, norms):
                recalibrate_batch_norm(
                    network,
                    {name: self._datasets[name] for name in names},
                    images=self._calibration.images,
                    batch_size=self._calibration.batch_size,
                    seed=self._calibration.seed,
                    device=self._device,
                    norms=norms,
                )

    def _share(self, batch: Tensor) -> Tensor:
        """Return the images of a batch that this process looks at."""
        if self._fabric is None:
            return batch
        return batch[self._fabric.global_rank :: self._fabric.world_size]

    def _of_all(self, moments: Moments) -> Moments:
        """Return the moments over the images of all processes."""
        if self._fabric is None:
            return moments
        return moments_of_all(moments, self._fabric)

    def _cross(self, layer: Layer, name: str, moments: Moments) -> Tensor:
        """Return the moments of the expert's output, its bias in the folded norm included."""
        if layer.name not in self._members.foldings:
            return moments.yx
        bias = self._members.experts[name][self._members.bias(layer)].to(moments.yx)
        return moments.yx + bias.view(*moments.yy.shape, 1) * moments.xx[:, None, -1]


def moments_of_all(moments: Moments, fabric: Fabric) -> Moments:
    """Return the moments over the images of all processes, from those of this one's images."""

    def total(tensor: Tensor) -> Tensor:
        summed = fabric.all_reduce(tensor.to(fabric.device), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed.to(tensor.device)

    positions = total(torch.tensor(moments.positions))
    return Moments(
        xx=total(moments.xx * moments.positions) / positions,
        yx=total(moments.yx * moments.positions) / positions,
        yy=total(moments.yy * moments.positions) / positions,
        positions=int(positions),
    )
