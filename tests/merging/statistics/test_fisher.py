"""Fisher diagonals against closed forms and against a loop over single examples."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fusion.data import ImageTensors
from fusion.errors import UserError
from fusion.merging.statistics import collect
from fusion.merging.statistics.fisher import EXACT_CLASSES, FisherDiagonal
from fusion.models import find_layers

IMAGES = 12


@pytest.fixture
def sample(train_digits: ImageTensors) -> tuple[Tensor, Tensor]:
    data = train_digits.select(torch.arange(IMAGES))
    return data.normalise(data.images), data.labels


def diagonal(network: nn.Module, sample: tuple[Tensor, Tensor], batch: int = 5, **options):
    images, labels = sample
    fisher = FisherDiagonal(network.eval(), find_layers(network), **options)
    for some, truth in zip(images.split(batch), labels.split(batch), strict=True):
        fisher.add(some, truth)
    return dict(fisher.finished())


def plain_loop(network: nn.Module, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Σ weight · (∇ log p(y | x))², one backward pass for each image and class, in float64."""
    network = network.double().eval()
    total = {key: torch.zeros_like(p) for key, p in network.named_parameters()}
    for image, weight in zip(images.double(), weights.double(), strict=True):
        for output, share in enumerate(weight.tolist()):
            network.zero_grad()
            network(image[None]).log_softmax(1)[0, output].backward()
            for key, parameter in network.named_parameters():
                if parameter.grad is not None:
                    total[key] += share * parameter.grad.square() / len(images)
    network.zero_grad()
    network.float()
    return total


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float64
        assert_close(found[key], tensor.double(), rtol=2e-3, atol=1e-5 * float(tensor.max()))


@pytest.mark.parametrize("labels", ["model", "true"])
def test_it_is_the_loop_over_examples_of_a_residual_network(net, labels, sample) -> None:
    network = net(10)
    images, truth = sample = tuple(tensor[:6] for tensor in sample)
    with torch.no_grad():
        shares = network(images).softmax(1)
    weights = shares if labels == "model" else nn.functional.one_hot(truth, 10)
    found = diagonal(network, sample, labels=labels)
    assert len(found) == len(list(network.parameters()))
    assert_alike(found, plain_loop(network, images, weights))


class Flat(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


@pytest.fixture
def flat() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Flat(EXACT_CLASSES + 2)


def closed_form(network: Flat, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """∂ log p(y) / ∂ W = (1[y] - p) xᵀ."""
    x = images.flatten(1).double()
    with torch.no_grad():
        shares = network(images).double().softmax(1)
    classes = shares.shape[1]
    slopes = (torch.eye(classes) - shares[:, None]).square()  # (image, y, output)
    squares = torch.einsum("ny,nyo->no", weights.double(), slopes)
    return {
        "linear.weight": squares.T @ x.square() / len(x),
        "linear.bias": squares.mean(0),
    }


def test_drawn_labels_have_the_models_expectation(flat, sample) -> None:
    images, _ = sample
    with torch.no_grad():
        shares = flat(images).softmax(1)
    draws = 150
    runs = [diagonal(flat, sample, batch=IMAGES, seed=seed) for seed in range(draws)]
    mean = {key: torch.stack([run[key] for run in runs]).mean(0) for key in runs[0]}
    expected = closed_form(flat, images, shares)
    for key, tensor in expected.items():
        deviation = torch.stack([run[key] for run in runs]).std(0) / draws**0.5
        assert bool(((mean[key] - tensor).abs() <= 5 * deviation + 1e-9).all())
        assert float((mean[key] - tensor).norm() / tensor.norm()) < 0.1


def test_true_labels_have_a_closed_form(flat, sample) -> None:
    images, labels = sample
    weights = nn.functional.one_hot(labels, EXACT_CLASSES + 2)
    found = diagonal(flat, sample, labels="true")
    for key, tensor in closed_form(flat, images, weights).items():
        assert_close(found[key], tensor, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("classes", [EXACT_CLASSES, EXACT_CLASSES + 2])
def test_batches_and_chunks_do_not_matter(net, classes, sample) -> None:
    """Neither for the exact expectation nor for labels that are drawn."""
    network = net(classes)
    whole = diagonal(network, sample, batch=IMAGES)
    parts = diagonal(network, sample, batch=5, limit=1)
    assert_alike(parts, whole)
    if classes > EXACT_CLASSES:
        other = diagonal(network, sample, batch=IMAGES, seed=1)
        assert not torch.allclose(other["linear.weight"], whole["linear.weight"])


class Branching(nn.Module):
    """Looks at its values, which vmap cannot do; has a tied and an unused parameter, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.auxiliary = nn.Linear(4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = x + 1 if self.looks(x) else x
        x = self.second(torch.relu(self.first(x.mean((2, 3)))))
        return self.auxiliary(x) if self.training else self.head(x)

    def looks(self, x: Tensor) -> bool:
        return bool(x.sum() > -1.0)


class Batched(Branching):
    """The same function without looking."""

    def looks(self, x: Tensor) -> bool:
        return True


def test_a_network_that_cannot_be_batched_is_looped_over(sample, caplog) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        looking = Branching().eval()
    batched = Batched().eval()
    batched.load_state_dict(looking.state_dict())
    images, _ = sample
    layers = find_layers(batched)
    data = [(images, torch.zeros(len(images), dtype=torch.int64))]
    with caplog.at_level(logging.INFO):
        looped = collect(looking, data, {"fisher"}, layers=layers)
    assert "example by example" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        found = collect(batched, data, {"fisher"}, layers=layers)
    assert "example by example" not in caplog.text
    assert (
        found.keys()
        == looped.keys()
        == dict(looking.named_parameters(remove_duplicate=False)).keys()
    )
    for key, of_tensor in found.items():
        assert_close(looped[key]["fisher"], of_tensor["fisher"], rtol=1e-4, atol=1e-12)
    assert torch.equal(found["first.weight"]["fisher"], found["second.weight"]["fisher"])
    assert not found["auxiliary.weight"]["fisher"].any()
    assert found["conv.weight"]["fisher"].any()


def test_what_cannot_be_is_refused(net, sample) -> None:
    images, _ = sample
    network = net(10)
    with pytest.raises(UserError, match=r"10 outputs.*labels up to 11"):
        diagonal(network, (images, torch.full((IMAGES,), 11)), labels="true")
    with pytest.raises(UserError, match="logits"):
        diagonal(nn.Sequential(nn.Conv2d(1, 2, 3)), sample)
    with pytest.raises(UserError, match=r"no 'fischer'.*fisher"):
        collect(network, [], {"fischer"}, layers=())
    with pytest.raises(UserError, match="at least one"):
        collect(network, [], {"fisher"}, layers=find_layers(network))
    infinite = net(10)
    nn.init.constant_(infinite.bn1.weight, 1e30)
    with pytest.raises(UserError, match=r"'gram' of .* not finite"):
        collect(infinite, [sample], {"gram"}, layers=find_layers(infinite))
