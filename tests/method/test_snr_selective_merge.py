from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fusion.data import ClassSubset, ImageTensors
from fusion.errors import UserError
from fusion.method import SNRSelectiveMerge
from fusion.modelpool import BaseModelPool
from fusion.models import Layer, find_layers
from fusion.spectrum import layer_snr
from fusion.taskpool import ClassificationTaskPool

CLASSES = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9)}
LAYERS = 7  # of a ResNet-8 whose head is free; 8 with it
INTERPOLATIONS = ("lerp", "slerp", "ties")


def merge(models, **options) -> tuple[nn.Module, SNRSelectiveMerge]:
    algorithm = SNRSelectiveMerge(
        **{"batch_norm": "pretrained", "head": "pretrained", "plot": False, **options}
    )
    return algorithm.run(models), algorithm


def tensors_of(model: nn.Module, names: list[str]) -> set[str]:
    return {key for layer in find_layers(model) if layer.name in names for key in layer.tensors}


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return {key for key in first if not torch.equal(first[key], second[key])}


# -- what is merged, and what is not -------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["pretrained", "merge"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_of_the_base_give_the_base(base, equal, interpolation, batch_norm, copies) -> None:
    pool = {"_pretrained_": base} | {f"e{i}": copy.deepcopy(base) for i in range(copies)}
    options = {"interpolation": interpolation, "batch_norm": batch_norm, "rank_by": "norm"}
    result, _ = merge(pool, top_p=1.0, **options)
    assert equal(result, base)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_no_layer_gives_the_base(pool, base, equal, interpolation) -> None:
    result, algorithm = merge(pool, top_p=0.0, interpolation=interpolation, batch_norm="merge")
    assert algorithm.selected_layers == []
    assert equal(result, base)


def test_all_layers_give_the_full_mean(base, peers) -> None:
    result, _ = merge({"_pretrained_": base, **peers}, top_p=1.0, weighting="equal")
    states = [expert.state_dict() for expert in peers.values()]
    for key, value in result.state_dict().items():
        if "running" in key or "num_batches" in key:
            assert torch.equal(value, base.state_dict()[key]), key
        else:
            mean = torch.stack([state[key].double() for state in states]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.8])
def test_other_layers_are_the_bases_and_a_batch_norm_goes_with_its_convolution(
    base, pool, top_p
) -> None:
    result, algorithm = merge(pool, top_p=top_p, batch_norm="merge")
    assert len(algorithm.selected_layers) == math.ceil(top_p * LAYERS)
    touched = {
        key for key in tensors_of(base, algorithm.selected_layers) if "num_batches" not in key
    }
    assert differing(result, base) == touched
    assert any("running_var" in key for key in touched)


def test_integer_buffers_are_the_bases(base, peers) -> None:
    result, _ = merge({"_pretrained_": base, **peers}, top_p=1.0, batch_norm="merge")
    assert result.bn1.num_batches_tracked == base.bn1.num_batches_tracked
    assert peers["p1"].bn1.num_batches_tracked != base.bn1.num_batches_tracked


def test_the_inputs_are_left_alone(pool, train_digits, equal) -> None:
    before = {name: copy.deepcopy(model) for name, model in pool.items()}
    for model in pool.values():
        model.train()
    images = train_digits.images.clone()
    given = BaseModelPool(pool, train_datasets={"_pretrained_": train_digits}, classes=CLASSES)
    result, algorithm = merge(
        given, top_p=1.0, batch_norm="recalibrate", head="union", calibration_images=300
    )
    for reference in algorithm.controls.values():
        reference()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()
    assert all(equal(pool[name], before[name]) for name in pool)
    assert all(model.training for model in pool.values())
    assert torch.equal(train_digits.images, images)


def test_a_merge_takes_one_line_of_python(pool) -> None:
    assert isinstance(
        SNRSelectiveMerge(top_p=0.1, head="pretrained", plot=False).run(pool), type(pool["a"])
    )


