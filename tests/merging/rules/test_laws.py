"""Laws that every rule keeps, on a real network and on single layers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fusion.merging.rule import MatrixRule, Need, Rule, mean_of_experts, merge_tensor
from fusion.merging.rules import (
    EMR,
    PCB,
    TSVM,
    WUDI,
    ConsensusTA,
    Dare,
    Fisher,
    IsoC,
    IsoCTS,
    LiNeS,
    MagMax,
    Mean,
    ModelStock,
    OwnTensors,
    RegMean,
    Slerp,
    TaskArithmetic,
    Ties,
    __all__,
)

RULES: dict[str, Rule] = {
    "Mean": Mean(),
    "Slerp": Slerp(),
    "TaskArithmetic": TaskArithmetic(),
    "Ties": Ties(),
    "Ties-tensor": Ties(scope="tensor"),
    "Dare": Dare(density=0.5),
    "Dare-TSVM": Dare(rule=TSVM(), density=0.5),
    "MagMax": MagMax(),
    "PCB": PCB(),
    "ModelStock": ModelStock(),
    "ConsensusTA": ConsensusTA(),
    "EMR": EMR(),
    "LiNeS": LiNeS(),
    "LiNeS-RegMean": LiNeS(rule=RegMean(), alpha=0.5),
    "OwnTensors": OwnTensors(),
    "TSVM": TSVM(),
    "IsoC": IsoC(),
    "IsoCTS": IsoCTS(),
    "WUDI": WUDI(),
    "WUDI-Adam": WUDI(iterations=5),
    "Fisher": Fisher(),
    "RegMean": RegMean(),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

# n copies of an expert merge to the expert, under these options.
KEEPS_COPIES = {
    Mean(): "bits",
    OwnTensors(): "bits",
    Slerp(): "bits",
    Fisher(): "bits",
    RegMean(): "bits",
    TaskArithmetic(scale=1 / 3): "close",  # the sum, divided by n
    LiNeS(rule=TaskArithmetic(scale=1 / 3), alpha=1.0, beta=0.0): "close",
    ConsensusTA(scale=1 / 3): "close",
    Ties(density=1.0): "close",  # nothing is trimmed
    Ties(density=1.0, scope="tensor"): "close",
    PCB(density=1.0): "close",
    Dare(rule=MagMax(scale=1.0), density=1.0): "close",
    MagMax(scale=1.0): "close",
    ModelStock(): "close",
    EMR(): "close",
    WUDI(ridge=1e-9): "close",  # without the pull towards the sum
}
# TSVM keeps the leading components of the change, IsoC and IsoCTS flatten its spectrum.
CHANGES_COPIES = {TSVM, IsoC, IsoCTS}


def test_every_rule_is_here() -> None:
    """LeastSquares reads what other layers return: its laws are in test_sequential.py."""
    assert {type(rule).__name__ for rule in RULES.values()} == set(__all__) - {"LeastSquares"}
    assert {type(rule) for rule in KEEPS_COPIES} | CHANGES_COPIES == set(map(type, RULES.values()))


@rules
def test_copies_of_the_base_merge_to_the_base(rule, base, merge_network) -> None:
    copies = dict.fromkeys("abc", base)
    for key, tensor in merge_network(rule, base, copies).items():
        assert torch.equal(tensor, base.state_dict()[key]), key


@pytest.mark.parametrize(("rule", "how"), KEEPS_COPIES.items(), ids=str)
def test_copies_of_an_expert_merge_to_the_expert(rule, how, base, peers, merge_network) -> None:
    expert = peers["p1"]
    merged = merge_network(rule, base, dict.fromkeys("abc", expert))
    for key, parameter in expert.named_parameters():
        if how == "bits":  # though the statistics differ from copy to copy
            assert torch.equal(merged[key], parameter), key
        else:
            assert_close(merged[key], parameter.detach(), rtol=1e-4, atol=1e-5)


@rules
def test_all_parameters_are_merged_in_their_shape_and_precision(rule, pieces, merge_all) -> None:
    before = [(piece.experts.clone(), piece.base.clone()) for piece in pieces]
    merged = merge_all(rule, pieces)
    for piece, (experts, base) in zip(pieces, before, strict=True):
        assert merged[piece.key].shape == base.shape
        assert merged[piece.key].dtype == torch.float32
        assert merged[piece.key].isfinite().all()
        assert torch.equal(piece.experts, experts), "an operand was changed"
        assert torch.equal(piece.base, base), "an operand was changed"
    assert any(not torch.equal(merged[piece.key], piece.base) for piece in pieces)


@rules
def test_the_order_of_experts_does_not_matter(rule, base, peers, merge_network) -> None:
    shares = (0.5, 0.3, 0.2)
    merged = merge_network(rule, base, peers, shares=shares)
    turned = dict(reversed(peers.items()))
    other = merge_network(rule, base, turned, shares=shares[::-1])
    for key in merged:
        assert_close(merged[key], other[key], rtol=1e-4, atol=1e-5)


@rules
def test_equal_shares_are_equal_shares(rule, pieces, merge_all) -> None:
    """Shares enter by their ratio to 1/n, not by their sum."""
    tripled = [replace(piece, shares=(1 / 3, 1 / 3, 1 - 2 / 3)) for piece in pieces]
    merged, other = merge_all(rule, pieces), merge_all(rule, tripled)
    for key in merged:
        assert_close(merged[key], other[key], rtol=1e-4, atol=1e-5)


# Where the sum is meant, it is divided by n here: relative shares keep its size.
COUNTS_COPIES = (
    Mean(),
    Slerp(),
    TaskArithmetic(scale=1 / 3),
    Ties(density=1.0),
    Ties(density=0.5, scope="tensor"),
    EMR(),
    Fisher(),
    RegMean(),
)


@pytest.mark.parametrize("rule", COUNTS_COPIES, ids=str)
def test_a_share_counts_as_copies(rule, base, peers, merge_network) -> None:
    a, b = peers["p1"], peers["p2"]
    # the names say which data an expert has: copies have the same
    other = merge_network(rule, base, {"a": a, "b": b}, shares=(2 / 3, 1 / 3))
    if isinstance(rule, TaskArithmetic):
        rule = TaskArithmetic(scale=rule.scale * 2 / 3)
    copies = merge_network(rule, base, {"a": a, "a ": a, "b": b})
    for key in copies:
        assert_close(copies[key], other[key], rtol=1e-4, atol=1e-5)


# What DARE drops depends on positions.
ORDERLESS = {name: rule for name, rule in RULES.items() if not isinstance(rule, Dare)}


@pytest.mark.parametrize("rule", ORDERLESS.values(), ids=ORDERLESS)
def test_units_may_be_reordered(rule, normal) -> None:
    """Merging commutes with a permutation of outputs and inputs, the same in all models."""
    rows, columns = torch.randperm(12), torch.randperm(20)
    base, experts = normal(12, 20, of="base"), normal(3, 12, 20, of="experts")
    fisher = normal(3, 12, 20, of="F").square()
    inputs = normal(3, 1, 50, 21, of="x").double()
    gram, augmented = inputs.mT @ inputs, torch.cat([columns, torch.tensor([20])])
    merged = merge_tensor(rule, list(experts), base, statistics={"fisher": fisher, "gram": gram})
    turned = merge_tensor(
        rule,
        list(experts[:, rows][:, :, columns]),
        base[rows][:, columns],
        statistics={
            "fisher": fisher[:, rows][:, :, columns],
            "gram": gram[:, :, augmented][..., augmented],
        },
    )
    assert_close(turned, merged[rows][:, columns], rtol=1e-4, atol=1e-5)


ELEMENTWISE = {name: rule for name, rule in RULES.items() if rule.elementwise}


@pytest.mark.parametrize("rule", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_rules_may_merge_in_parts(rule, pieces, walk) -> None:
    plan = rule.prepare(walk(pieces))
    for piece in pieces:
        piece = replace(piece, plan=plan)
        whole = rule.merge(piece).flatten()
        cuts = [0, 3, whole.numel() // 2, whole.numel()]
        parts = []
        for start, stop in itertools.pairwise(cuts):
            part = replace(
                piece,
                start=start,
                base=piece.base.flatten()[start:stop],
                experts=piece.experts.flatten(1)[:, start:stop],
                statistics={"fisher": piece.statistics["fisher"].flatten(1)[:, start:stop]},
            )
            parts.append(rule.merge(part))
        assert torch.equal(torch.cat(parts), whole), piece.key


@rules
def test_the_number_of_threads_does_not_matter(rule, normal) -> None:
    # as large as torch splits between two threads
    base, experts = normal(130, 300, of="base"), normal(3, 130, 300, of="experts")
    inputs = normal(3, 1, 30, 301, of="x").double()
    statistics = {"fisher": experts.square(), "gram": inputs.mT @ inputs}
    threads = torch.get_num_threads()
    merged = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            merged.append(merge_tensor(rule, list(experts), base, statistics=statistics))
    finally:
        torch.set_num_threads(threads)
    if rule.elementwise and not isinstance(rule, PCB | EMR | Fisher | LiNeS):  # these have sums
        assert torch.equal(*merged)
    else:
        assert_close(*merged, rtol=1e-5, atol=1e-5)


@rules
def test_half_precision_is_widened_and_double_is_kept(rule, normal) -> None:
    base, experts = normal(8, 12, of="base").half(), normal(3, 8, 12, of="experts").half()
    inputs = normal(3, 1, 30, 13, of="x").double()
    statistics = {"fisher": experts.float().square(), "gram": inputs.mT @ inputs}
    merged = merge_tensor(rule, list(experts), base, statistics=statistics)
    widened = merge_tensor(rule, list(experts.float()), base.float(), statistics=statistics)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, widened)
    double = merge_tensor(rule, list(experts.double()), base.double(), statistics=statistics)
    assert double.dtype == torch.float64
    assert_close(double.float(), merged, rtol=1e-4, atol=1e-5)


@rules
def test_the_global_generator_is_left_alone(rule, pieces, merge_all) -> None:
    state = torch.get_rng_state()
    merge_all(rule, pieces)
    assert torch.equal(torch.get_rng_state(), state)


@rules
def test_a_rule_that_uses_the_base_says_so(rule, pieces, merge_all) -> None:
    without = [replace(piece, base=None) for piece in pieces]
    if Need.BASE in rule.needs:
        with pytest.raises(ValueError, match="no base"):
            merge_all(rule, without)
    else:
        merged = merge_all(rule, pieces)
        for key, tensor in merge_all(rule, without).items():
            assert torch.equal(tensor, merged[key])


@rules
def test_a_rule_that_reads_statistics_says_so(rule, pieces, merge_all) -> None:
    allowed = [
        replace(
            piece, statistics={k: v for k, v in piece.statistics.items() if k in rule.statistics}
        )
        for piece in pieces
    ]
    merged, other = merge_all(rule, pieces), merge_all(rule, allowed)
    for key in merged:
        assert torch.equal(merged[key], other[key])


MATRIX_RULES = {name: rule for name, rule in RULES.items() if isinstance(rule, MatrixRule)}


@pytest.mark.parametrize("rule", MATRIX_RULES.values(), ids=MATRIX_RULES)
def test_what_is_no_matrix_becomes_the_mean(rule, pieces, merge_all) -> None:
    merged = merge_all(rule, pieces)
    norms = [piece for piece in pieces if not piece.is_matrix]
    assert len(norms) > 10
    for piece in norms:
        assert torch.equal(merged[piece.key], mean_of_experts(piece))


PER_GROUP = {**MATRIX_RULES, "RegMean": RegMean()}
per_group = pytest.mark.parametrize("rule", PER_GROUP.values(), ids=PER_GROUP)


@per_group
def test_a_grouped_convolution_is_merged_group_by_group(rule, normal, gram) -> None:
    base, experts = normal(12, 5, 3, 3, of="base"), normal(3, 12, 5, 3, 3, of="experts")
    grams = torch.stack([gram(f"{i}", 2, 45) for i in range(3)])
    kind = {"kind": "conv"}
    merged = merge_tensor(rule, list(experts), base, groups=2, statistics={"gram": grams}, **kind)
    for group in range(2):
        part = slice(6 * group, 6 * group + 6)
        single = merge_tensor(
            rule,
            list(experts[:, part]),
            base[part],
            statistics={"gram": grams[:, group : group + 1]},
            **kind,
        )
        assert_close(merged[part], single, rtol=1e-4, atol=1e-5)


@per_group
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_merged_like_its_convolution(
    rule, groups, normal, gram
) -> None:
    # (out, in/g, k, k) and the transposed (in, out/g, k, k) of the same matrices
    base, experts = (
        normal(12, 10 // groups, 2, 3, of="b"),
        normal(3, 12, 10 // groups, 2, 3, of="e"),
    )
    grams = torch.stack([gram(f"{i}", groups, 60 // groups) for i in range(3)])
    options = {"groups": groups, "statistics": {"gram": grams}}

    def turn(weight):
        split = weight.unflatten(-4, (groups, 12 // groups))
        return split.transpose(-4, -3).flatten(-5, -4).contiguous()

    merged = merge_tensor(rule, list(experts), base, kind="conv", **options)
    turned = merge_tensor(rule, list(turn(experts)), turn(base), kind="conv_transpose", **options)
    assert_close(turned, turn(merged), rtol=1e-4, atol=1e-5)


@per_group
def test_depthwise_kernels_are_vectors(rule, normal) -> None:
    base, experts = normal(6, 1, 3, 3, of="base"), normal(3, 6, 1, 3, 3, of="experts")
    merged = merge_tensor(rule, list(experts), base, kind="conv", groups=6)
    assert_close(merged, experts.mean(0))
