"""Experts whose units stand in another order are brought back before they are merged."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from fusion.alignment import apply_permutation, permutation_spec, random_permutation
from fusion.errors import UserError
from fusion.method import GitReBasin, SNRSelectiveMerge
from fusion.modelpool import BaseModelPool

IMAGE = torch.zeros(1, 1, 8, 8)


def shuffled(model: nn.Module, seed: int) -> nn.Module:
    spec = permutation_spec(model, IMAGE)
    return apply_permutation(model, spec, random_permutation(spec, seed=seed))


@pytest.fixture
def strangers(peers):
    """The experts of one head size, each with its units in an order of its own."""
    return {name: shuffled(expert, seed) for seed, (name, expert) in enumerate(peers.items())}


def test_a_merge_of_shuffled_experts_is_that_of_the_experts(base, peers, strangers, equal):
    merge = SNRSelectiveMerge(top_p=1.0, batch_norm="merge", plot=False)
    known = merge.run({"_pretrained_": base, **peers})
    assert not any(told["changed"] for told in merge.report["alignment"].values())
    found = merge.run({"_pretrained_": base, **strangers})
    assert equal(known, found)
    for told in merge.report["alignment"].values():
        assert told["changed"]
        assert told["gain"] > 0
        assert told["cycle_consistency"] == 0


def test_without_alignment_the_same_merge_is_another(base, peers, strangers, equal):
    merge = SNRSelectiveMerge(top_p=1.0, batch_norm="merge", align=False, plot=False)
    known = merge.run({"_pretrained_": base, **peers})
    assert "alignment" not in merge.report
    assert not equal(known, merge.run({"_pretrained_": base, **strangers}))


@pytest.mark.parametrize("head", ["pretrained", "tasks"])
def test_experts_with_heads_of_their_own_are_aligned_too(base, experts, equal, head):
    merge = SNRSelectiveMerge(top_p=1.0, head=head, batch_norm="merge", plot=False)
    known = merge.run({"_pretrained_": base, **experts})
    shuffles = {name: shuffled(expert, 3) for name, expert in experts.items()}
    assert equal(known, merge.run({"_pretrained_": base, **shuffles}))


def test_the_table_and_the_figure_say_what_moved(base, strangers, tmp_path):
    merge = SNRSelectiveMerge()
    merge.output_path = tmp_path
    merge.run({"_pretrained_": base, **strangers})
    table = pd.read_csv(tmp_path / "alignment.csv")
    assert set(table["expert"]) == set(strangers)
    assert table["moved"].sum() > 0
    assert (table["moved"] <= table["size"]).all()
    assert (tmp_path / "alignment.pdf").is_file()
    assert (tmp_path / "alignment.png").is_file()


class Branching(nn.Module):
    """Looks at its data before it decides: its graph cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x).mean((2, 3))
        return self.last(x if x.sum() > 0 else -x)


def test_a_network_that_cannot_be_traced_is_told_with_the_cure():
    net = Branching().eval()
    with pytest.raises(UserError, match="align=false"):
        SNRSelectiveMerge().run({"_pretrained_": net, "a": copy.deepcopy(net)})


@pytest.mark.parametrize("options", [{}, {"merge_many": True}])
def test_the_mean_of_shuffled_copies_computes_what_the_copy_computes(base, options, train_digits):
    pool = BaseModelPool({name: shuffled(base, seed) for seed, name in enumerate("abc")})
    merged = GitReBasin(batch_norm="merge", plot=False, **options).run(pool).eval()
    images = train_digits.normalise(train_digits.images[:64])
    with torch.no_grad():
        torch.testing.assert_close(merged(images), base(images), rtol=1e-4, atol=1e-4)