def test_one_expert_is_enough(base, experts) -> None:
    result, _ = merge({"_pretrained_": base, "a": experts["a"]}, top_p=1.0)
    expected = {
        key
        for layer in find_layers(base)
        if layer.name != "linear"
        for key in layer.tensors
        if "running" not in key and "num_batches" not in key
    }
    assert differing(result, base) == expected
    assert torch.equal(result.conv1.weight, experts["a"].conv1.weight)


def test_special_members_are_no_experts(pool, net, equal) -> None:
    plain, _ = merge(pool, top_p=1.0)
    other, _ = merge({**pool, "_joint_": net(10, seed=9)}, top_p=1.0)
    assert equal(plain, other)


# -- selection ------------------------------------------------------------------------------------


def expected_score(rank_by: str, layer: Layer, base: nn.Module, experts: list[nn.Module]) -> float:
    own, states = base.state_dict(), [expert.state_dict() for expert in experts]
    keys = [k for k in layer.tensors if "running" not in k and "num_batches" not in k]
    size = torch.cat([own[k].double().flatten() for k in keys]).norm()
    changes = [torch.cat([(s[k] - own[k]).double().flatten() for k in keys]) for s in states]
    weight = layer.weight
    values = {
        "pretrained": lambda: [layer_snr(own[weight]).snr],
        "experts": lambda: [layer_snr(s[weight]).snr for s in states],
        "task_vector": lambda: [layer_snr(s[weight].double() - own[weight]).snr for s in states],
        "norm": lambda: [float(change.norm() / size) for change in changes],
        "similarity": lambda: [
            float(nn.functional.cosine_similarity(one, other, dim=0))
            for one, other in itertools.combinations(changes, 2)
        ],
    }
    return float(np.mean(values[rank_by]()))


@pytest.mark.parametrize("rank_by", ["pretrained", "experts", "task_vector", "norm", "similarity"])
def test_each_ranking_is_what_it_says(base, peers, rank_by) -> None:
    _, algorithm = merge({"_pretrained_": base, **peers}, rank_by=rank_by, top_p=0.5)
    layers = find_layers(base)
    expected = [expected_score(rank_by, layer, base, list(peers.values())) for layer in layers]
    np.testing.assert_allclose(algorithm.layer_table["score"], expected, rtol=1e-6)
    best = sorted(range(len(layers)), key=lambda i: -expected[i])[: math.ceil(0.5 * len(layers))]
    assert algorithm.selected_layers == [layers[i].name for i in sorted(best)]


def test_hybrid_adds_scaled_snr_and_similarity(base, peers) -> None:
    _, algorithm = merge({"_pretrained_": base, **peers}, rank_by="hybrid", top_p=0.5)
    table = algorithm.layer_table
    snr = table[[f"snr/{name}" for name in peers]].mean(axis=1)
    parts = [(x - x.min()) / (x.max() - x.min() or 1) for x in (snr, table["similarity"])]
    np.testing.assert_allclose(table["score"], parts[0] + 1.7 * parts[1])


def test_a_random_choice_depends_on_the_seed_and_the_names_alone(base, experts, equal) -> None:
    there = {"_pretrained_": base, **experts}
    back = dict(reversed(there.items()))
    chosen = [
        merge(pool, rank_by="random", top_p=0.3, seed=seed)[1].selected_layers
        for pool, seed in ((there, 0), (back, 0), (there, 1), (there, 2), (there, 3))
    ]
    assert chosen[0] == chosen[1]
    assert len(set(map(tuple, chosen))) > 1
    state = torch.random.get_rng_state()
    merge(there, rank_by="random")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_layers_can_be_named(base, pool) -> None:
    names = ["conv1", "layer2.0.conv2"]
    result, algorithm = merge(pool, rank_by=names, top_p=0.0)
    assert algorithm.selected_layers == names
    assert {key.rpartition(".")[0] for key in differing(result, base)} == {
        *names, "bn1", "layer2.0.bn2"
    }  # fmt: skip


# -- weights and interpolations -------------------------------------------------------------------


