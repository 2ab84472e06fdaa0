"""Task vectors of a pool: choice of tensors and positions, and reading shared by processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from fusion.errors import UserError
from fusion.files import require_writable_folder
from fusion.method.base import BaseAlgorithm
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.options import FilePath, Seed, Whole, checked
from fusion.weights import ModuleSource, TensorInfo, TensorSource, tensors_of, trainable_state_dict
from fusion.weights.positions import draw_positions
from fusion.weights.task_vectors import TaskVectorSums, sample_task_vectors, sum_task_vectors

log = logging.getLogger(__name__)

_TOLD = 4  # names in a line of the log; the report has all of them


@dataclass(frozen=True)
class ComparedTensors:
    """Tensors of the task vectors, and those that are excluded.

    Attributes:
        infos: the tensors that are compared, in the base's order.
        left_out: the tensors that are not → why.
    """

    infos: Mapping[str, TensorInfo]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors of a pool, described, not yet read.

    Attributes:
        base: the weights that they start from.
        experts: name → the weights that they lead to.
        infos: the tensors that they consist of.
        positions: the entries of each tensor that count; None for all of them.
    """

    base: TensorSource
    experts: Mapping[str, TensorSource]
    infos: Mapping[str, TensorInfo]
    positions: Mapping[str, Tensor] | None

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return list(self.infos)

    @property
    def entries(self) -> int:
        """Number of entries of one task vector."""
        return sum(info.numel for info in self.infos.values())

    @property
    def points(self) -> int:
        """Number of entries that count."""
        if self.positions is None:
            return self.entries
        return sum(len(drawn) for drawn in self.positions.values())

    def nbytes(self, tensors: Sequence[str]) -> int:
        """Return the bytes of these tensors in all members together."""
        sources = [self.base, *self.experts.values()]
        return sum(source.info(name).nbytes for source in sources for name in tensors)


