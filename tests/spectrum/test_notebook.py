from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion.spectrum import notebook_score


def by_the_letter(matrix: np.ndarray) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    threshold = sigma * (1 + np.sqrt(min(matrix.shape) / max(matrix.shape)))
    signal, rest = values[values > threshold].sum(), values[values <= threshold].sum()
    return float(signal / (rest if rest else 1.0) / values.max())


@pytest.mark.parametrize("shape", [(16, 144), (64, 64), (100, 10), (32, 8, 3, 3)])
def test_it_is_the_formula(noise, shape):
    weight = noise(*shape)
    expected = by_the_letter(weight.double().numpy().reshape(shape[0], -1))
    assert notebook_score(weight) == pytest.approx(expected, rel=1e-9)


def test_every_vector_scores_one(noise):
    assert notebook_score(noise(64)) == 1
    assert notebook_score(torch.full((64,), 1e-3)) == pytest.approx(1, abs=1e-12)


def test_no_signal_scores_zero():
    assert notebook_score(torch.zeros(8, 8)) == 0
    assert notebook_score(torch.zeros(8)) == 0


def test_without_noise_the_denominator_is_one():
    # all singular values equal: IQR 0, threshold 0, every one of the 8 is signal
    assert notebook_score(3 * torch.eye(8)) == pytest.approx(8)


def test_all_of_a_noise_kernel_passes_for_signal(noise):
    """The defect that the calibrated score mends: the threshold lacks the factor √b."""
    weight = noise(64, 64, 3, 3)
    values = torch.linalg.svdvals(weight.flatten(1))
    assert notebook_score(weight) == pytest.approx(float(values.sum() / values[0]), rel=1e-5)


def test_memory_format_does_not_matter(noise):
    weight = noise(32, 16, 3, 3)
    assert notebook_score(weight.to(memory_format=torch.channels_last)) == notebook_score(weight)