def test_shares_follow_the_snr(base, peers) -> None:
    result, algorithm = merge({"_pretrained_": base, **peers}, top_p=1.0)
    table = algorithm.layer_table
    snr = table[[f"snr/{name}" for name in peers]].to_numpy()
    assert (snr > 0).any()
    shares = table[[f"weight/{name}" for name in peers]].to_numpy()
    total = snr.sum(1, keepdims=True)
    expected = np.where(total > 0, snr / np.where(total > 0, total, 1), 1 / 3)
    np.testing.assert_allclose(shares, expected)
    row = int(np.flatnonzero((total > 0).ravel())[0])
    weight = algorithm.layer_table["layer"][row] + ".weight"
    mean = sum(
        share * expert.state_dict()[weight].double()
        for share, expert in zip(expected[row], peers.values(), strict=True)
    )
    torch.testing.assert_close(result.state_dict()[weight].double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", [[3, 1], {"b": 1, "a": 3}])
def test_shares_can_be_given(base, pool, weighting) -> None:
    result, _ = merge(pool, weighting=weighting, top_p=1.0)
    expected = 0.75 * pool["a"].conv1.weight + 0.25 * pool["b"].conv1.weight
    torch.testing.assert_close(result.conv1.weight, expected)


def test_slerp_keeps_the_mean_norm_and_lerp_does_not(base, pool) -> None:
    norms = [pool[name].conv1.weight.norm() for name in "ab"]
    options = {"top_p": 1.0, "weighting": "equal"}
    round_ = merge(pool, interpolation="slerp", **options)[0].conv1.weight.norm()
    straight = merge(pool, interpolation="lerp", **options)[0].conv1.weight.norm()
    torch.testing.assert_close(round_, sum(norms) / 2)
    assert straight < round_


def test_ties_goes_by_density_and_scale(base, pool) -> None:
    options = {"top_p": 1.0, "interpolation": "ties", "weighting": "equal"}
    few = merge(pool, density=0.1, **options)[0]
    far = merge(pool, density=0.1, scale=2.0, **options)[0]
    change = few.conv1.weight - base.conv1.weight
    assert 0 < (change != 0).float().mean() <= 0.25
    torch.testing.assert_close(far.conv1.weight - base.conv1.weight, 2 * change)


def test_the_result_has_the_bases_dtype(base, peers) -> None:
    halves = {name: copy.deepcopy(expert).half() for name, expert in peers.items()}
    full, _ = merge({"_pretrained_": base, **peers}, top_p=1.0, weighting="equal")
    half, _ = merge({"_pretrained_": base, **halves}, top_p=1.0, weighting="equal")
    assert {t.dtype for t in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half.conv1.weight, full.conv1.weight, rtol=0, atol=2e-3)
    whole, _ = merge({"_pretrained_": copy.deepcopy(base).bfloat16(), **peers}, top_p=1.0)
    assert {t.dtype for t in whole.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("scoring", ["calibrated", "uncalibrated"])
def test_the_memory_format_does_not_matter(pool, equal, scoring) -> None:
    other = {
        name: copy.deepcopy(model).to(memory_format=torch.channels_last)
        for name, model in pool.items()
    }
    plain, first = merge(pool, top_p=0.5, scoring=scoring)
    result, second = merge(other, top_p=0.5, scoring=scoring)
    assert first.selected_layers == second.selected_layers
    for key, value in result.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-6, atol=1e-7)


# -- the head -------------------------------------------------------------------------------------


def test_the_bases_head_is_kept_and_told(base, pool) -> None:
    result, algorithm = merge(pool, top_p=1.0)
    assert torch.equal(result.linear.weight, base.linear.weight)
    table = algorithm.layer_table
    assert table.loc[table["head"], "layer"].tolist() == ["linear"]
    assert algorithm.report["head_tensors"] == ["linear.weight", "linear.bias"]
    assert not table.loc[table["head"], "selected"].any()


def test_one_expert_with_another_head_keeps_it_from_all(base, experts, peers) -> None:
    """Though the other expert's has the base's shape."""
    result, algorithm = merge({"_pretrained_": base, "a": experts["a"], **peers}, top_p=1.0)
    assert algorithm.report["head_tensors"] == ["linear.weight", "linear.bias"]
    assert torch.equal(result.linear.weight, base.linear.weight)


def test_a_head_of_one_shape_is_a_layer_like_the_others(base, peers) -> None:
    _, algorithm = merge({"_pretrained_": base, **peers}, top_p=1.0)
    assert algorithm.selected_layers[-1] == "linear"
    assert algorithm.report["head_tensors"] == []


def test_union_puts_the_rows_where_their_labels_say(base, experts, net, test_digits) -> None:
    classes = {"a": (8, 3, 1), "b": (0, 9, 2, 4, 7, 6)}  # nobody knows a 5: the base's row stays
    experts = {name: net(len(own), seed=3) for name, own in classes.items()}
    known = {"_pretrained_": range(10), **classes}
    pool = BaseModelPool({"_pretrained_": base, **experts}, classes=known)
    result, algorithm = merge(pool, head="union", top_p=0.2, align=False)  # strangers move
    for name, own in classes.items():
        for row, label in enumerate(own):
            assert torch.equal(result.linear.weight[label], experts[name].linear.weight[row])
            assert torch.equal(result.linear.bias[label], experts[name].linear.bias[row])
    assert torch.equal(result.linear.weight[5], base.linear.weight[5])
    labels = algorithm.result_labels(pool)
    tasks = ClassificationTaskPool({"all": test_digits}, fast_dev_run=True)
    assert tasks.evaluate(result, labels=labels)["all"]["images"] == 500


def test_union_of_experts_beyond_the_base(net, test_digits) -> None:
    """The base knows three classes, the experts seven others: the result knows these seven."""
    classes = {"_pretrained_": (0, 1, 2), "a": (9, 3), "b": (8, 7, 6, 5, 4)}
    models = {name: net(len(own), seed=k) for k, (name, own) in enumerate(classes.items())}
    pool = BaseModelPool(models, classes=classes)
    result, algorithm = merge(pool, head="union", top_p=0.2, align=False)  # strangers move
    assert algorithm.result_labels(pool).labels == (3, 4, 5, 6, 7, 8, 9)
    assert result.linear.out_features == 7
    assert torch.equal(result.linear.weight[6], models["a"].linear.weight[0])
    assert torch.equal(result.linear.weight[1], models["b"].linear.weight[4])
    assert result(torch.rand(2, 1, 8, 8)).shape == (2, 7)


# -- batch norm -----------------------------------------------------------------------------------


def test_merged_statistics_are_those_of_the_mixture(base, peers) -> None:
    result, _ = merge(
        {"_pretrained_": base, **peers}, top_p=1.0, batch_norm="merge", weighting=[2, 1, 1]
    )
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)[:, None]
    means = torch.stack([p.bn1.running_mean for p in peers.values()]).double()
    variances = torch.stack([p.bn1.running_var for p in peers.values()]).double()
    mean = (shares * means).sum(0)
    variance = (shares * (variances + means**2)).sum(0) - mean**2
    torch.testing.assert_close(result.bn1.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.bn1.running_var.double(), variance, rtol=1e-5, atol=1e-6)


