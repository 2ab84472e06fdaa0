"""Laws of every method that merges, from end to end: on a residual network, and on small networks
of torchvision's families.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models import convnext, regnet, resnet

import fusion
from fusion.alignment import apply_permutation, permutation_spec, random_permutation
from fusion.data import ClassSubset, ImageTensors
from fusion.method.presets import preset
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.training import recalibrate_batch_norm

# name -> options that keep the method short; those that only study networks are not here
METHODS: dict[str, dict[str, Any]] = {
    name: {} for name in fusion.methods()["name"] if "rule" in preset(name)
} | {
    "weighted_average": {"weights": {"a": 2, "b": 1}},
    "git_rebasin": {},
    "snr_selective_merge": {},
    "adamerging": {"steps": 2, "batch_size": 16},
    "regmean": {"statistics_images": 40},
    "fisher_merging": {"statistics_images": 8},
    "layerwise_least_squares": {"statistics_images": 40},
    "zipit": {},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, options) for name, options in METHODS.items()},
    "regmean folded": ("regmean", {"folded": True, "statistics_images": 40}),
    "regmean sequential": ("regmean", {"sequential": True, "statistics_images": 40}),
    "iso_c normalised": ("iso_c", {"normalise_rows": True}),
    "iso_c split": ("iso_c", {"kernel": "split"}),
    "ties normalised": ("ties_merging", {"normalise_rows": True, "scope": "tensor"}),
    "least squares unfolded": (
        "layerwise_least_squares",
        {"folded": False, "statistics_images": 40},
    ),
    "zipit cca": ("zipit", {"basis": "cca"}),
}
# Zipped units have no running statistics in the base to keep: those of the experts are merged.
KEPT = {"zipit": "merge", "zipit cca": "merge"}
every = pytest.mark.parametrize("variant", VARIANTS)


def merge(models: object, variant: str, **options: Any) -> nn.Module:
    name, own = VARIANTS[variant]
    common = {"plot": False, "calibration_images": 60, "seed": 3}
    common = {key: value for key, value in common.items() if key in preset(name)}
    return fusion.merge(models, name, **{**common, **own, **options})


@pytest.fixture(scope="module")
def data(train_digits: ImageTensors) -> dict[str, ClassSubset]:
    few = train_digits.select(torch.arange(200))
    return {"a": ClassSubset(few, (0, 1, 2, 3)), "b": ClassSubset(few, (4, 5, 6, 7, 8, 9))}


@pytest.fixture(scope="module")
def images(train_digits: ImageTensors) -> Tensor:
    return torch.stack([train_digits[i][0] for i in range(30)])


def outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    """What the network of each task returns, or the only network."""
    with torch.no_grad():
        if isinstance(network, MultiTaskNetwork):
            return [network.for_task(task).eval()(images) for task in network.tasks]
        return [network.eval()(images)]


def test_no_method_is_missing() -> None:
    merging = {"git_rebasin", "snr_selective_merge", "adamerging", "zipit"}
    studying = {
        "dummy", "search", "interpolation_barrier", "benchmark_controls",
        "task_vector_cos_similarity", "task_vector_violin_plot",
    }  # fmt: skip
    assert set(fusion.methods()["name"]) == set(METHODS) | studying
    assert merging <= set(METHODS)


@every
def test_copies_of_the_base_are_the_base(variant, pool, data, images) -> None:
    base = pool["_pretrained_"]
    copies = BaseModelPool(
        {"_pretrained_": base, "a": copy.deepcopy(base), "b": copy.deepcopy(base)},
        train_datasets=data,
    )
    kept = KEPT.get(variant, "pretrained")
    merged = merge(copies, variant, batch_norm=kept, head="pretrained")
    found = outputs(merged, images)
    for output in found:
        assert_close(output, outputs(base, images)[0], rtol=1e-3, atol=1e-3)


@every
def test_a_merge_changes_its_experts_networks_and_nothing_else(
    variant, pool, data, images, equal
) -> None:
    """Members stay as they are; the result is new, finite, and knows both tasks' classes."""
    before = {name: copy.deepcopy(network) for name, network in pool.items()}
    modelpool = BaseModelPool(pool, train_datasets=data)
    merged = merge(modelpool, variant)
    assert all(equal(pool[name], before[name]) for name in pool)
    for output in outputs(merged, images):
        assert output.isfinite().all()
        assert output.std(0).min() > 0, "an output that does not depend on the image"


@every
def test_the_order_of_the_experts_does_not_matter(variant, pool, data, images) -> None:
    turned = {name: pool[name] for name in ("_pretrained_", "b", "a")}
    one = merge(BaseModelPool(pool, train_datasets=data), variant)
    other = merge(BaseModelPool(turned, train_datasets=data), variant)
    by_task = [outputs(network, images) for network in (one, other)]
    if len(by_task[0]) > 1:
        by_task[1].reverse()
    for first, second in zip(*by_task, strict=True):
        assert_close(first, second, rtol=1e-2, atol=1e-2)


@every
def test_memory_format_does_not_matter(variant, pool, data, images) -> None:
    last = {
        name: copy.deepcopy(network).to(memory_format=torch.channels_last)
        for name, network in pool.items()
    }
    one = merge(BaseModelPool(pool, train_datasets=data), variant)
    other = merge(BaseModelPool(last, train_datasets=data), variant)
    for first, second in zip(outputs(one, images), outputs(other, images), strict=True):
        assert_close(first, second, rtol=1e-2, atol=1e-2)