class TaskVectorAnalysis(BaseAlgorithm):
    """Base class of the analyses of task vectors; subclasses define ``run``.

    The base decides what is trainable. Tensors that a member lacks or has in another shape (a head
    for other classes) and integer buffers are excluded; the log names them, and the report has the
    full list. Members that are stored as safetensors are read in blocks and never built.

    Args:
        trainable_only: compare the base's trainable parameters only; otherwise buffers and frozen
            parameters too.
        max_points_per_model: number of drawn entries, the same ones for every expert; None or 0 for
            all.
        output_path: folder for tables and figures; None for the run folder, or nowhere.
        seed: of the draw.

    Raises:
        UserError: a negative number of points.
    """

    @checked
    def __init__(
        self,
        *,
        trainable_only: bool,
        max_points_per_model: Whole | None,
        output_path: FilePath | None,
        seed: Seed,
    ) -> None:
        self.trainable_only = trainable_only
        self.max_points_per_model = max_points_per_model
        self.output_path = None if output_path is None else Path(output_path)
        self.seed = seed

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check, before any work, that there is something to compare and a place for the results.

        Raises:
            UserError: no base, no experts, a broken member, no tensor in common, or an output
                folder that cannot be written to.
        """
        if not modelpool.has_pretrained:
            raise UserError(
                f"a task vector leads from the pretrained model to an expert, and the pool has no "
                f"pretrained model; add a member named '{PRETRAINED}'"
            )
        if not len(modelpool):
            raise UserError("the pool has no experts, so there are no task vectors; add a model")
        names = [PRETRAINED, *modelpool.model_names]
        faults = [line for name in names for line in modelpool.entry(name).check()]
        if faults:
            raise UserError("; ".join(faults))
        compared_tensors(modelpool, trainable_only=self.trainable_only)
        if self.output_path is not None:
            require_writable_folder(self.output_path)

    def task_vectors(self, modelpool: BaseModelPool) -> TaskVectors:
        """Choose the tensors and positions, log the excluded tensors, and open the members."""
        compared = compared_tensors(modelpool, trainable_only=self.trainable_only)
        if self._rank == 0:
            _tell(compared.left_out)
        positions = None
        if self.max_points_per_model:
            sizes = {name: info.numel for name, info in compared.infos.items()}
            positions = draw_positions(sizes, self.max_points_per_model, seed=self.seed)
        vectors = TaskVectors(
            base=modelpool.tensors(PRETRAINED),
            experts={name: modelpool.tensors(name) for name in modelpool.model_names},
            infos=compared.infos,
            positions=positions,
        )
        self.report.update(
            tensors=len(vectors.infos),
            entries=vectors.entries,
            points=vectors.points,
            left_out=dict(compared.left_out),
        )
        return vectors

    def sums(self, vectors: TaskVectors) -> TaskVectorSums:
        """Sum up the task vectors; the tensors are divided among processes.

        Raises:
            UserError: weights that are not finite, by model and tensor.
        """
        sizes = [info.numel for info in vectors.infos.values()]
        mine = share_out(sizes, self._world_size)[self._rank]
        names = [vectors.names[index] for index in mine]
        with self._bar(vectors, names) as on_read:
            sums = sum_task_vectors(
                vectors.base,
                list(vectors.experts.values()),
                vectors.names,
                only=mine,
                positions=vectors.positions,
                device=self._device,
                on_read=on_read,
            )
        if self._world_size > 1:
            whole = {}
            for name, part in vars(sums).items():
                added = self.fabric.all_reduce(part.to(self.fabric.device), reduce_op="sum")
                whole[name] = cast(Tensor, added).cpu()
            sums = TaskVectorSums(**whole)
        finite = sums.products.isfinite().flatten(1).all(1)
        self._require_finite(
            vectors, [n for n, ok in zip(vectors.names, finite, strict=True) if not ok]
        )
        return sums

    def sample(self, vectors: TaskVectors) -> Tensor:
        """Return the entries of the task vectors at the positions that count: (experts, points).

        Raises:
            UserError: weights that are not finite, by model and tensor.
        """
        with self._bar(vectors, vectors.names) as on_read:
            values = sample_task_vectors(
                vectors.base,
                list(vectors.experts.values()),
                vectors.names,
                positions=vectors.positions,
                on_read=on_read,
            )
        if not bool(values.isfinite().all()):
            self._require_finite(vectors, vectors.names)
        return values

    @property
    def writes_to(self) -> Path | None:
        """The folder that this process writes to; None in all processes but the first."""
        return self.output_path if self._rank == 0 else None

    @property
    def _rank(self) -> int:
        # Without a Fabric there is one process: Lightning need not be imported to know it.
        return 0 if self._fabric is None else self._fabric.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self._fabric is None else self._fabric.world_size

    @property
    def _device(self) -> torch.device:
        if self._fabric is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = self._fabric.device
        return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64

    @contextmanager
    def _bar(self, vectors: TaskVectors, names: Sequence[str]) -> Iterator[Callable[[int], object]]:
        """Show a progress bar over the bytes of ``names``; yield what moves it."""
        hidden = None if self.progress is None else not self.progress
        with tqdm(
            desc="task vectors",
            total=vectors.nbytes(names) if vectors.positions is None else None,
            unit="B",
            unit_scale=True,
            disable=True if self._rank else hidden,
        ) as bar:
            yield bar.update

    def _require_finite(self, vectors: TaskVectors, names: Sequence[str]) -> None:
        members = {PRETRAINED: vectors.base, **vectors.experts}
        faults = [
            f"model '{member}': {name} has entries that are NaN or infinite"
            for name in names
            for member, source in members.items()
            if not source[name].isfinite().all()
        ]
        if faults:
            raise UserError(
                f"{'; '.join(faults)}; weights must be finite; leave the model out or repair it"
            )


def compared_tensors(modelpool: BaseModelPool, *, trainable_only: bool) -> ComparedTensors:
    """Return the tensors common to a base and its experts, and reasons for excluding others.

    Raises:
        UserError: there is none.
    """
    architecture = modelpool.architecture(PRETRAINED)
    trainable = trainable_state_dict(architecture)
    once = {name for name, _ in (*architecture.named_parameters(), *architecture.named_buffers())}
    members = {name: _stored(modelpool, name) for name in (PRETRAINED, *modelpool.model_names)}
    base = members.pop(PRETRAINED)

    infos: dict[str, TensorInfo] = {}
    left_out: dict[str, str] = {}
    for name in tensors_of(architecture):
        info = base.info(name)
        misfit = _misfit(name, info, members)
        if name not in once:
            left_out[name] = "another name of a shared tensor"
        elif not info.dtype.is_floating_point:
            left_out[name] = "integers have no direction"
        elif trainable_only and name not in trainable:
            left_out[name] = "not trainable in the pretrained model"
        elif misfit is not None:
            left_out[name] = misfit
        else:
            infos[name] = info
    for member, source in members.items():
        for name in source:
            if name not in base:
                left_out.setdefault(name, f"only in expert '{member}'")
    if not infos:
        cure = "; trainable_only=false compares frozen parameters too" if trainable_only else ""
        raise UserError(
            f"the experts {', '.join(members)} have no tensor in common with the pretrained model "
            f"that could be compared ({_reasons(left_out)}){cure}"
        )
    return ComparedTensors(infos, left_out)


def share_out(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Distribute the indices of ``sizes`` to ``ranks`` processes with about equal work.

    The largest first, each to the least loaded process; every process finds the same result.
    """
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    return shares


def _stored(modelpool: BaseModelPool, name: str) -> TensorSource:
    """Return a source of a member's shapes, without its weights where possible."""
    return modelpool.entry(name).stored() or ModuleSource(modelpool.architecture(name))


def _misfit(name: str, info: TensorInfo, members: Mapping[str, TensorSource]) -> str | None:
    """Return why a tensor cannot be compared across all members, None if it can."""
    for member, source in members.items():
        if name not in source:
            return f"not in expert '{member}'"
        other = source.info(name)
        if other.shape != info.shape:
            return f"another shape in expert '{member}'"
        if not other.dtype.is_floating_point:
            return f"{other.dtype} in expert '{member}'"
    return None


def _tell(left_out: Mapping[str, str]) -> None:
    """Log the excluded tensors, one line per reason."""
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, reason in left_out.items() if reason == why]
        rest = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
        log.info("Left out (%s): %s%s", why, ", ".join(names[:_TOLD]), rest)


def _reasons(left_out: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for why in left_out.values():
        counts[why] = counts.get(why, 0) + 1
    return ", ".join(f"{count} {why}" for why, count in counts.items()) or "it has no tensors"