def sorted_by_class(images: ImageTensors) -> ImageTensors:
    order = images.labels.argsort(stable=True)
    return ImageTensors(
        images.images[order],
        images.labels[order],
        class_names=images.class_names,
        mean=images.mean,
        std=images.std,
    )


def test_recalibration_does_not_fall_for_sorted_data(pool, train_digits) -> None:
    def variances(data: ImageTensors, count: int) -> torch.Tensor:
        given = BaseModelPool(pool, train_datasets={"_pretrained_": data})
        result, _ = merge(
            given, batch_norm="recalibrate", calibration_images=count, batch_size=300, top_p=1.0
        )
        return result.layer3[0].bn2.running_var

    truth = variances(train_digits, len(train_digits))
    sample = variances(sorted_by_class(train_digits), 100)
    misled = variances(ClassSubset(train_digits, [0]), 100)  # as the first 100 would have it

    def error(found: torch.Tensor) -> float:
        return float((found / truth).log().abs().mean())

    assert error(sample) < 0.15
    assert error(misled) > 2 * error(sample)


@pytest.mark.parametrize("treatment", ["pretrained", "merge", "recalibrate"])
def test_the_control_is_the_base_under_the_same_treatment(
    base, pool, train_digits, treatment
) -> None:
    given = BaseModelPool(pool, train_datasets={"_pretrained_": train_digits})
    result, algorithm = merge(given, batch_norm=treatment, calibration_images=200, top_p=0.5)
    ((name, make),) = algorithm.controls.items()
    control = make()
    assert name.startswith("_pretrained_")
    assert differing(control, base) <= {
        k for k in base.state_dict() if "running" in k or "num_batches" in k
    }
    assert bool(differing(control, base)) == (treatment != "pretrained")
    assert algorithm.report["batch_norm"] == treatment
    if treatment == "recalibrate":  # the statistics of the first norm see the images alone
        rows, _ = merge(given, batch_norm=treatment, calibration_images=200, top_p=0.0)
        assert torch.equal(control.bn1.running_mean, rows.bn1.running_mean)
    if treatment == "merge":
        assert torch.equal(control.bn1.running_mean, result.bn1.running_mean)