def test_merge_many_keeps_the_references_own_tensors_in_the_common_order(base, train_digits):
    images = train_digits.normalise(train_digits.images[:64])
    pool = BaseModelPool({name: shuffled(base, seed) for seed, name in enumerate("abc")})
    statistics = GitReBasin(batch_norm="pretrained", merge_many=True, plot=False).run(pool).eval()
    experts = {name: shuffled(base, seed) for seed, name in enumerate("abc")}
    for classes, expert in zip((4, 3, 2), experts.values(), strict=True):
        head = nn.Linear(expert.linear.in_features, classes)
        expert.linear = nn.Sequential(head, nn.BatchNorm1d(classes))
    base = copy.deepcopy(base)
    base.linear = nn.Sequential(base.linear, nn.BatchNorm1d(base.linear.out_features)).eval()
    pool = BaseModelPool({"_pretrained_": base, **experts})
    options = {"head": "pretrained", "batch_norm": "merge", "plot": False}
    head = GitReBasin(merge_many=True, **options).run(pool).eval()
    with torch.no_grad():
        for merged in (statistics, head):
            torch.testing.assert_close(merged(images), base(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_norm", ["recalibrate", "repair"])
def test_members_of_different_precision(base, peers, train_digits, batch_norm):
    members = {name: copy.deepcopy(peer).bfloat16() for name, peer in peers.items()}
    wide = {name: copy.deepcopy(peer) for name, peer in peers.items()}
    images = train_digits.normalise(train_digits.images[:200])
    found = []
    for pretrained, experts in ((base, wide), (copy.deepcopy(base).double(), members)):
        pool = BaseModelPool(
            {"_pretrained_": pretrained, **experts}, train_datasets={"_pretrained_": train_digits}
        )
        merged = GitReBasin(batch_norm=batch_norm, calibration_images=500, plot=False).run(pool)
        with torch.no_grad():
            found.append(merged.eval().double()(images.double()))
    assert (found[0] - found[1]).norm() / found[0].norm() < 0.05  # bfloat16: 8 bits


def test_a_network_with_tensors_of_its_own_needs_no_example(base):
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.full((1, 1, 1, 1), 0.5)
            self.net = copy.deepcopy(base)

        def forward(self, x):
            return self.net(x - self.mean)

    nets = {name: Normalising().eval() for name in "ab"}
    GitReBasin(plot=False).run(nets)
    with pytest.raises(UserError, match=r"Branching cannot be traced.*if x\.sum"):
        GitReBasin(plot=False).run({name: Branching().eval() for name in "ab"})


def test_the_pretrained_model_is_the_reference_and_no_part_of_the_mean(base, peers, strangers):
    rebasin = GitReBasin(batch_norm="merge", plot=False)
    merged = rebasin.run({"_pretrained_": base, **strangers}).state_dict()
    for key, tensor in merged.items():
        if tensor.is_floating_point() and "running" not in key:
            mean = torch.stack([expert.state_dict()[key] for expert in peers.values()]).mean(0)
            torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)
    assert "mean without alignment" in rebasin.controls


def test_without_images_statistics_are_interpolated_or_those_of_the_mixture(peers):
    states = [peer.state_dict() for peer in peers.values()]
    mean = {key: torch.stack([s[key].float() for s in states]).mean(0) for key in states[0]}
    plain = GitReBasin(plot=False)
    statistics = plain.run(dict(peers)).state_dict()
    assert plain.report["batch_norm"] == "interpolate"
    mixture = GitReBasin(batch_norm="merge", plot=False).run(dict(peers)).state_dict()
    for key in (key for key in mean if "running" in key):
        torch.testing.assert_close(statistics[key], mean[key])
        if key.endswith("var"):
            means = torch.stack([s[key.replace("var", "mean")] for s in states])
            torch.testing.assert_close(mixture[key], mean[key] + means.var(0, correction=0))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"by": "weight"}, "did you mean 'weights'"),
        ({"interpolation": "ties"}, "interpolation is 'ties'; give lerp or slerp"),
        ({"by": "activations", "merge_many": True}, "choose by=weights"),
    ],
)
def test_options_without_meaning_are_refused(options, told):
    with pytest.raises(UserError, match=told):
        GitReBasin(**options)


def test_activations_need_images(base, peers):
    with pytest.raises(UserError, match="train_datasets"):
        GitReBasin(by="activations").run({"_pretrained_": base, **peers})


def test_activations_find_the_same_order(base, strangers, peers, train_digits):
    pool = BaseModelPool(
        {"_pretrained_": base, **strangers}, train_datasets={"_pretrained_": train_digits}
    )
    options = {"batch_norm": "pretrained", "calibration_images": 500, "plot": False}
    by_activations = GitReBasin(by="activations", **options).run(pool).state_dict()
    by_weights = GitReBasin(by="weights", **options).run(pool).state_dict()
    agree = [torch.allclose(by_activations[key], by_weights[key]) for key in by_weights]
    assert sum(agree) / len(agree) > 0.9


def test_activations_take_one_pass_of_each_network(base, strangers, train_digits, monkeypatch):
    """Without a base the first expert is the reference, and is not compared with itself."""
    from fusion.alignment import agreement

    runs, run = [], agreement.run_on
    monkeypatch.setattr(
        agreement, "run_on", lambda *given: (runs.append(len(given[1])), run(*given))
    )
    options = {"batch_norm": "interpolate", "calibration_images": 96, "plot": False}
    for base_too in ({"_pretrained_": base}, {}):
        pool = BaseModelPool(
            {**base_too, **strangers}, train_datasets=dict.fromkeys(strangers, train_digits)
        )
        runs.clear()
        merge = GitReBasin(by="activations", **options)
        merge.run(pool)
        assert sum(runs) == 96 * (len(strangers) + len(base_too))
        first = merge.report["alignment"][next(iter(strangers))]
        assert first["changed"] == bool(base_too)
