"""Layers merged from the input to the output, on what the merged layers before return."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models

import fusion
from fusion.data import ClassSubset, ImageTensors, batches, seed_from
from fusion.errors import UserError
from fusion.merging.batch_norm import Calibration
from fusion.merging.members import Members, every_layer
from fusion.merging.rules import LeastSquares, RegMean
from fusion.merging.sequential import merge_in_stages, moments_of_all
from fusion.merging.statistics import Moments
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.training import recalibrate_batch_norm
from fusion.weights import load_tensors

CLASSES = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9)}
SAMPLE = Calibration(images=120, batch_size=40)
OPTIONS = {"plot": False, "statistics_images": 120, "calibration_images": 120, "batch_size": 40}


@pytest.fixture(scope="module")
def data(train_digits: ImageTensors) -> dict[str, ClassSubset]:
    few = train_digits.select(torch.arange(400))
    return {name: ClassSubset(few, classes) for name, classes in CLASSES.items()}


@pytest.fixture
def modelpool(pool, data) -> BaseModelPool:
    return BaseModelPool(pool, train_datasets=data)


def images_of(modelpool: BaseModelPool, name: str) -> Tensor:
    drawn = batches(
        modelpool.dataset(name),
        batch_size=SAMPLE.batch_size,
        shuffle=True,
        seed=seed_from(SAMPLE.seed, "statistics"),
        limit=SAMPLE.images,
    )
    return torch.cat([images for images, _ in drawn])


def merged_state(
    modelpool: BaseModelPool, rule: LeastSquares | RegMean, treatment: str = "recalibrate"
) -> dict[str, Tensor]:
    members = Members.read(modelpool)
    return merge_in_stages(
        members.folded() if rule.folded else members,
        every_layer(members),
        rule,
        modelpool,
        with_head=False,
        treatment=treatment,
        calibration=SAMPLE,
    )


def features(network: nn.Module, module: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a module receives and returns."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = network.get_submodule(module).register_forward_hook(
        lambda _, args, output: seen.append((args[0], output.clone()))
    )
    with torch.no_grad():
        network.eval()(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("folded", [False, True])
def test_a_layer_is_the_ridge_regression_behind_the_merged_prefix(folded, modelpool) -> None:
    """Restated: unfolded patches of the merged network, outputs of the experts, one solve."""
    rule = LeastSquares(folded=folded, ridge=1e-2)
    state = merged_state(modelpool, rule, "pretrained")
    members = Members.read(modelpool)
    merged = copy.deepcopy(members.network)
    load_tensors(merged, state)
    layer = "layer2.0.conv1"
    norm = Members.read(modelpool).folded().foldings[layer].norm
    gram: Tensor | float = 0
    cross: Tensor | float = 0
    priors = []
    for name in members.names:
        expert = modelpool.load_model(name).eval()
        images = images_of(modelpool, name)
        values, _ = features(merged, layer, images)
        _, output = features(expert, norm if folded else layer, images)
        conv = expert.get_submodule(layer)
        patches = nn.functional.unfold(
            values.double(), conv.kernel_size, stride=conv.stride, padding=conv.padding
        )
        rows = patches.transpose(1, 2).flatten(0, 1)
        wanted = output.double().flatten(2).transpose(1, 2).flatten(0, 1)
        weight = conv.weight.detach().double().flatten(1)
        if folded:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            bn = expert.get_submodule(norm)
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            shift = bn.bias.double() - scale * bn.running_mean.double()
            weight = torch.cat([weight * scale[:, None], shift[:, None]], 1)
        priors.append(weight.detach())
        gram = gram + rows.T @ rows / len(rows) / 2
        cross = cross + wanted.T @ rows / len(rows) / 2
    assert isinstance(gram, Tensor)
    prior = sum(priors) / 2
    ridge = rule.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, cross - prior @ gram, left=False) + prior
    found = state[f"{layer}.weight"].double().flatten(1)
    assert_close(found, solution[:, : found.shape[1]], rtol=1e-3, atol=1e-4)
    mean_square = (found - prior[:, : found.shape[1]]).square().mean()
    assert mean_square > 1e-5  # the data moved it away from the prior


def test_one_expert_is_recovered_from_the_base(pool, data) -> None:
    """With enough images and nothing else to answer as, the layers compute what the expert's do."""
    one = {name: pool[name] for name in ("_pretrained_", "a")}
    modelpool = BaseModelPool(one, train_datasets={"a": data["a"]})
    expert = modelpool.load_model("a").eval()
    images = images_of(modelpool, "a")
    with torch.no_grad():
        wanted = expert(images)
    errors = {}
    for prior in ("base", "average"):
        network = fusion.merge(
            modelpool,
            "layerwise_least_squares",
            prior=prior,
            ridge=1e-8,
            batch_norm="pretrained",
            head="tasks",
            **OPTIONS,
        )
        with torch.no_grad():
            errors[prior] = float((network.for_task("a")(images) - wanted).abs().max())
    base = fusion.merge(modelpool, "task_arithmetic", scale=0.0, head="tasks", plot=False)
    with torch.no_grad():
        far = float((base.for_task("a")(images) - wanted).abs().max())
    assert errors["average"] < 1e-3 * far
    assert errors["base"] < 0.02 * far


