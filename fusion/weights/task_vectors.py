"""Sums over task vectors (expert minus base), computed in blocks within bounded memory.

Every number here is a sum over entries, so it is gathered tensor by tensor and block by block.
Products are formed in float64; differences are float32 (float64 where a member is), whose rounding
is relative to the difference itself. One block per member and core is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fusion.weights.precision import working_dtype
from fusion.weights.source import TensorSource
from fusion.weights.threads import threads_over_blocks

READ = 1 << 18  # elements that are read at a time: a megabyte of float32, cheap to request
SLICE = 1 << 14  # elements that a core works on at a time: eight experts of it stay in its cache


@dataclass(frozen=True)
class TaskVectorSums:
    """Sums over the entries of the task vectors d_i of n experts, tensor by tensor.

    All are float64 tensors on the CPU with the T tensors along the first dimension.

    Attributes:
        products: (T, n, n) inner products d_i · d_j.
        magnitude: (T, n) sums of |d_i|.
        opposed: (T, n, n) sums of |d_i| over the entries at which d_j has the other sign.
        changed: (T, n) numbers of entries at which d_i is not 0.
        entries: (T,) numbers of entries.
        base_square: (T,) squared norms of the base.
    """

    products: Tensor
    magnitude: Tensor
    opposed: Tensor
    changed: Tensor
    entries: Tensor
    base_square: Tensor

    @classmethod
    def zeros(cls, tensors: int, experts: int) -> TaskVectorSums:
        """Return empty sums."""
        pair, single = (tensors, experts, experts), (tensors, experts)
        shapes = (pair, single, pair, single, (tensors,), (tensors,))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def total(self, tensors: Sequence[int] | None = None) -> TaskVectorSums:
        """Return the sums over some of the tensors (all by default), taken as one tensor."""
        chosen = slice(None) if tensors is None else list(tensors)
        return TaskVectorSums(
            *(getattr(self, field.name)[chosen].sum(0, keepdim=True) for field in fields(self))
        )

    @property
    def norms(self) -> Tensor:
        """(T, n) norms of the task vectors."""
        return self.products.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def cosines(self) -> Tensor:
        """(T, n, n) cosines, exactly 1 on the diagonal, NaN where a task vector is 0."""
        norms = self.norms
        cosines = self.products / (norms[:, :, None] * norms[:, None, :])
        own = torch.eye(norms.shape[1], dtype=torch.bool)
        return torch.where(own & ~cosines.isnan(), 1.0, cosines.clamp(-1, 1))

    @property
    def sign_conflicts(self) -> Tensor:
        """(T, n, n) shares of the magnitude of two task vectors where their signs differ.

        The sum of |d_i| + |d_j| over the entries with opposite signs, divided by the sum over all
        entries: the sign conflict that TIES resolves. NaN where both are 0.
        """
        mass = self.magnitude[:, :, None] + self.magnitude[:, None, :]
        return (self.opposed + self.opposed.mT) / mass


def sum_task_vectors(
    base: TensorSource,
    experts: Sequence[TensorSource],
    names: Sequence[str],
    *,
    only: Iterable[int] | None = None,
    positions: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    on_read: Callable[[int], object] | None = None,
) -> TaskVectorSums:
    """Sum up the task vectors of ``experts`` over the tensors ``names``.

    On the CPU the blocks are shared out among threads, one for each core.

    Args:
        base: the weights that the task vectors start from.
        experts: the weights that they lead to.
        names: floating-point tensors that all of them have in one shape.
        only: indices into ``names``; the sums of the other tensors stay 0. By default all.
        positions: for each name, the ascending flat positions (int64) that count; by default all.
        device: where the blocks are computed.
        on_read: called with the number of bytes after each read.

    Returns:
        The sums, one row per entry of ``names``. They are identical, bit for bit, whichever other
        tensors are requested and whatever the number of threads.
    """
    device = torch.device(device)
    sums = TaskVectorSums.zeros(len(names), len(experts))
    blocks = [
        (index, start)
        for index in (range(len(names)) if only is None else only)
        for start in range(0, base.info(names[index]).numel, READ)
    ]

    def measure(block: tuple[int, int]) -> TaskVectorSums:
        index, start = block
        chosen = None if positions is None else positions[names[index]]
        rows = _rows([base, *experts], names[index], start, chosen, on_read)
        return _sum_block([row.to(device, non_blocking=True) for row in rows])

    with threads_over_blocks(device) as each:
        for (index, _), part in zip(blocks, each(measure, blocks), strict=True):
            for field in fields(sums):
                getattr(sums, field.name)[index] += getattr(part, field.name)[0]
    return sums


def sample_task_vectors(
    base: TensorSource,
    experts: Sequence[TensorSource],
    names: Sequence[str],
    *,
    positions: Mapping[str, Tensor] | None = None,
    on_read: Callable[[int], object] | None = None,
) -> Tensor:
    """Return the entries of the task vectors at ``positions`` (all by default).

    Returns:
        (n, k) for n experts, float32 or better, in the order of ``names`` and positions.
    """
    parts = []
    for name in names:
        chosen = None if positions is None else positions[name]
        for start in range(0, base.info(name).numel, READ):
            first, *others = _rows([base, *experts], name, start, chosen, on_read)
            parts.append(torch.stack(others) - first)
    return torch.cat(parts, dim=1) if parts else torch.zeros(len(experts), 0)


def _rows(
    sources: Sequence[TensorSource],
    name: str,
    start: int,
    positions: Tensor | None,
    on_read: Callable[[int], object] | None,
) -> list[Tensor]:
    """Read one block of each source, in one dtype; with ``positions``, only around those in it."""
    stop = start + READ
    inside = None
    if positions is not None:
        low, high = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
        inside = positions[low:high]
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (start, start)
    rows = [source.read(name, start, stop) for source in sources]
    if on_read is not None:
        on_read(sum(row.nbytes for row in rows))
    dtype = working_dtype(rows)
    if inside is not None:
        rows = [row[(inside - start).to(row.device)] for row in rows]
    return [row.to(dtype) for row in rows]


def _sum_block(rows: Sequence[Tensor]) -> TaskVectorSums:
    """Sum up one block: the row of the base and those of the experts."""
    device = rows[0].device
    experts = len(rows) - 1
    products = torch.zeros(experts, experts, dtype=torch.float64, device=device)
    agreeing = torch.zeros_like(products)  # sums of d_i * sign(d_j)
    present = torch.zeros_like(products)  # sums of |d_i| where d_j is not 0
    changed = torch.zeros(experts, dtype=torch.float64, device=device)
    step = SLICE if device.type == "cpu" else READ
    for base, *others in zip(*(torch.split(row, step) for row in rows), strict=True):
        vectors = base.new_empty(experts, base.numel())
        for vector, other in zip(vectors, others, strict=True):
            torch.sub(other, base, out=vector)
        # In float32 the rounding of equal addends piles up: experts one sign-like step away from
        # the base (Adam's first) would have cosines that are off by 1e-6.
        precise = vectors.double()
        products += precise @ precise.T
        signs = vectors.sign()
        counts = torch.linalg.vecdot(signs, signs)  # exact: the integers up to 2**24
        with_sign = (vectors @ signs.T).double()
        agreeing += with_sign
        if bool((counts == base.numel()).all()):
            present += with_sign.diagonal()[:, None]
        else:
            present += vectors.abs() @ signs.abs().T
        changed += counts
    entries = torch.tensor(float(rows[0].numel()), dtype=torch.float64)
    base_norm = torch.linalg.vector_norm(rows[0], dtype=torch.float64)
    sums = (
        products,
        agreeing.diagonal(),
        (present - agreeing).clamp(min=0) / 2,
        changed,
        entries,
        base_norm.square(),
    )
    return TaskVectorSums(*(value.cpu()[None] for value in sums))
