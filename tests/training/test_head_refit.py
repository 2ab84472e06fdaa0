"""A head fitted anew: as good as logistic regression on the features, and in the right rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fusion.data import ClassSubset, ImageTensors, batches, labels_of
from fusion.errors import UserError
from fusion.training.head_refit import head_features, refit_heads

HEAD = ("linear.weight", "linear.bias")


def accuracy(model: nn.Module, data: ClassSubset | ImageTensors) -> float:
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in batches(data, batch_size=500)]
    return float(torch.cat(hits).mean())


def test_the_head_is_the_regression_of_scikit_learn(base, train_digits: ImageTensors) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    model = copy.deepcopy(base)
    features = head_features(model, "linear", train_digits).numpy()
    assert features.shape == (len(train_digits), 32)
    scaled = StandardScaler().fit_transform(features)
    labels = np.asarray(labels_of(train_digits))
    wanted = LogisticRegression(max_iter=300).fit(scaled, labels).score(scaled, labels)
    before = accuracy(model, train_digits)
    refit_heads({"": model}, {"": train_digits}, HEAD)
    assert accuracy(model, train_digits) == pytest.approx(wanted, abs=1e-3)
    assert wanted > before + 0.2  # the head of a random network knows nothing
    same = [key for key, t in model.state_dict().items() if torch.equal(t, base.state_dict()[key])]
    assert set(model.state_dict()) - set(same) == set(HEAD)


def test_heads_fitted_jointly_can_be_compared(base, train_digits: ImageTensors) -> None:
    data = {"a": ClassSubset(train_digits, (0, 1, 2, 3)), "b": ClassSubset(train_digits, (7, 4))}

    def of_one_body() -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {name: copy.deepcopy(base) for name in data}
        for name, classes in (("a", 4), ("b", 2)):
            networks[name].linear = nn.Linear(32, classes)
        return networks

    apart, jointly = of_one_body(), of_one_body()
    refit_heads(apart, data, HEAD)
    refit_heads(jointly, data, HEAD, jointly=True)

    def joint_accuracy(networks: dict[str, nn.Module]) -> float:
        hits = []
        for start, task in ((0, "a"), (4, "b")):
            for x, y in batches(data[task], batch_size=500):
                with torch.no_grad():
                    scores = torch.cat([networks["a"](x), networks["b"](x)], 1)
                hits.append((scores.argmax(1) == y + start).float())
        return float(torch.cat(hits).mean())

    assert joint_accuracy(jointly) > joint_accuracy(apart)
    assert accuracy(jointly["b"], data["b"]) > 0.9


def test_two_classes_and_a_class_without_images(net, train_digits: ImageTensors) -> None:
    model = net(3)
    pair = ClassSubset(train_digits, (0, 1))  # the third output has no image
    refit_heads({"": model}, {"": pair}, HEAD)
    assert accuracy(model, pair) > 0.95
    with torch.no_grad():
        predictions = [model(x).argmax(1) for x, _ in batches(pair, batch_size=500)]
    assert not (torch.cat(predictions) == 2).any()


def test_a_head_that_is_no_linear_layer_is_refused(base, train_digits: ImageTensors) -> None:
    with pytest.raises(UserError, match="one linear layer"):
        refit_heads({"": base}, {"": train_digits}, ("conv1.weight",))