# A matrix of half precision has other singular vectors where singular values nearly coincide; what
# is trimmed or elected by rank may change its place. Masks and ranks are compared elsewhere.
@every
def test_half_precision_is_merged_in_full(variant, pool, data, images) -> None:
    """Members in float16 give, but for their own rounding, what their widened copies give."""
    halves = {name: copy.deepcopy(network).half() for name, network in pool.items()}
    wide = {name: copy.deepcopy(network).float() for name, network in halves.items()}
    options = {"batch_norm": KEPT.get(variant, "pretrained")}
    one = merge(BaseModelPool(halves, train_datasets=data), variant, **options)
    other = merge(BaseModelPool(wide, train_datasets=data), variant, **options)
    for first, second in zip(outputs(one.float(), images), outputs(other, images), strict=True):
        assert_close(first, second, rtol=0.05, atol=0.05)


# The order of singular vectors and of equal magnitudes depends on the order of units; random masks
# are drawn for places, not for units.
BY_PLACE = {"dare"}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in BY_PLACE])
def test_units_in_another_order_give_the_same_function(variant, pool, data, images) -> None:
    spec = permutation_spec(pool["_pretrained_"], images[:1])
    permutation = random_permutation(spec, seed=5)
    turned = {name: apply_permutation(network, spec, permutation) for name, network in pool.items()}
    one = merge(BaseModelPool(pool, train_datasets=data), variant)
    other = merge(BaseModelPool(turned, train_datasets=data), variant)
    for first, second in zip(outputs(one, images), outputs(other, images), strict=True):
        assert_close(first, second, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "variant", ["regmean folded", "layerwise_least_squares", "iso_c normalised", "ties normalised"]
)
def test_scales_that_batch_norm_takes_away_change_nothing(variant, pool, data, images) -> None:
    """A claim of the rules that fold batch norm and of those on normalised rows; other rules see
    the scale of a convolution.
    """
    scaled = {name: copy.deepcopy(network) for name, network in pool.items()}
    with torch.no_grad():
        for factor, network in zip((0.3, 1.0, 4.0), scaled.values(), strict=True):
            network.conv1.weight *= factor
            network.bn1.running_mean *= factor
            network.bn1.running_var.add_(network.bn1.eps).mul_(factor**2).sub_(network.bn1.eps)
    one = merge(BaseModelPool(pool, train_datasets=data), variant, batch_norm="pretrained")
    other = merge(BaseModelPool(scaled, train_datasets=data), variant, batch_norm="pretrained")
    for first, second in zip(outputs(one, images), outputs(other, images), strict=True):
        assert_close(first, second, rtol=1e-2, atol=1e-2)


def depthwise_with_squeeze() -> nn.Module:
    return models.mobilenet_v3_small(num_classes=4, width_mult=0.5)


def layer_norms() -> nn.Module:
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return models.ConvNeXt(blocks, num_classes=4, stochastic_depth_prob=0.0)


def grouped() -> nn.Module:
    return resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 1], num_classes=4, groups=4, width_per_group=4
    )


def grouped_with_squeeze() -> nn.Module:
    params = regnet.BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=4, se_ratio=0.25
    )
    return regnet.RegNet(params, num_classes=4, stem_width=8)


def concatenated() -> nn.Module:
    return models.DenseNet(8, (2, 2), 8, num_classes=4)


def without_norms() -> nn.Module:
    return models.squeezenet1_1(num_classes=4)


SMALL: Mapping[str, Callable[[], nn.Module]] = {
    "ConvNeXt": layer_norms,
    "DenseNet": concatenated,
}
LARGER: Mapping[str, Callable[[], nn.Module]] = {
    "RegNetY": grouped_with_squeeze,
    "ResNeXt": grouped,
    "MobileNetV3": depthwise_with_squeeze,
    "SqueezeNet": without_norms,
    "ShuffleNetV2": lambda: models.shufflenet_v2_x0_5(num_classes=4),
    "EfficientNet": lambda: models.efficientnet_b0(num_classes=4),
    "ResNet": lambda: models.resnet18(num_classes=4),
}
FAMILIES = [
    *SMALL,
    *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER),
]


@pytest.fixture(scope="module")
def family_pool() -> Callable[[str], BaseModelPool]:
    kept: dict[str, BaseModelPool] = {}

    def made(name: str) -> BaseModelPool:
        if name in kept:
            return kept[name]
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = {**SMALL, **LARGER}[name]()
        experts = {name: copy.deepcopy(base) for name in ("a", "b")}
        data = {}
        for number, (task, expert) in enumerate(experts.items()):
            for parameter in expert.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.1 * parameter.std(correction=0) * noise)
            data[task] = ImageTensors(
                torch.rand(24, 3, 64, 64, generator=generator) ** (1 + number),
                torch.arange(24) % 4,
                class_names=[f"{task}{c}" for c in range(4)],
            )
        for task, network in [*experts.items(), ("a", base)]:
            recalibrate_batch_norm(network, data[task], images=24, batch_size=24)
        classes = {task: list(data[task].class_names) for task in experts}
        kept[name] = BaseModelPool(
            {"_pretrained_": base, **experts}, train_datasets=data, classes=classes
        )
        return kept[name]

    return made


@every
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_a_finite_function(family, variant, family_pool) -> None:
    modelpool = family_pool(family)
    short = {"calibration_images": 24}
    _, own = VARIANTS[variant]
    if "statistics_images" in own:
        short["statistics_images"] = 4
    merged = merge(modelpool, variant, **short)
    images = torch.stack([modelpool.dataset("a")[i][0] for i in range(6)])
    for output in outputs(merged, images):
        assert output.shape == (6, 4)
        assert output.isfinite().all()
        assert not re.search("nan", str(output.norm()))