def test_auto_recalibrates_where_there_is_data(pool, train_digits) -> None:
    given = BaseModelPool(pool, train_datasets={"_pretrained_": train_digits})
    assert merge(given, batch_norm="auto")[1].report["batch_norm"] == "recalibrate"
    assert merge(pool, batch_norm="auto")[1].report["batch_norm"] == "merge"


def test_a_network_without_batch_norm_merges_as_well(equal) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    expert = copy.deepcopy(plain)
    for parameter in expert.parameters():
        parameter.data.mul_(1.01)
    result, algorithm = merge({"_pretrained_": plain, "a": expert}, batch_norm="auto", top_p=1.0)
    assert algorithm.report["batch_norm"] == "pretrained"
    assert equal(result, expert)


# -- the notebook ---------------------------------------------------------------------------------


def literal_score(weight: torch.Tensor) -> float:
    array = weight.detach().double().numpy()
    matrix = array.reshape(1, -1) if array.ndim < 2 else array.reshape(array.shape[0], -1)
    values = np.linalg.svd(matrix, compute_uv=False)
    low, high = np.percentile(values, [25, 75])
    beta = min(matrix.shape) / max(matrix.shape)
    threshold = (high - low) / 1.349 * (1 + math.sqrt(beta))
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    if signal == 0:
        return 0.0
    return signal / (noise if noise > 0 else 1.0) / values.max()


@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.6, 1.0])
def test_the_notebook_to_the_letter(base, peers, top_p) -> None:
    experts = {name: peers[name] for name in ("p1", "p2")}
    result, algorithm = merge(
        {"_pretrained_": base, **experts}, scoring="uncalibrated", batch_norm="auto", top_p=top_p
    )
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    scores = {
        name: [literal_score(expert.state_dict()[f"{name}.weight"]) for expert in experts.values()]
        for name in names
    }
    ascending = sorted(names, key=lambda name: sum(scores[name]) / 2)
    selected = ascending[-math.ceil(top_p * len(names)) :]
    assert set(algorithm.selected_layers) == set(selected)
    expected = {key: value.clone() for key, value in base.state_dict().items()}
    for name in selected:
        a, b = scores[name]
        share = a / (a + b) if a + b else 0.5
        for kind in ("weight", "bias"):
            key = f"{name}.{kind}"
            if key in expected:
                one, other = (expert.state_dict()[key] for expert in experts.values())
                expected[key] = share * one + (1 - share) * other
    for key, value in result.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_the_notebooks_rule_for_two_models(base, peers) -> None:
    """The mean of the changes where their signs agree, and no change where they differ."""
    options = {"scoring": "uncalibrated", "interpolation": "ties", "top_p": 1.0}
    result, _ = merge({"_pretrained_": base, "a": peers["p1"], "b": peers["p2"]}, **options)
    one, other = (peers[name].conv1.weight - base.conv1.weight for name in ("p1", "p2"))
    change = torch.where(one.sign() == other.sign(), (one + other) / 2, 0.0)
    assert bool((change == 0).any())
    torch.testing.assert_close(result.conv1.weight, base.conv1.weight + change)


# -- what it tells --------------------------------------------------------------------------------