@pytest.mark.parametrize("rule", [LeastSquares(), LeastSquares(folded=False)])
def test_copies_of_an_expert_give_the_expert(rule, pool, data) -> None:
    twins = {"_pretrained_": pool["_pretrained_"], "a": pool["a"], "b": copy.deepcopy(pool["a"])}
    modelpool = BaseModelPool(
        twins, train_datasets=data, classes={"a": [*range(4)], "b": [*range(4)]}
    )
    merged = modelpool.load_model("a")
    load_tensors(merged, merged_state(modelpool, rule, "pretrained"))
    if not rule.folded:  # its norms have the base's statistics
        state = modelpool.load_model("a").state_dict()
        merged.load_state_dict({k: t for k, t in state.items() if "running" in k}, strict=False)
        assert_close(merged.conv1.weight, pool["a"].conv1.weight)
        return
    images = images_of(modelpool, "a")
    expert = modelpool.load_model("a").eval()
    for name in ("bn1", "layer2.0.bn2"):
        ours, theirs = (features(n, name, images)[1] for n in (merged, expert))
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_each_task_passes_through_its_own_statistics(modelpool) -> None:
    network = fusion.merge(
        modelpool, "layerwise_least_squares", batch_norm="recalibrate_per_task", **OPTIONS
    )
    assert isinstance(network, MultiTaskNetwork)
    mixed = merged_state(modelpool, LeastSquares())
    apart = merged_state(modelpool, LeastSquares(), "recalibrate_per_task")
    first = next(iter(mixed))
    last = [key for key in mixed if key.endswith("conv2.weight")][-1]
    assert_close(apart[first], mixed[first])  # nothing before it depends on the statistics
    assert not torch.allclose(apart[last], mixed[last], rtol=1e-2)


def test_regmean_behind_the_merged_layers_differs_where_the_prefix_does(modelpool) -> None:
    plain = fusion.merge(modelpool, "regmean", batch_norm="pretrained", **OPTIONS)
    behind = fusion.merge(modelpool, "regmean", sequential=True, batch_norm="pretrained", **OPTIONS)
    one, other = plain.for_task("a").state_dict(), behind.for_task("a").state_dict()
    first, *rest = [key for key in one if key.endswith(("conv1.weight", "conv2.weight"))]
    assert_close(one[first], other[first], rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(one[key], other[key], rtol=1e-3) for key in rest)


def test_regmean_on_images_that_all_experts_share_is_refused(pool, data) -> None:
    shared = BaseModelPool(pool, train_datasets={"_pretrained_": data["a"]})
    with pytest.raises(UserError, match="all experts have the same training images"):
        fusion.merge(shared, "regmean", sequential=True, **OPTIONS)
    fusion.merge(shared, "layerwise_least_squares", **OPTIONS)


def test_a_prior_that_measures_data_is_refused() -> None:
    with pytest.raises(UserError, match="RegMean measures the experts' data"):
        LeastSquares(prior=RegMean())
    with pytest.raises(UserError, match="prior"):
        LeastSquares(prior="averge")


def depthwise() -> nn.Module:
    return models.mobilenet_v3_small(num_classes=4)


def layer_norms() -> nn.Module:
    setting = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(setting, num_classes=4, stochastic_depth_prob=0.0)


