from __future__ import annotations

import pytest
import torch

from fusion.data import digits
from fusion.errors import UserError


def test_splits_have_the_documented_sizes_and_share_no_place() -> None:
    sizes = {split: len(digits(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1087, "val": 179, "test": 531}


def test_every_split_is_stratified() -> None:
    for split in ("train", "val", "test"):
        counts = torch.bincount(digits(split).labels, minlength=10).float()
        assert counts.max() / counts.min() < 1.07


def test_the_splits_together_are_all_images() -> None:
    from sklearn.datasets import load_digits

    together = torch.cat([digits(split).images for split in ("train", "val", "test")])
    darkness = torch.from_numpy(load_digits().images).sum((1, 2)) * 255 / 16
    ours = together.sum((1, 2, 3)).sort().values
    assert (ours - darkness.sort().values).abs().max() < 32  # half a step of rounding a pixel


@pytest.mark.parametrize(
    ("options", "message"),
    [({"split": "tset"}, "did you mean 'test'"), ({"channels": 2}, "channels is 2")],
)
def test_misspelt_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        digits(**options)  # type: ignore[arg-type]
