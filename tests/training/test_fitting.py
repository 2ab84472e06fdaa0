from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from fusion.data import ClassSubset, ImageTensors, inverted
from fusion.errors import UserError
from fusion.models import MultiTaskNetwork, find_head
from fusion.training import fit

Make = Callable[..., nn.Module]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def accuracy(model: nn.Module, dataset: ImageTensors) -> float:
    model.eval()
    with torch.no_grad():
        logits = model(dataset.normalise(dataset.images))
    return float((logits.argmax(1) == dataset.labels).float().mean())


def test_it_learns_real_digits_and_reports_what_the_model_scores(
    make_model: Make, train_digits: ImageTensors, test_digits: ImageTensors
) -> None:
    model = make_model()
    history = fit(model, train_digits, val=test_digits, epochs=5, lr=5e-3)
    last = history.epochs[-1]
    assert last.val is not None
    assert last.val.accuracy > 0.9
    assert last.val.accuracy == pytest.approx(accuracy(model, test_digits), abs=1e-6)
    assert last.train.loss < history.epochs[0].train.loss
    assert 0 < last.val.f1 <= 1
    assert history.trained_parameters == sum(p.numel() for p in model.parameters())


def test_running_statistics_of_several_tasks_are_those_of_the_mixture(
    net: Make, train_digits: ImageTensors
) -> None:
    body = net()
    head = {key: body.state_dict()[key] for key in find_head(body).tensors}
    model = MultiTaskNetwork.assemble(body, {"plain": head, "inverted": dict(head)})
    data = {"plain": train_digits, "inverted": inverted(train_digits)}
    fit(model, data, epochs=4, lr=1e-12)
    images = torch.cat([torch.stack([image for image, _ in each]) for each in data.values()])
    with torch.no_grad():
        seen = body.conv1(images)
    variance = model.for_task("plain").bn1.running_var
    assert_close(variance, seen.var((0, 2, 3)), rtol=0.1, atol=0)
    within = torch.stack([half.var((0, 2, 3)) for half in seen.chunk(2)]).mean(0)
    assert (within < 0.8 * variance).any()  # means of the two tasks lie apart


def test_f1_is_weighted_by_the_images_of_each_class(
    make_model: Make, train_digits: ImageTensors
) -> None:
    from sklearn.metrics import f1_score, log_loss

    lopsided = train_digits.select(torch.nonzero(train_digits.labels < 3).squeeze(1)[:260])
    model = make_model()
    history = fit(model, train_digits, val=lopsided, epochs=1, batch_size=150, max_batches=2)
    with torch.no_grad():
        logits = model.eval()(lopsided.normalise(lopsided.images))
    val = history.epochs[0].val
    assert val is not None
    expected = f1_score(lopsided.labels, logits.argmax(1), average="weighted")
    assert val.f1 == pytest.approx(expected, abs=1e-6)
    loss = log_loss(lopsided.labels, logits.double().softmax(1), labels=range(10))
    assert val.loss == pytest.approx(loss, rel=1e-4)


def test_the_same_call_gives_the_same_bits_whatever_the_global_generator(
    make_model: Make, train_digits: ImageTensors
) -> None:
    def train(seed: int) -> dict[str, Tensor]:
        model = make_model()
        fit(model, train_digits, epochs=2, max_batches=3, augment=True, seed=seed)
        return model.state_dict()

    first = train(0)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(train(0), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(train(1), first)


def test_sgd_goes_along_the_gradient_and_the_decay(
    make_model: Make, train_digits: ImageTensors
) -> None:
    few = train_digits.select(torch.arange(64))
    model, other = make_model(), make_model()
    for network in (model, other):
        network.get_submodule("dropout").p = 0.0
    options = {"epochs": 1, "batch_size": 64, "schedule": "constant"}
    fit(model, few, optimizer="sgd", lr=0.1, weight_decay=0.01, **options)
    other.train()
    nn.functional.cross_entropy(other(few.normalise(few.images)), few.labels).backward()
    for moved, start in zip(model.parameters(), other.parameters(), strict=True):
        wanted = start - 0.1 * (start.grad + 0.01 * start)
        assert_close(moved, wanted, rtol=1e-4, atol=1e-5)


def test_all_but_the_values_is_given_back(make_model: Make, train_digits: ImageTensors) -> None:
    from lightning.fabric import Fabric

    model = make_model().train()
    model.body.eval()
    model.body.conv1.weight.requires_grad_(False)
    model.body.linear.to(torch.float64)  # an odd type must come back too

    def state() -> list[object]:
        modes = [module.training for module in model.modules()]
        parameters = [
            (id(p), p.requires_grad, p.dtype, p.is_contiguous(), p.grad) for p in model.parameters()
        ]
        return [modes, parameters, [(b.dtype, b.device) for b in model.buffers()]]

    before, head = state(), model.head.weight.clone()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    fit(model, train_digits, fabric=fabric, epochs=1, max_batches=2, val=train_digits)
    assert state() == before
    assert not torch.equal(model.head.weight, head)


def test_memory_format_changes_the_speed_not_the_result(
    make_model: Make, train_digits: ImageTensors
) -> None:
    results = []
    for channels_last in (False, True):
        model = make_model().double()
        images = train_digits.normalise(train_digits.images[:256])
        as_pairs = TensorDataset(images, train_digits.labels[:256])
        model.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
        fit(model, as_pairs, epochs=1, batch_size=64, lr=1e-4, channels_last=channels_last)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-8)


