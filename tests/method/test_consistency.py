"""What a model's consistency with its experts must be, on networks with batch norm and a skip."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fusion.method import SNRSelectiveMerge
from fusion.method.consistency import (
    ALL_LAYERS,
    MERGED_LAYERS,
    common_tensors,
    consistency,
    consistency_table,
)
from fusion.models import SeparableResNet
from fusion.weights import ModuleSource, state_dict_avg


def network(seed: int, num_classes: int = 10) -> SeparableResNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SeparableResNet(num_classes=num_classes, in_channels=1, width=0.125)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                assert module.running_mean is not None
                module.running_mean.normal_()
    return model


@pytest.fixture
def experts() -> dict[str, nn.Module]:
    return {"a": network(1, 4), "b": network(2, 6)}


def sources(experts: dict[str, nn.Module]) -> dict[str, ModuleSource]:
    return {name: ModuleSource(expert) for name, expert in experts.items()}


def with_body(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Return a ten-class network with everything but the head from ``state``."""
    result = copy.deepcopy(model)
    body = {key: value for key, value in state.items() if not key.startswith("head.")}
    result.load_state_dict({**result.state_dict(), **body})
    return result


def test_a_model_equal_to_an_expert_scores_one_for_it(experts: dict[str, nn.Module]) -> None:
    merged = with_body(network(0), experts["a"].state_dict())
    found = consistency(merged, sources(experts))[ALL_LAYERS]
    assert found.experts["a"] == pytest.approx(1.0, abs=1e-9)
    # From B the model lies in A's direction; from A it lies nowhere.
    assert math.isnan(found.experts["b"])
    assert found.mean == pytest.approx(1.0, abs=1e-9)


def test_the_mean_of_two_experts_lies_between_them(experts: dict[str, nn.Module]) -> None:
    bodies = [
        {k: v for k, v in expert.state_dict().items() if not k.startswith("head.")}
        for expert in experts.values()
    ]
    merged = with_body(network(0), state_dict_avg(bodies))
    found = consistency(merged, sources(experts))[ALL_LAYERS]
    assert list(found.experts.values()) == pytest.approx([1.0, 1.0], abs=1e-6)


def test_a_model_beyond_an_expert_points_away_from_the_other(
    experts: dict[str, nn.Module],
) -> None:
    a, b = (expert.state_dict() for expert in experts.values())
    beyond = {k: 2 * a[k] - b[k] for k in a if a[k].shape == b[k].shape and "num_b" not in k}
    found = consistency(with_body(network(0), beyond), sources(experts))[ALL_LAYERS]
    assert found.experts["a"] == pytest.approx(1.0, abs=1e-6)
    assert found.experts["b"] == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("buffers", [False, True])
def test_counters_of_batch_norm_decide_nothing(
    experts: dict[str, nn.Module], buffers: bool
) -> None:
    """The artefact of a vector with counters: thousands of steps outweigh every weight."""
    merged = network(0)
    before = consistency(merged, sources(experts), buffers=buffers)[ALL_LAYERS]
    for steps, model in zip((100, 5000, 90000), (merged, *experts.values()), strict=True):
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(steps)
    after = consistency(merged, sources(experts), buffers=buffers)[ALL_LAYERS]
    assert after.pairs == before.pairs


def test_different_models_score_differently(experts: dict[str, nn.Module]) -> None:
    scores = [consistency(network(s), sources(experts))[ALL_LAYERS].mean for s in (0, 3)]
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)


def test_buffers_add_running_statistics_and_nothing_else(experts: dict[str, nn.Module]) -> None:
    model = network(0)
    few = set(common_tensors(model, sources(experts), buffers=False))
    more = set(common_tensors(model, sources(experts), buffers=True))
    assert {name.rpartition(".")[2] for name in more - few} == {"running_mean", "running_var"}
    assert not any("head" in name for name in more)  # 10, 4 and 6 classes


def test_of_three_experts_the_mean_is_over_pairs() -> None:
    experts = {name: network(seed) for seed, name in enumerate("abc", start=1)}
    found = consistency(network(0), sources(experts))[ALL_LAYERS]
    assert len(found.pairs) == 6
    by_hand = (found.pairs["a", "b"] + found.pairs["a", "c"]) / 2
    assert found.experts["a"] == pytest.approx(by_hand)
    assert found.mean == pytest.approx(sum(found.pairs.values()) / 6)
    # Any two of three alone give the pairs' own numbers.
    alone = consistency(network(0), sources({k: experts[k] for k in "ac"}))[ALL_LAYERS]
    assert alone.pairs["a", "c"] == pytest.approx(found.pairs["a", "c"])


def test_one_expert_has_nothing_to_compare_with() -> None:
    assert consistency(network(0), sources({"a": network(1)})) == {}


def test_a_merge_reports_it(tmp_path: object, experts: dict[str, nn.Module]) -> None:
    import pandas as pd

    algorithm = SNRSelectiveMerge(top_p=0.2, weighting="equal", batch_norm="merge", plot=False)
    algorithm.output_path = tmp_path  # type: ignore[assignment]
    algorithm.run({"_pretrained_": network(0), **experts})
    report = algorithm.report["consistency"]
    # An equal mean of two experts lies between them; a layer of the base does not.
    assert report[MERGED_LAYERS]["mean"] == pytest.approx(1.0, abs=1e-5)
    assert report[ALL_LAYERS]["mean"] < 0.99
    table = pd.read_csv(f"{tmp_path}/consistency.csv")
    assert list(table) == ["scope", "expert", "other", "consistency"]
    assert set(table["scope"]) == {ALL_LAYERS, MERGED_LAYERS}


def test_the_table_has_pairs_means_and_the_mean_of_all(experts: dict[str, nn.Module]) -> None:
    found = consistency(network(0), sources(experts), merged_tensors=["stem.depthwise.weight"])
    table = consistency_table(found)
    assert len(table) == 2 * (2 + 2 + 1)