def norms_before_layers() -> nn.Module:
    return models.DenseNet(8, (2, 2), 8, num_classes=4)


@pytest.mark.parametrize(
    "build",
    [pytest.param(depthwise, marks=pytest.mark.slow), layer_norms, norms_before_layers],
)
def test_it_comes_nearer_to_the_experts_than_the_average(build: Callable[[], nn.Module]) -> None:
    """Networks with depthwise kernels, layer norms, and norms that stand before their layer."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = build()
    experts = {name: copy.deepcopy(base) for name in ("a", "b")}
    for expert in experts.values():
        for key, tensor in expert.state_dict().items():
            if tensor.is_floating_point() and "running" not in key:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.5 * tensor.std(correction=0) * noise)
    data = {
        name: ImageTensors(
            torch.rand(64, 3, 32, 32, generator=generator) ** (1 + number),
            torch.arange(64) % 4,
            class_names=[f"{name}{c}" for c in range(4)],
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        for number, name in enumerate(experts)
    }
    for name, network in [*experts.items(), ("a", base)]:
        recalibrate_batch_norm(network, data[name], images=64, batch_size=64)
    modelpool = BaseModelPool(
        {"_pretrained_": base, **experts},
        train_datasets=data,
        classes={name: list(data[name].class_names) for name in experts},
    )
    options = {"statistics_images": 64, "calibration_images": 128, "plot": False}
    errors = {}
    for method in ("simple_average", "layerwise_least_squares"):
        network = fusion.merge(modelpool, method, **options)
        total = 0.0
        for name, expert in experts.items():
            images = torch.stack([data[name][i][0] for i in range(64)])
            with torch.no_grad():
                answers = network.for_task(name).eval()(images), expert.eval()(images)
            total += float((answers[0] - answers[1]).square().mean() / answers[1].var())
        errors[method] = total
    assert errors["layerwise_least_squares"] < 0.85 * errors["simple_average"], errors


TWO_PROCESSES = """
import sys
import torch
from lightning.fabric import Fabric
from fusion.data import ClassSubset, digits
from fusion.method.presets import algorithm
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet
from fusion.weights import tensors_of


def main(fabric, file):
    torch.manual_seed(0)
    experts = {n: CifarResNet(8, 5, in_channels=1, width=0.5).eval() for n in ("low", "high")}
    data = digits("train")
    parts = {"low": ClassSubset(data, range(5)), "high": ClassSubset(data, range(5, 10))}
    method = algorithm("layerwise_least_squares", statistics_images=90, batch_size=32)
    if fabric is not None:
        method.fabric = fabric
    network = method.run(BaseModelPool(experts, train_datasets=parts))
    rank = 0 if fabric is None else fabric.global_rank
    torch.save(dict(tensors_of(network.for_task("low"))), f"{file}-{rank}.pt")


if __name__ == "__main__":
    # Forked, not spawned: the packages are imported once.
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(main, f"{sys.argv[1]}/two")
    main(None, f"{sys.argv[1]}/one")
"""


def test_two_processes_add_their_moments_up(tmp_path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=300)
    alone, first, second = (torch.load(tmp_path / f"{n}.pt") for n in ("one-0", "two-0", "two-1"))
    for key, tensor in alone.items():
        assert torch.equal(first[key], second[key])
        if tensor.is_floating_point():
            assert_close(first[key], tensor, rtol=1e-3, atol=1e-4)


def test_moments_of_a_share_are_weighted_by_its_positions() -> None:
    class Summing:
        """Adds what a second process has."""

        device = torch.device("cpu")

        def __init__(self, other: Moments) -> None:
            parts = (other.xx, other.yx, other.yy)
            self.other = [torch.tensor(other.positions), *(p * other.positions for p in parts)]

        def all_reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "sum"
            return tensor + self.other.pop(0)

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 12, 3, generator=generator, dtype=torch.float64)

    def of(part: Tensor) -> Moments:
        square = part.mT @ part / part.shape[1]
        return Moments(square, square[:, :2], square.diagonal(dim1=1, dim2=2), part.shape[1])

    both = moments_of_all(of(rows[:, :4]), Summing(of(rows[:, 4:])))
    whole = of(rows)
    assert both.positions == 12
    for name in ("xx", "yx", "yy"):
        assert_close(getattr(both, name), getattr(whole, name))