def test_only_what_is_trainable_changes(make_model: Make, train_digits: ImageTensors) -> None:
    model = make_model(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subset = ClassSubset(train_digits, [4, 5, 6, 7])
    history = fit(
        model, subset, trainable=["head", "body.layer3.0"], epochs=2, val=subset, max_batches=2
    )
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {n for n in before if n.startswith(("head.", "body.layer3.0."))}
    numbers = sum(before[name].numel() for name, _ in model.named_parameters() if name in changed)
    assert history.trained_parameters == numbers


def test_max_batches_bounds_each_pass(make_model: Make, train_digits: ImageTensors) -> None:
    model = make_model()
    fit(model, train_digits, epochs=3, max_batches=2, batch_size=50)
    assert model.body.bn1.num_batches_tracked == 6


def test_a_fit_that_fails_leaves_the_modes_as_they_were(
    make_model: Make, train_digits: ImageTensors
) -> None:
    model = make_model().eval()
    with pytest.raises(UserError, match=r"lr: the loss is (nan|inf) after"):
        fit(model, train_digits, lr=1e30, epochs=3, max_batches=3)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_batches": 0}, "max_batches is 0"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"trainable": ["haed"]}, "did you mean 'head'"),
    ],
)
def test_impossible_options_are_refused(
    make_model: Make, train_digits: ImageTensors, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(make_model(), train_digits, **options)  # type: ignore[arg-type]


def test_a_head_that_is_too_small_is_refused(make_model: Make, train_digits: ImageTensors) -> None:
    with pytest.raises(UserError, match="it has 10 classes, the model 4 outputs"):
        fit(make_model(4), train_digits)


def test_a_model_without_anything_to_train_is_refused(
    make_model: Make, train_digits: ImageTensors
) -> None:
    with pytest.raises(UserError, match="none of its parameters requires a gradient"):
        fit(make_model().requires_grad_(False), train_digits)


@pytest.mark.slow
def test_a_compiled_network_learns_as_well(
    make_model: Make, train_digits: ImageTensors, test_digits: ImageTensors
) -> None:
    model = make_model()
    history = fit(model, train_digits, val=test_digits, epochs=5, lr=5e-3, compile=True)
    assert history.epochs[-1].val is not None
    assert history.epochs[-1].val.accuracy > 0.9
    assert all("_orig_mod" not in name for name in model.state_dict())


TWO_PROCESSES = """
import torch
from lightning.fabric import Fabric
from fusion.data import digits
from fusion.models import CifarResNet
from fusion.training import fit

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
torch.manual_seed(0)
model = CifarResNet(8, in_channels=1)
history = fit(model, digits(), fabric=fabric, val=digits("val"), epochs=1, max_batches=3)
together = torch.cat([value.flatten().double() for value in model.state_dict().values()])
everyone = fabric.all_gather(together)
if fabric.is_global_zero:
    with torch.no_grad():
        val = digits("val")
        right = model.eval()(val.normalise(val.images)).argmax(1) == val.labels
    same = torch.equal(everyone[0], everyone[1])
    print("RESULT", same, history.epochs[0].val.accuracy - float(right.float().mean()))
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    line = next((line for line in done.stdout.splitlines() if "RESULT" in line), done.stderr)
    _, same_everywhere, difference = line.split()
    assert same_everywhere == "True"
    assert abs(float(difference)) < 1e-6
