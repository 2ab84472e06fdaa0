"""The signal-to-noise ratio of a layer: its singular values above and below the edge of noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from fusion.errors import UserError, suggestion
from fusion.spectrum.noise_model import (
    MIN_ALPHA,
    SigmaRule,
    ThresholdRule,
    estimate_sigma,
    noise_threshold,
)
from fusion.spectrum.svd import singular_values, to_float64

MIN_SINGULAR_VALUES = 3  # with fewer singular values there is no majority of noise
MIN_RESOLUTION = 1e-12  # relative; the decomposition's own rounding in float64 stays well below it


@dataclass(frozen=True, eq=False)
class LayerSNR:
    """Result of the noise model for one weight.

    Attributes:
        snr: Σ s[s > τ] / Σ s[s ≤ τ]; 0 when there is no signal. Dimensionless and independent of
            scale.
        signal_rank: number of singular values above the threshold.
        sigma: the estimated standard deviation of the noise, in the unit of the weight.
        threshold: τ, the singular value above which there is signal, in the unit of the weight.
        singular_values: all of them, descending, float64 on the CPU.
    """

    snr: float
    signal_rank: int
    sigma: float
    threshold: float
    singular_values: Tensor


def layer_snr(
    weight: Tensor,
    *,
    sigma: SigmaRule = "median",
    threshold: ThresholdRule = "tracy_widom",
    alpha: float = 0.01,
    groups: int = 1,
) -> LayerSNR:
    """Measure how far ``weight`` stands out from noise.

    The weight is flattened (see :func:`as_matrix`) to a×b with a ≤ b and taken for a matrix of few
    strong directions plus independent noise of one standard deviation σ, which is estimated from
    the median singular value. The score is the ratio of the sums of singular values above and below
    the threshold (Hartford et al., 2024, "Spectrum", without their division by the largest singular
    value, which made the score depend on the unit of the weight). Scale, transposition, permutation
    of rows or columns and memory format do not change it.

    What the theory does not cover:

    - Rows and columns of exact zeros (dead channels) are no noise and are left out; of a grouped
      weight, blocks of zeros. A weight of zeros has SNR, rank, σ and threshold 0.
    - With fewer than three singular values left, SNR and rank are 0. At most half of the singular
      values can be found to be signal, since the median has to be noise.
    - Exactly low-rank weights have no noise except rounding: σ is at least the resolution of the
      dtype (at least 1e-12) times the root mean square of the weight, and the noise counts as at
      least one singular value at the threshold. The SNR is then finite, of the order of
      1/resolution.
    - A grouped weight is a stack of blocks: σ from all their singular values together, each block
      against the threshold of its size at level ``alpha``/blocks, sums over all blocks. Depthwise
      kernels are one matrix with a row per channel.

    Args:
        weight: (out, in/groups, …), or (in, out/groups, …) of a transposed convolution; any
            floating-point dtype, device and memory format. Computed in float64.
        sigma: ``median``: s_median/√((b−½)μ_β), μ_β the median of the Marchenko–Pastur law (Gavish
            & Donoho 2014; the half, as in Johnstone's centring, removes a bias of −1/(4b), which
            alone raised false alarms from 3 % to 4 % at 64×64). ``iqr``: the same with
            interquartile ranges; far noisier. ``notebook``: IQR(s)/1.349, not calibrated.
        threshold: ``tracy_widom``: the value that the largest singular value of noise exceeds with
            probability ``alpha`` (Johnstone 2001). ``mp_edge``: σ(√a+√b), its limit for large
            matrices. ``gavish_donoho``: the optimal hard threshold for reconstruction (2014).
            ``notebook``: σ(1+√β), not calibrated.
        alpha: level of ``tracy_widom`` for known σ; the other thresholds have none. As σ is
            estimated, pure noise is called signal in 1.5–3 % at α = 0.01 for a ≥ 16 (5 % of small
            square matrices, 16×16): ``scripts/calibrate_noise_model.py`` prints the table.
        groups: of the convolution.

    Raises:
        UserError: an unknown rule, ``alpha`` out of range, groups that do not divide the weight, or
            a weight that is not of finite floating-point numbers.

    Example::

        >>> import torch
        >>> from fusion.spectrum import layer_snr
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(64, 32, 3, 3, generator=generator)
        >>> layer_snr(noise).signal_rank
        0
        >>> signal = noise + 10 * torch.ones(64, 1, 1, 1) * torch.ones(1, 32, 3, 3)
        >>> layer_snr(signal).signal_rank
        1
    """
    _check_choice("sigma", sigma, get_args(SigmaRule))
    _check_choice("threshold", threshold, get_args(ThresholdRule))
    if not MIN_ALPHA <= alpha < 1:
        raise UserError(f"alpha: a level from {MIN_ALPHA:g} to below 1 is needed, got {alpha}")
    if not weight.is_floating_point():
        raise UserError(f"layer_snr needs a floating-point weight, got dtype {weight.dtype}")

    blocks = as_matrix(to_float64(weight), groups)
    largest = float(blocks.abs().amax()) if blocks.numel() else 0.0
    if not math.isfinite(largest):
        raise UserError(
            "layer_snr needs finite numbers, got a weight with nan or inf; "
            "was the checkpoint damaged, or did its training diverge?"
        )
    if largest == 0:
        return LayerSNR(0.0, 0, 0.0, 0.0, torch.zeros(0, dtype=torch.float64))

    blocks = _without_zeros(blocks) / largest  # no under- or overflow, whatever the unit
    a, b = sorted(blocks.shape[1:])
    values = singular_values(blocks)
    resolution = max(torch.finfo(weight.dtype).eps, MIN_RESOLUTION)
    rounding = resolution * float(blocks.square().mean().sqrt())
    noise_sigma = max(estimate_sigma(values, a, b, sigma), rounding)
    edge = noise_threshold(noise_sigma, a, b, threshold, alpha=alpha / len(blocks))

    above = values > edge
    if len(values) < MIN_SINGULAR_VALUES:
        above = torch.zeros_like(above)
    noise = max(float(values[~above].sum()), edge)
    return LayerSNR(
        snr=float(values[above].sum()) / noise,
        signal_rank=int(above.sum()),
        sigma=noise_sigma * largest,
        threshold=edge * largest,
        singular_values=values * largest,
    )


def as_matrix(weight: Tensor, groups: int = 1) -> Tensor:
    """Return ``weight`` as a stack of matrices, (blocks, rows, columns), one block per group.

    (out, in/groups, …) becomes (groups, out/groups, in/groups · kernel); a transposed convolution's
    (in, out/groups, …) likewise with the roles of in and out exchanged. Where a group has a single
    input or a single output channel (depthwise), a block would be a vector, so all rows form one
    matrix (1, out, in/groups · kernel). One dimension n gives (1, 1, n).

    Raises:
        UserError: ``groups`` does not divide the first dimension.

    Example::

        >>> import torch
        >>> from fusion.spectrum import as_matrix
        >>> as_matrix(torch.zeros(8, 2, 3, 3), groups=4).shape  # 4 groups of 2 outputs
        torch.Size([4, 2, 18])
        >>> as_matrix(torch.zeros(8, 1, 3, 3), groups=8).shape  # depthwise
        torch.Size([1, 8, 9])
    """
    rows = weight.reshape(1, -1) if weight.ndim < 2 else weight.flatten(1)
    if groups < 1 or len(rows) % groups:
        raise UserError(
            f"groups={groups} does not divide the {len(rows)} rows of a weight of shape "
            f"{tuple(weight.shape)}; pass the groups of its convolution"
        )
    depthwise = len(rows) == groups or (weight.ndim > 1 and weight.shape[1] == 1)
    return rows.reshape(1 if depthwise else groups, -1, rows.shape[1])


def _without_zeros(blocks: Tensor) -> Tensor:
    """Drop the blocks of zeros, or the rows and columns of zeros of a single block."""
    nonzero = blocks != 0
    if len(blocks) > 1:
        return blocks[nonzero.any(dim=2).any(dim=1)]
    block, nonzero = blocks[0], nonzero[0]
    return block[nonzero.any(dim=1)][:, nonzero.any(dim=0)].unsqueeze(0)


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"{option}: there is no rule '{value}'{suggestion(value, known)} "
            f"(rules: {', '.join(known)})"
        )
