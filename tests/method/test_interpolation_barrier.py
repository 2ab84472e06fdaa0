"""The line between two networks: its ends, a shuffled copy, and the barrier's arithmetic."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch

from fusion.alignment import apply_permutation, permutation_spec, random_permutation
from fusion.errors import UserError
from fusion.method import InterpolationBarrier
from fusion.method.interpolation_barrier import barriers
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet


@pytest.fixture
def pair(base, train_digits, test_digits):
    """A network and a copy whose units stand in another order."""
    spec = permutation_spec(base, torch.zeros(1, 1, 8, 8))
    copy = apply_permutation(base, spec, random_permutation(spec, seed=1))
    return BaseModelPool(
        {"first": base, "second": copy},
        train_datasets={"_pretrained_": train_digits},
        test_datasets={"_pretrained_": test_digits},
    )


def test_a_shuffled_copy_has_no_barrier_once_it_is_aligned(pair, base, equal, tmp_path):
    walk = InterpolationBarrier(points=3, calibration_images=200)
    walk.output_path = tmp_path
    assert equal(walk.run(pair), base)
    table = walk.table
    assert len(table) == 3 * 3 * 3
    ends = table[table["t"].isin([0, 1])]
    assert ends["accuracy"].nunique() == 1
    aligned = table.query("alignment == 'weights' and batch_norm == 'interpolate'")
    assert aligned["loss"].max() - aligned["loss"].min() < 1e-4
    treated = table.query("alignment == 'activations' and batch_norm == 'repair'")
    assert treated["loss"].max() - treated["loss"].min() < 0.02  # of 200 images' own statistics
    naive = table.query("alignment == 'none' and batch_norm == 'interpolate'")
    assert naive["loss"].max() - naive["loss"].min() > 1e-2
    written = pd.read_csv(tmp_path / "barrier.csv")
    pd.testing.assert_frame_equal(written, table)
    assert (tmp_path / "barrier.pdf").is_file()


def test_the_barrier_is_the_fall_below_the_straight_line():
    line = pd.DataFrame(
        {
            "alignment": "none",
            "batch_norm": "merge",
            "t": [1.0, 0.0, 0.5, 0.25, 0.75],
            "accuracy": [1.0, 0.8, 0.5, 0.6, 0.95],
            "loss": [0.2, 0.6, 1.4, 0.5, 0.3],
        }
    )
    (row,) = barriers(line).to_dict(orient="records")
    assert row["midpoint"] == 0.5
    assert row["barrier"] == pytest.approx(0.4)
    assert row["loss_barrier"] == pytest.approx(1.0)


def test_a_line_between_networks_of_two_shapes_is_refused(pair, base, train_digits):
    other = copy.deepcopy(base)
    other.linear = torch.nn.Linear(other.linear.in_features, 7)
    networks = {"first": base, "second": other}
    datasets = {"_pretrained_": train_digits}
    pool = BaseModelPool(networks, train_datasets=datasets, test_datasets=datasets)
    with pytest.raises(UserError, match="'first' and 'second' have different classes"):
        InterpolationBarrier().run(pool)


def test_what_is_missing_is_told(pair, base):
    with pytest.raises(UserError, match="the pool has 1"):
        InterpolationBarrier().run({"first": base})
    with pytest.raises(UserError, match="add train_datasets"):
        InterpolationBarrier().run({"first": base, "second": base})
    with pytest.raises(UserError, match="did you mean 'weights'"):
        InterpolationBarrier(alignments=["weight"])
    for points, cure in ((2, "a whole number from 3"), (4, "an odd number")):
        with pytest.raises(UserError, match=f"points is {points}.*{cure}"):
            InterpolationBarrier(points=points)
    for option, given in (("alignments", []), ("batch_norm", "repair")):
        with pytest.raises(UserError, match=f"{option} is .*give a non-empty list of"):
            InterpolationBarrier(**{option: given})
    with pytest.raises(UserError, match="calibration_images is 1"):
        InterpolationBarrier(calibration_images=1)


def test_classes_in_another_order_are_measured_by_their_labels(base, train_digits, test_digits):
    """The outputs of both networks stand for the digits backwards."""
    turned = copy.deepcopy(base)
    with torch.no_grad():
        turned.linear.weight.copy_(base.linear.weight.flip(0))
        turned.linear.bias.copy_(base.linear.bias.flip(0))
    data = {"train_datasets": train_digits, "test_datasets": test_digits}
    options = {name: {"_pretrained_": dataset} for name, dataset in data.items()}

    def accuracies(network, classes):
        models = {"first": network, "second": copy.deepcopy(network)}
        pool = BaseModelPool(models, classes=dict.fromkeys(models, classes), **options)
        walk = InterpolationBarrier(alignments=["none"], batch_norm=["merge"], points=3)
        walk.run(pool)
        return walk.table["accuracy"].tolist()

    digits = list("0123456789")
    assert accuracies(base, digits) == accuracies(turned, digits[::-1])


def test_ends_are_measured_once_and_points_take_one_pass(pair, train_digits, test_digits):
    images = []

    def note(module, args):
        if isinstance(module, CifarResNet) and type(args[0]) is torch.Tensor:
            images.append(len(args[0]))

    walk = InterpolationBarrier(
        alignments=["none"], batch_norm=["repair"], points=5, calibration_images=200, plot=False
    )
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        walk.run(pair)
    finally:
        handle.remove()
    # A repaired network first runs on one image, for the order of its layers, as the first network
    # did when the pool was checked.
    assert sum(images) == 1 + 2 * 200 + 3 * (200 + 1) + (2 + 3) * len(test_digits)
