"""The training loop, on any device and any number of processes through Lightning Fabric."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fusion.data import batches, seed_from
from fusion.errors import UserError
from fusion.options import Count, NonNegative, Positive, Seed, checked
from fusion.training.feeding import Feed, Part, TrainingData
from fusion.training.freezing import freeze
from fusion.training.history import Epoch, History, Scores
from fusion.training.restoring import restored
from fusion.training.schedule import Schedule, learning_rate_factor
from fusion.training.scoring import Scorer

if TYPE_CHECKING:
    from lightning.fabric import Fabric

OptimizerName = Literal["adamw", "sgd"]
MOMENTUM = 0.9  # of SGD


@checked
def fit(
    model: nn.Module,
    dataset: TrainingData,
    *,
    val: TrainingData | None = None,
    epochs: Count = 10,
    lr: Positive = 1e-3,
    weight_decay: NonNegative = 0.01,
    optimizer: OptimizerName = "adamw",
    batch_size: Count = 128,
    schedule: Schedule = "one_cycle",
    augment: bool = False,
    trainable: Iterable[str] | None = None,
    channels_last: bool = True,
    compile: bool = False,
    max_batches: Count | None = None,
    seed: Seed = 0,
    fabric: Fabric | None = None,
    progress: bool = True,
    label: str = "training",
) -> History:
    """Train ``model`` in place on the cross-entropy; only its values are changed.

    The same call on the same machine gives the same bits: order, augmentation and dropout come from
    ``seed``, and torch's global generator is neither used nor disturbed. Modes, device, types,
    memory format and ``requires_grad`` are restored. An incomplete last batch is dropped from each
    pass (different images each time), for the sake of batch norm.

    Args:
        model: takes images (N, C, H, W), returns logits (N, classes).
        dataset: :class:`~fusion.data.ImageTensors`, or any map-style set of normalised tensors;
            or task → data set for a :class:`~fusion.models.MultiTaskNetwork`, whose loss is then
            the mean over the tasks; each step passes images of all tasks through the network as
            one batch.
        val: images to score after every pass, in the network's evaluation mode.
        epochs: passes over the data.
        lr: the highest learning rate.
        weight_decay: weight decay, of AdamW relative to the learning rate, of SGD added to the
            gradient.
        optimizer: ``adamw``, or ``sgd`` with a momentum of 0.9.
        batch_size: images per step, over all processes together.
        schedule: learning-rate schedule; see :mod:`fusion.training.schedule`.
        augment: apply the data set's own augmentation.
        trainable: names of the tensors or modules to train; the others are frozen completely, see
            :func:`~fusion.training.freeze`. By default every parameter that requires a gradient.
        channels_last: train in the ``channels_last`` memory format.
        compile: compile the network first (pays off in long runs; needs a C++ compiler on a CPU).
        max_batches: maximum number of steps per pass.
        seed: seed of all random choices.
        fabric: device, precision and processes; launched already if it has several. By default
            the best available single device in full precision. Mixed precision trains float32
            weights; Fabric's "true" half precisions round all of them, the frozen ones too.
        progress: show a progress bar where there is a terminal.
        label: name of this run in the progress bar.

    Returns:
        The scores and the time of every pass.

    Raises:
        UserError: an invalid option, labels without an output of the network, or a loss that is no
            longer finite.
    """
    fabric = fabric or _default_fabric()
    feed = Feed(
        dataset,
        batch_size=batch_size,
        device=fabric.device,
        max_batches=max_batches,
        seed=seed,
        augment=augment,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    steps = feed.steps
    rates = (
        lr * learning_rate_factor(schedule, step, epochs * steps) for step in itertools.count()
    )
    with ExitStack() as stack:
        stack.enter_context(restored(model))
        train_mode: Callable[[], object] = model.train
        if trainable is not None:
            train_mode = stack.enter_context(freeze(model, trainable)).train
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise UserError("model: none of its parameters requires a gradient; name some to train")
        stack.enter_context(_own_random_numbers(fabric, seed))
        stack.callback(model.zero_grad, set_to_none=True)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        compiled = cast(nn.Module, torch.compile(model)) if compile else model
        network, stepping = fabric.setup(
            compiled,
            _optimizer(optimizer, parameters, lr, weight_decay, fabric.device),
        )
        bar = stack.enter_context(
            tqdm(
                total=epochs * steps,
                desc=label,
                unit="batch",
                disable=None if progress and fabric.is_global_zero else True,
            )
        )
        passed = []
        for epoch in range(epochs):
            start = time.perf_counter()
            train_mode()
            scorer = Scorer(processes=fabric.world_size)
            for parts in feed.epoch(epoch):
                stepping.param_groups[0]["lr"] = next(rates)
                losses = []
                outputs = 0  # of the tasks so far: their classes are counted one after another
                for part, logits in zip(
                    parts, _logits(network, parts, channels_last=channels_last), strict=True
                ):
                    _check_outputs(logits, dataset, part.task)
                    losses.append(F.cross_entropy(logits, part.labels))
                    scorer.update(losses[-1], logits, part.labels, first=outputs)
                    outputs += logits.shape[1]
                loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
                stepping.zero_grad()
                fabric.backward(loss)
                stepping.step()
                bar.update()
            train = scorer.compute(outputs)
            if not math.isfinite(train.loss):
                raise UserError(
                    f"lr: the loss is {train.loss} after {epoch + 1} passes at a learning rate of "
                    f"{lr}; give a lower one"
                )
            _agree_on_buffers(fabric, model)
            tested = None if val is None else _score(fabric, model, val, batch_size)
            passed.append(Epoch(train, tested, time.perf_counter() - start))
            bar.set_postfix(_figures(train, tested))
    return History(tuple(passed), sum(parameter.numel() for parameter in parameters))


def _optimizer(
    name: OptimizerName,
    parameters: list[nn.Parameter],
    lr: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    # Fused: on small networks the plain step costs as much as the forward pass.
    fused = device.type in ("cpu", "cuda")
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay, fused=fused
        )
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


def _default_fabric() -> Fabric:
    from lightning.fabric import Fabric  # here, because it takes seconds to import

    return Fabric(accelerator="auto", devices=1)


def _logits(network: nn.Module, parts: Sequence[Part], *, channels_last: bool) -> list[Tensor]:
    """Return the logits of each part of a batch; several tasks pass through the network at once."""
    images = [part.images for part in parts]
    if channels_last:
        images = [batch.contiguous(memory_format=torch.channels_last) for batch in images]
    tasks = [part.task for part in parts]
    if tasks == [None]:
        return [network(images[0])]
    outputs = network(dict(zip(tasks, images, strict=True)))
    return [outputs[task] for task in tasks]


def _named(task: str | None) -> dict[str, str]:
    return {} if task is None else {"task": task}


def _check_outputs(logits: Tensor, data: TrainingData, task: str | None) -> None:
    dataset = data[task] if isinstance(data, Mapping) and task is not None else data
    classes = getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
    if classes is not None and len(classes) > logits.shape[1]:
        raise UserError(
            f"dataset: it has {len(classes)} classes, the model {logits.shape[1]} outputs"
            f"{f' for the task {task!r}' if task else ''}; give the model a head for all classes"
        )


@contextmanager
def _own_random_numbers(fabric: Fabric, seed: int) -> Iterator[None]:
    """Seed dropout, select deterministic convolutions, and undo both afterwards."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    on_gpu = fabric.device.type == "cuda"
    with torch.random.fork_rng(devices=[fabric.device] if on_gpu else []):
        own = seed_from(seed, "dropout", fabric.global_rank)
        torch.default_generator.manual_seed(own)
        if on_gpu:
            torch.cuda.manual_seed(own)
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


