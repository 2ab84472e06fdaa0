from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusion.data import ImageTensors
from fusion.errors import UserError
from fusion.training import fit, recalibrate_batch_norm

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
    with pytest.raises(UserError, match="images: 1 was asked for"):
        recalibrate_batch_norm(make_model(), train_digits, images=1)
    with pytest.raises(UserError, match="batch_size: 1 was asked for"):
        recalibrate_batch_norm(make_model(), train_digits, batch_size=1)
    model = make_model()
    before = model.body.bn1.running_var.clone()
    with pytest.raises(UserError, match="one image has no variance"):
        recalibrate_batch_norm(model, train_digits.select(torch.tensor([0])))
    assert torch.equal(model.body.bn1.running_var, before)
