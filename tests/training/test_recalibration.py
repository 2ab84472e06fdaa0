from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusion.data import ImageTensors
from fusion.errors import UserError
from fusion.training import fit, recalibrate_batch_norm
from fusion.training.sampling import sample_images

Make = Callable[..., nn.Module]


def accuracy(model: nn.Module, dataset: ImageTensors) -> float:
    with torch.no_grad():
        logits = model.eval()(dataset.normalise(dataset.images))
    return float((logits.argmax(1) == dataset.labels).float().mean())


def test_one_batch_gives_the_statistics_of_the_sample(train_digits: ImageTensors) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1))
    used = recalibrate_batch_norm(model, train_digits, batch_size=2000)
    assert used == len(train_digits)
    pixels = train_digits.normalise(train_digits.images)
    torch.testing.assert_close(model[0].running_mean, pixels.mean().view(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(model[0].running_var, pixels.var().view(1))


def test_batches_count_by_their_images(train_digits: ImageTensors) -> None:
    # 1087 images in batches of 500 end in one of 87: with equal weights the mean is off.
    model = nn.Sequential(nn.BatchNorm2d(1))
    recalibrate_batch_norm(model, train_digits, batch_size=500, seed=4)
    mean = train_digits.normalise(train_digits.images).mean().view(1)
    torch.testing.assert_close(model[0].running_mean, mean, rtol=0, atol=1e-6)


def test_it_repairs_ruined_statistics_on_data_sorted_by_class(
    make_model: Make, train_digits: ImageTensors, test_digits: ImageTensors
) -> None:
    model = make_model()
    fit(model, train_digits, epochs=5, lr=5e-3)
    good = accuracy(model, test_digits)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(1)
            module.running_var.fill_(9)
    ruined = accuracy(model, test_digits)
    by_class = train_digits.select(train_digits.labels.argsort(stable=True))
    recalibrate_batch_norm(model, by_class, images=300)
    assert accuracy(model, test_digits) > good - 0.05 > ruined + 0.2


def test_modes_momenta_weights_and_the_global_generator_are_left_alone(
    make_model: Make, train_digits: ImageTensors
) -> None:
    model = make_model().train()
    model.body.bn1.eval()
    model.body.bn1.momentum = 0.3
    model.body.layer1[0].bn1.momentum = None
    modes = [module.training for module in model.modules()]
    parameters = [parameter.clone() for parameter in model.parameters()]
    generator = torch.get_rng_state()
    recalibrate_batch_norm(model, train_digits, images=100)
    assert [module.training for module in model.modules()] == modes
    assert (model.body.bn1.momentum, model.body.layer1[0].bn1.momentum) == (0.3, None)
    assert model.body.layer2[0].bn1.momentum == 0.1
    assert all(a.equal(b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_sample_depends_on_the_seed(make_model: Make, train_digits: ImageTensors) -> None:
    means = []
    for seed in (0, 0, 1):
        model = make_model()
        recalibrate_batch_norm(model, train_digits, images=64, seed=seed)
        means.append(model.body.bn1.running_mean)
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_a_single_last_image_is_left_out(train_digits: ImageTensors) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))  # refuses a batch of one image
    assert recalibrate_batch_norm(model, train_digits, images=33, batch_size=16) == 32


def test_a_network_without_batch_norm_is_left_alone(
    train_digits: ImageTensors, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout())
    with caplog.at_level(logging.INFO):
        assert recalibrate_batch_norm(model, train_digits) == 0
    assert "No batch norm" in caplog.text


def test_too_few_images_are_refused(make_model: Make, train_digits: ImageTensors) -> None:
    with pytest.raises(UserError, match="images: 1 was given"):
        recalibrate_batch_norm(make_model(), train_digits, images=1)
    with pytest.raises(UserError, match="batch_size: 1 was given"):
        recalibrate_batch_norm(make_model(), train_digits, batch_size=1)
    model = make_model()
    before = model.body.bn1.running_var.clone()
    with pytest.raises(UserError, match="one image has no variance"):
        recalibrate_batch_norm(model, train_digits.select(torch.tensor([0])))
    assert torch.equal(model.body.bn1.running_var, before)


def test_a_norm_that_runs_twice_averages_both_of_its_calls(train_digits: ImageTensors) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(3 * x + 7)

    model = Twice()
    images = train_digits.normalise(train_digits.images)
    recalibrate_batch_norm(model, train_digits, images=len(train_digits), batch_size=2000)
    mean, variance = images.mean(), images.var()
    torch.testing.assert_close(model.norm.running_mean[0], (mean + 3 * mean + 7) / 2)
    torch.testing.assert_close(model.norm.running_var[0], (variance + 9 * variance) / 2)
    assert model.norm.momentum == 0.1


def test_only_named_norms_are_recalibrated(make_model: Make, train_digits: ImageTensors) -> None:
    model, before = make_model(), make_model()
    recalibrate_batch_norm(model, train_digits, images=100, norms=["body.bn1"])
    assert not torch.equal(model.body.bn1.running_mean, before.body.bn1.running_mean)
    other = model.body.layer1[0].bn1.running_mean
    assert torch.equal(other, before.body.layer1[0].bn1.running_mean)


def test_an_instance_norm_with_statistics_is_recalibrated(train_digits: ImageTensors) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten())
    used = recalibrate_batch_norm(model, train_digits, images=200)
    assert used == 200
    images = train_digits.normalise(train_digits.images)
    of_images = images.flatten(1).var(1).mean()
    torch.testing.assert_close(model[0].running_var[0], of_images, rtol=0.1, atol=0)


def test_several_data_sets_are_drawn_from_equally(train_digits: ImageTensors) -> None:
    """Whatever their sizes; and in every batch, so that its statistics are those of the mixture."""
    ones = ImageTensors(
        torch.ones(1000, 1, 8, 8), torch.zeros(1000), class_names=["1"], mean=[0], std=[1]
    )
    zeros = ImageTensors(
        torch.zeros(60, 1, 8, 8), torch.zeros(60), class_names=["0"], mean=[0], std=[1]
    )
    sample = list(sample_images({"a": ones, "b": zeros}, images=100, batch_size=20, seed=0))
    assert [len(batch) for batch in sample] == [20] * 5
    assert all(float(batch.mean()) == 0.5 for batch in sample)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    recalibrate_batch_norm(model, {"a": ones, "b": zeros}, images=100, batch_size=50)
    torch.testing.assert_close(model[0].running_mean, torch.tensor([0.5]))


def test_images_of_different_sizes_are_measured_together() -> None:
    """Each batch has one size, so the variance between the data sets is added."""
    small = ImageTensors(
        torch.zeros(80, 1, 4, 4), torch.zeros(80), class_names=["0"], mean=[0], std=[1]
    )
    large = ImageTensors(
        torch.ones(80, 1, 8, 8), torch.zeros(80), class_names=["1"], mean=[0], std=[1]
    )
    model = nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    recalibrate_batch_norm(model, {"a": small, "b": large}, images=100, batch_size=20)
    torch.testing.assert_close(model[0].running_mean, torch.tensor([0.5]))
    torch.testing.assert_close(model[0].running_var, torch.tensor([0.25]))


def test_the_seed_of_a_part_is_made_from_its_name(train_digits: ImageTensors) -> None:
    halves = {"a": train_digits, "b": train_digits}
    turned = dict(reversed(halves.items()))
    first, second = (
        next(sample_images(data, images=20, batch_size=20, seed=3)) for data in (halves, turned)
    )
    assert torch.equal(first[:10], second[10:])
