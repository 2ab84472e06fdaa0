from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.merging.batch_norm import chosen_treatment, mixture_statistics, statistics_keys
from fusion.modelpool import BaseModelPool


def test_the_mixtures_variance_is_that_of_the_pooled_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        centre + spread * torch.randn(count, 3, generator=generator, dtype=torch.float64)
        for centre, spread, count in ((0.0, 1.0, 200), (5.0, 0.1, 300), (-1000.0, 2.0, 500))
    ]
    mean, variance = mixture_statistics(
        [s.mean(0) for s in samples],
        [s.var(0, unbiased=False) for s in samples],
        [len(s) for s in samples],
    )
    pooled = torch.cat(samples)
    torch.testing.assert_close(mean, pooled.mean(0))
    torch.testing.assert_close(variance, pooled.var(0, unbiased=False))


def test_the_mixture_of_equal_parts_is_that_part_bit_for_bit() -> None:
    mean, variance = torch.tensor([1e6, -0.1]), torch.tensor([1e-9, 0.3])
    found = mixture_statistics([mean] * 3, [variance] * 3, [0.2, 0.3, 0.5])
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], variance)


def test_only_norms_that_keep_statistics_are_treated() -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)
    )
    assert statistics_keys(net) == [("0.running_mean", "0.running_var")]
    assert statistics_keys(net, ["1", "2"]) == []


def test_a_network_without_statistics_has_nothing_to_treat(base) -> None:
    plain = nn.Conv2d(1, 1, 3)
    for treatment in ("auto", "merge", "recalibrate"):
        assert (
            chosen_treatment(treatment, BaseModelPool([plain]), plain, without_images="merge")
            == "pretrained"
        )
    with pytest.raises(UserError, match="batch_norm=recalibrate needs training images"):
        chosen_treatment("recalibrate", BaseModelPool([base]), base, without_images="merge")
