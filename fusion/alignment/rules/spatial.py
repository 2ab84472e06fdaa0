"""Operations on each channel separately: pooling, resizing, sampling, cumulative sums."""

from __future__ import annotations

from fusion.alignment.labels import Labels, grid
from fusion.alignment.primitives import confine, meet, spread
from fusion.alignment.rules.contractions import inserted
from fusion.alignment.rules.operation import Operation, Rule
from fusion.alignment.rules.reductions import squeezed

# name -> number of trailing axes over which it works
TRAILING = {
    **{
        f"{kind}{n}d": n
        for n in (1, 2, 3)
        for kind in (
            "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "max_pool",
            "upsample_nearest", "_upsample_nearest_exact",
        )
    },
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "fractional_max_pool2d": 2, "fractional_max_pool3d": 3, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
}  # fmt: skip


def trailing(op: Operation) -> tuple[Labels, ...]:
    """Work over the last axes; the position of the largest is returned along the same axes."""
    x = op["self"]
    over = frozenset(range(x.rank - TRAILING[op.name], x.rank))
    return tuple(spread(op.ledger, x, over, shape, op.why) for shape in op.shapes)


def along_axes(op: Operation) -> tuple[Labels, ...]:
    """Work over the axes ``dim`` and keep their number: cumulative sums, sorting, Fourier."""
    x = op["self"]
    over = x.axes(op["dim"]) if x.rank else frozenset()
    return tuple(spread(op.ledger, x, over, shape, op.why) for shape in op.shapes)


def parts(op: Operation) -> Labels:
    """Write complex numbers as pairs along a new last axis."""
    x = inserted(op["self"], op["self"].rank)
    return spread(op.ledger, x, frozenset((x.rank - 1,)), op.shape, op.why)


def whole(op: Operation) -> Labels:
    """Read the pairs along the last axis as complex numbers."""
    last = frozenset((op["self"].rank - 1,))
    x = spread(op.ledger, op["self"], last, [*op.shape, 1], op.why)
    return squeezed(x, last)


def fold(op: Operation) -> Labels | None:
    """Sum patches (N, C · kernel, L) into images (N, C, H, W)."""
    x: Labels = op["self"]
    if x.rank != 3:
        return None
    patches = x.viewed([*op.shape[:2], -1, x.shape[-1]])
    return spread(op.ledger, patches, frozenset((2, 3)), op.shape, op.why)


def unpool(op: Operation) -> Labels:
    """Put each value at its index."""
    x = meet(op.ledger, op["self"], op["indices"], op.why)
    over = frozenset(range(2, x.rank))
    return spread(op.ledger, x, over, op.shape, op.why)


def sample(op: Operation) -> Labels:
    """Read each channel at the positions of a grid (N, …, 2 or 3)."""
    x, where = op["input"], op["grid"]
    confine(op.ledger, where, frozenset(range(where.rank)), op.why)
    x = spread(op.ledger, x, frozenset(range(2, x.rank)), op.shape, op.why)
    return x.with_sites(*grid(op.shape, (0,)))


def crop(op: Operation) -> Labels:
    """Pool each channel in boxes: (N, C, H, W) and boxes (K, 5) -> (K, C, h, w)."""
    for other in op.labels()[1:]:
        confine(op.ledger, other, frozenset(range(other.rank)), op.why)
    return spread(op.ledger, op.labels()[0], frozenset((0, 2, 3)), op.shape, op.why)


RULES: dict[str, Rule] = {
    **dict.fromkeys(TRAILING, trailing),
    **dict.fromkeys(
        (
            "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "topk",
            "_fft_r2c", "_fft_c2r", "_fft_c2c",
        ),
        along_axes,
    ),
    "view_as_real": parts,
    "view_as_complex": whole,
    "col2im": fold,
    "max_unpool2d": unpool,
    "max_unpool3d": unpool,
    "grid_sampler_2d": sample,
    "grid_sampler_3d": sample,
    "torchvision.roi_align": crop,
    "torchvision.roi_pool": crop,
}  # fmt: skip