def _agree_on_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Copy the running statistics of the first process to all others: each saw different images."""
    if fabric.world_size > 1:
        theirs = fabric.broadcast([buffer.cpu() for buffer in model.buffers()])
        for buffer, value in zip(model.buffers(), theirs, strict=True):
            buffer.copy_(value)


@torch.no_grad()
def _score(fabric: Fabric, model: nn.Module, data: TrainingData, batch_size: int) -> Scores:
    # The bare module: processes have different numbers of batches here, and compiling for the
    # size of each last batch would take longer than to score it.
    model.eval()
    dtype = next(model.parameters()).dtype  # not float32 under Fabric's "true" half precisions
    scorer = Scorer(processes=fabric.world_size)
    outputs = 0
    for task, dataset in (data if isinstance(data, Mapping) else {None: data}).items():
        for images, labels in batches(
            dataset,
            batch_size=batch_size,
            device=fabric.device,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        ):
            with fabric.autocast():
                logits = model(images.to(dtype), **_named(task))
            _check_outputs(logits, data, task)
            loss = F.cross_entropy(logits.float(), labels)
            scorer.update(loss, logits, labels, first=outputs)
        outputs += logits.shape[1]
    return scorer.compute(outputs)


def _figures(train: Scores, val: Scores | None) -> dict[str, str]:
    figures = {name: f"{getattr(train, name):.3f}" for name in ("loss", "accuracy", "f1")}
    return figures if val is None else {**figures, "val accuracy": f"{val.accuracy:.3f}"}
