"""Fine-tune a network: its head, the layers that were merged, or all of it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn
from torch.utils.data import Dataset

from fusion.data import batches, few, seed_from
from fusion.errors import UserError, suggestion
from fusion.models import Layer, MultiTaskNetwork, find_head, find_layers
from fusion.options import Count, NonNegative, Positive, Seed, checked
from fusion.training.feeding import TrainingData
from fusion.training.fitting import fit
from fusion.training.history import History
from fusion.training.measuring import Measurement, measure
from fusion.training.schedule import Schedule

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

Strategy = Literal["head", "selective", "full"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned network and the cost of its training.

    Attributes:
        model: the network.
        strategy: what was trained.
        same_as: strategies that would have trained exactly the same tensors: ``full`` for
            ``selective`` where every layer was merged, ``head`` where none was.
        trained_layers: names of the trained layers, in the order of the forward pass.
        trained_parameters: how many numbers were trained.
        parameters: how many the network has.
        images: how many training images there were.
        history: scores of every pass.
        cost: wall time and peak memory of the training.
    """

    model: nn.Module
    strategy: str
    same_as: tuple[str, ...]
    trained_layers: tuple[str, ...]
    trained_parameters: int
    parameters: int
    images: int
    history: History
    cost: Measurement

    def report(self) -> dict[str, Any]:
        """Return everything except the network as plain values."""
        return {
            "strategy": self.strategy,
            "same_as": list(self.same_as),
            "trained_layers": list(self.trained_layers),
            "trained_parameters": self.trained_parameters,
            "parameters": self.parameters,
            "images": self.images,
            "seconds": self.cost.seconds,
            "peak_bytes": self.cost.peak_bytes,
            "memory": self.cost.memory,
            "history": asdict(self.history)["epochs"],
        }


class FineTuning:
    """Options of fine-tuning.

    Args:
        strategy: ``head`` (the last layer of each output), ``selective`` (the layers that were
            merged, and the head), ``full`` (everything). Layers that are not trained also keep
            their batch-norm statistics.
        epochs: passes over the images.
        lr: the highest learning rate.
        weight_decay: weight decay of AdamW.
        batch_size: images per step.
        schedule: learning-rate schedule: ``one_cycle``, ``cosine``, ``constant``.
        augment: apply the data set's own augmentation.
        images: number of training images, drawn at random with equal counts per class; None for all
            of them.
        seed: of the draw, the order and dropout.
        fast_dev_run: one pass of one batch.

    Raises:
        UserError: an invalid option.
    """

    @checked
    def __init__(
        self,
        *,
        strategy: Strategy = "head",
        epochs: Count = 3,
        lr: Positive = 2e-3,
        weight_decay: NonNegative = 0.01,
        batch_size: Count = 128,
        schedule: Schedule = "one_cycle",
        augment: bool = False,
        images: Count | None = None,
        seed: Seed = 0,
        fast_dev_run: bool = False,
    ) -> None:
        self.strategy = strategy
        self.images = images
        self.seed = seed
        self._fit: dict[str, Any] = {
            "epochs": 1 if fast_dev_run else epochs,
            "lr": lr,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "schedule": schedule,
            "augment": augment,
            "max_batches": 1 if fast_dev_run else None,
        }

    def run(
        self,
        model: nn.Module,
        data: TrainingData,
        *,
        merged: Sequence[str] = (),
        head: Sequence[str] = (),
        fabric: Fabric | None = None,
    ) -> FineTuned:
        """Return a fine-tuned copy of ``model``.

        Args:
            model: the network; it is not changed.
            data: training images, labelled by the network's outputs; task → images for a
                :class:`~fusion.models.MultiTaskNetwork`.
            merged: names of the layers that were merged, for ``selective``.
            head: tensors of the head; by default the last layer of each output.
            fabric: where to train; by default the best available device.

        Raises:
            UserError: the images cannot be drawn, or training fails.
        """
        device = next(model.parameters()).device
        parts = data if isinstance(data, Mapping) else {None: data}
        first = next(iter(parts.values()))
        images, _ = next(batches(first, batch_size=2, device=device, limit=2))
        plain = model.for_task(model.tasks[0]) if isinstance(model, MultiTaskNetwork) else model
        layers = find_layers(plain, images)
        own = tuple(head) or find_head(plain, images).tensors
        choices = {strategy: _tensors(layers, strategy, merged, own) for strategy in STRATEGIES}
        chosen = choices[self.strategy]
        same_as = [s for s in STRATEGIES if s != self.strategy and choices[s] == chosen]
        names = [layer.name for layer in layers if chosen & set(layer.tensors)]
        drawn = {task: self._drawn(dataset, len(parts), task) for task, dataset in parts.items()}
        log.info("Fine-tuning (%s): %d of %d layers", self.strategy, len(names), len(layers))
        network = copy.deepcopy(model)
        with measure(fabric.device if fabric is not None else "cpu") as cost:
            history = fit(
                network,
                drawn.get(None, drawn),  # type: ignore[arg-type]
                trainable=sorted(_in_all_networks(model, chosen)),
                seed=self.seed,
                fabric=fabric,
                label=f"fine-tuning ({self.strategy})",
                **self._fit,
            )
        return FineTuned(
            model=network,
            strategy=self.strategy,
            same_as=tuple(same_as),
            trained_layers=tuple(names),
            trained_parameters=history.trained_parameters,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            images=sum(map(len, drawn.values())),  # type: ignore[arg-type]
            history=history,
            cost=cost,
        )

    def _drawn(self, dataset: Dataset[Any], parts: int, task: str | None) -> Dataset[Any]:
        """Return the images that one task is trained on: its share of all."""
        if self.images is None:
            return dataset
        seed = seed_from(self.seed, "fine-tuning", *([] if task is None else [task]))
        return few(dataset, max(1, self.images // parts), seed=seed)


def _tensors(
    layers: Sequence[Layer], strategy: str, merged: Sequence[str], head: Sequence[str]
) -> frozenset[str]:
    """Return the tensors that a strategy trains."""
    if strategy == "full":
        return frozenset(key for layer in layers for key in layer.tensors)
    trained = set(head)
    if strategy == "selective":
        owned: Mapping[str, tuple[str, ...]] = {
            # Under the notebook's scoring a norm is a separate layer, named by its module.
            **{norm: _within(layer, norm) for layer in layers for norm in layer.norms},
            **{layer.name: layer.tensors for layer in layers},
        }
        for name in merged:
            if name not in owned:
                raise UserError(
                    f"finetune: the network has no layer '{name}'{suggestion(name, owned)}"
                )
            trained |= set(owned[name])
    return frozenset(trained)


def _within(layer: Layer, module: str) -> tuple[str, ...]:
    return tuple(key for key in layer.tensors if key.startswith(f"{module}."))


def _in_all_networks(model: nn.Module, tensors: Collection[str]) -> set[str]:
    """Return the state-dict keys of ``model`` for ``tensors`` of each task's network."""
    if not isinstance(model, MultiTaskNetwork):
        return set(tensors)
    networks = range(len(model.networks))
    return {f"networks.{number}.{key}" for number in networks for key in tensors}
