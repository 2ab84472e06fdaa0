from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusion.data import ClassSubset, ImageTensors
from fusion.data.relabelling import in_label_space
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.models import MultiTaskNetwork, find_layers
from fusion.training import FineTuning

Make = Callable[..., nn.Module]


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """Return the names of the tensors that differ, counters and running statistics included."""
    old, new = before.state_dict(), after.state_dict()
    return {name for name in old if not torch.equal(old[name], new[name])}


def tuned(strategy: str, **options: object) -> FineTuning:
    return FineTuning(strategy=strategy, epochs=1, batch_size=64, images=128, lr=0.01, **options)  # type: ignore[arg-type]


def test_the_head_alone_is_trained_on_a_copy(make_model: Make, train_digits: ImageTensors) -> None:
    model = make_model()
    result = tuned("head").run(model, train_digits)
    assert changed(model, result.model) == {"head.weight", "head.bias"}
    assert changed(model, make_model()) == set()
    assert result.trained_layers == ("head",)
    assert result.trained_parameters == sum(p.numel() for p in model.head.parameters())
    assert result.images == 128
    assert result.cost.seconds > 0


def test_selective_trains_merged_layers_with_their_norms_and_the_head(
    make_model: Make, train_digits: ImageTensors
) -> None:
    model = make_model()
    layers = {layer.name: layer for layer in find_layers(model)}
    merged = ["body.conv1", "body.layer2.0.conv1"]
    result = tuned("selective").run(model, train_digits, merged=merged)
    expected = {key for name in (*merged, "head") for key in layers[name].tensors}
    assert changed(model, result.model) == expected
    assert any("num_batches_tracked" in key for key in expected)


def test_full_trains_every_tensor(make_model: Make, train_digits: ImageTensors) -> None:
    model = make_model()
    result = tuned("full").run(model, train_digits)
    assert changed(model, result.model) == set(model.state_dict())
    assert result.trained_parameters == result.parameters


def test_strategies_that_train_the_same_are_recognised(
    make_model: Make, train_digits: ImageTensors
) -> None:
    model = make_model()
    everything = [layer.name for layer in find_layers(model)][:-1]  # all but the head
    assert tuned("full").run(model, train_digits, merged=everything).same_as == ("selective",)
    assert tuned("selective").run(model, train_digits, merged=everything).same_as == ("full",)
    assert tuned("selective").run(model, train_digits).same_as == ("head",)
    assert tuned("selective").run(model, train_digits, merged=["body.conv1"]).same_as == ()


def test_a_norm_merged_by_itself_is_trained_by_itself(
    make_model: Make, train_digits: ImageTensors
) -> None:
    model = make_model()
    result = tuned("selective").run(model, train_digits, merged=["body.bn1"])
    kinds = {name.rpartition(".")[0] for name in changed(model, result.model)}
    assert kinds == {"body.bn1", "head"}


def test_labels_follow_the_outputs(make_model: Make, train_digits: ImageTensors) -> None:
    """Outputs in another order are trained by the images of the class that they stand for."""
    order = (3, 1, 2, 0)
    result = FineTuning(strategy="full", epochs=12, batch_size=32, lr=0.01).run(
        make_model(4), in_label_space([train_digits], LabelSpace.of(list(order)))
    )
    images = ClassSubset(train_digits, order)
    with torch.inference_mode():
        outputs = result.model.eval()(images.normalise(images.images)).argmax(1)
    assert float((outputs == images.labels).float().mean()) > 0.8
    assert result.images == len(images)


def test_it_is_the_same_every_time(make_model: Make, train_digits: ImageTensors) -> None:
    runs = [tuned("full").run(make_model(), train_digits).model for _ in range(2)]
    assert changed(*runs) == set()
    other = tuned("full", seed=1).run(make_model(), train_digits).model
    assert changed(runs[0], other)


def test_a_fast_run_is_one_batch(make_model: Make, train_digits: ImageTensors) -> None:
    model = make_model()
    result = FineTuning(strategy="full", fast_dev_run=True).run(model, train_digits)
    assert len(result.history.epochs) == 1
    assert int(result.model.body.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "heads"}, "did you mean 'head'"),
        ({"epochs": 0}, "FineTuning.epochs is 0"),
        ({"images": 0}, "FineTuning.images is 0"),
        ({"lr": 0.0}, "FineTuning.lr is 0.0"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_mistakes_are_told_at_once(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FineTuning(**options)  # type: ignore[arg-type]


def test_an_unknown_merged_layer_is_told(make_model: Make, train_digits: ImageTensors) -> None:
    with pytest.raises(UserError, match=r"no layer 'body.conv2'; did you mean 'body.conv1'"):
        tuned("selective").run(make_model(), train_digits, merged=["body.conv2"])


def test_several_tasks_are_trained_together(make_model: Make, train_digits: ImageTensors) -> None:
    """Equal labels of two data sets are never mixed up, and the body is trained by both."""
    base = make_model(3)
    own = {
        name: {f"head.{k}": v for k, v in make_model(3).head.state_dict().items()} for name in "ab"
    }
    model = MultiTaskNetwork.assemble(base, own)
    classes = {"a": [0, 1, 2], "b": [7, 8, 9]}
    data = {name: ClassSubset(train_digits, labels) for name, labels in classes.items()}
    tuning = FineTuning(strategy="full", epochs=8, batch_size=64, lr=0.01)
    result = tuning.run(model, data)
    assert result.images == sum(map(len, data.values()))
    tuned_model = result.model.eval()
    assert tuned_model.for_task("a").body is tuned_model.for_task("b").body
    for name, images in data.items():
        with torch.inference_mode():
            answers = tuned_model(images.normalise(images.images), task=name).argmax(1)
        assert float((answers == images.labels).float().mean()) > 0.9
    head = tuned("head").run(model, data)
    assert {key.partition(".head")[0] for key in changed(model, head.model)} == {
        "networks.0",
        "networks.1",
    }
    assert all(".head." in key for key in changed(model, head.model))


def test_classes_without_images_are_told(train_digits: ImageTensors) -> None:
    few = ClassSubset(train_digits, [0, 1, 2])
    with pytest.raises(UserError, match="no data set has images of 7"):
        in_label_space([few], LabelSpace.of([0, 1, 2, 7]))


def test_images_of_several_sets_meet_at_their_classes(train_digits: ImageTensors) -> None:
    low, high = (ClassSubset(train_digits, part) for part in ([0, 1, 2], [9, 8, 1]))
    both = in_label_space([low, high], LabelSpace.of([9, 2, 1, 0]))
    assert both.original_labels == (9, 2, 1, 0)
    counts = torch.bincount(both.labels).tolist()
    of = torch.bincount(train_digits.labels)
    assert counts == [int(of[9]), int(of[2]), 2 * int(of[1]), int(of[0])]  # no images of an 8