def test_the_table_and_the_files_agree_with_the_selection(pool, tmp_path) -> None:
    algorithm = SNRSelectiveMerge(top_p=0.3, batch_norm="pretrained", head="pretrained")
    algorithm.output_path = tmp_path
    algorithm.run(pool)
    table = pd.read_csv(tmp_path / "layers.csv")
    for column in ("layer", "tensors", "shape", "similarity", "rank", "selected", "weight/a"):
        assert column in table, column
    for member in pool:
        assert f"snr/{member}" in table
        assert f"signal_rank/{member}" in table
    assert table.loc[table["selected"], "layer"].tolist() == algorithm.selected_layers
    assert sorted(table["rank"].dropna()) == list(range(1, LAYERS + 1))
    assert table.loc[table["selected"], "rank"].max() == len(algorithm.selected_layers) == 3
    assert table["layer"].tolist() == [layer.name for layer in find_layers(pool["_pretrained_"])]
    named = [key for row in table["tensors"] for key in row.split()]
    assert sorted(named) == sorted(pool["_pretrained_"].state_dict())
    assert table["shape"][0] == "8x1x3x3"
    assert (tmp_path / "layers.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(
        table, algorithm.layer_table, check_dtype=False, check_column_type=False
    )


def test_without_an_output_path_nothing_is_written(pool, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    SNRSelectiveMerge(batch_norm="pretrained").run(pool)
    assert list(tmp_path.iterdir()) == []


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_p": 1.5}, "top_p is 1.5; give a number from 0 to 1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"rank_by": "expert"}, "did you mean 'experts'"),
        ({"weighting": "equl"}, "did you mean 'equal'"),
        ({"interpolation": "slrp"}, "did you mean 'slerp'"),
        ({"scoring": "calibrate"}, "did you mean 'calibrated'"),
        ({"batch_norm": "recalibrated"}, "did you mean 'recalibrate'"),
        ({"head": "unoin"}, "did you mean 'union'"),
        ({"sigma": "medain"}, "did you mean 'median'"),
        ({"threshold": "tracy-widom"}, "did you mean 'tracy_widom'"),
        ({"alpha": 2.0}, "alpha"),
        ({"density": 0.0, "interpolation": "ties"}, "density is 0.0"),
        ({"density": 0.5}, "density is an option of interpolation=ties"),
        (
            {"scale": 2.0, "interpolation": "ties", "scoring": "uncalibrated"},
            "scale is an option of",
        ),
        ({"calibration_images": 1}, "calibration_images is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_an_option_without_meaning_is_refused_at_once(options, said) -> None:
    with pytest.raises(UserError, match=said):
        SNRSelectiveMerge(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank_by": ["conv1", "layer2.0.conv3"]}, "no layer 'layer2.0.conv3'; did you mean 'lay"),
        ({"rank_by": ["linear"]}, "'linear' is the head"),
        ({"weighting": [1, 2, 3]}, "3 numbers for 2 experts .a, b."),
        ({"weighting": {"a": 1, "c": 1}}, "weights names a, c; the experts are a, b"),
        ({"weighting": [1, -1]}, "are no shares"),
        ({"weighting": [0, 0]}, "are no shares"),
        ({"head": "union"}, "those of a, b are not known; give them as the pool's classes"),
        (
            {"batch_norm": "recalibrate"},
            "training images of every expert, and the pool has none of a, b",
        ),
    ],
)
def test_an_option_that_does_not_fit_the_pool_is_told_before_the_run(pool, options, said) -> None:
    algorithm = SNRSelectiveMerge(**options)
    with pytest.raises(UserError, match=said):
        algorithm.check_pool(BaseModelPool(pool))


def test_a_comparison_of_experts_takes_two(base, experts) -> None:
    with pytest.raises(UserError, match="the pool has only one"):
        merge({"_pretrained_": base, "a": experts["a"]}, rank_by="similarity")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["_pretrained_"], "merges experts, and the pool has none"),
        ([], "merges experts, and the pool has none"),
        (["a", "b"], "needs a base, and the pool has only a, b"),
    ],
)
def test_a_base_and_an_expert_are_needed(pool, names, said) -> None:
    with pytest.raises(UserError, match=said):
        merge({name: pool[name] for name in names})
