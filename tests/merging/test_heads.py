"""Heads are merged where experts share their classes, never because their shapes agree."""

from __future__ import annotations

import pytest
import torch

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.merging.heads import merged_heads, plan_heads, union_rows, union_space
from fusion.modelpool import BaseModelPool

FIVE = ("ant", "bee", "cat", "dog", "elk")
OTHERS = ("fir", "oak", "elm", "ash", "yew")
BOTH = (*FIVE, *OTHERS)


def pool(base, first, second, *, of_base=BOTH, **options) -> BaseModelPool:
    classes = {"_pretrained_": of_base, "a": first, "b": second}
    return BaseModelPool(
        {"_pretrained_": base("base", of_base), "a": base("a", first), "b": base("b", second)},
        classes={name: own for name, own in classes.items() if own is not None},
        **options,
    )


@pytest.fixture
def of_size(net):
    """The maker of a network with one output for each class."""
    seeds = {"base": 0, "a": 1, "b": 2}
    return lambda name, classes: net(len(classes or FIVE), seed=seeds[name])


def test_heads_of_one_label_space_are_layers_like_the_others(of_size) -> None:
    plan = plan_heads(pool(of_size, BOTH, BOTH))
    assert (plan.kind, plan.base_shares) == ("merged", True)
    assert plan.labels is not None
    assert plan.labels.names == BOTH


def test_heads_of_parts_of_the_bases_classes_leave_it_the_bases(of_size) -> None:
    plan = plan_heads(pool(of_size, FIVE, OTHERS))
    assert plan.kind == "pretrained"
    assert plan.labels is not None
    assert plan.labels.names == BOTH


def test_heads_of_equal_size_and_other_meaning_are_never_merged(of_size) -> None:
    given = pool(of_size, FIVE, OTHERS, of_base=FIVE)
    plan = plan_heads(given)
    assert plan.kind == "tasks"
    assert plan.assumed == ()
    experts = {name: dict(given.tensors(name)) for name in given}
    found = merged_heads(plan, given.head, None, experts, given)
    assert list(found) == ["a", "b"]
    for name in "ab":
        assert torch.equal(found[name]["linear.weight"], experts[name]["linear.weight"])


@pytest.mark.parametrize("second", [("cat", "dog", "fir", "oak", "elm"), tuple(reversed(FIVE))])
def test_overlapping_or_reordered_classes_are_another_label_space(of_size, second) -> None:
    given = pool(of_size, FIVE, second, of_base=OTHERS)
    assert plan_heads(given).kind == "tasks"


def test_experts_that_share_their_classes_share_their_head(of_size, net) -> None:
    models = {"a": net(5, seed=1), "b": net(5, seed=2), "c": net(5, seed=3)}
    given = BaseModelPool(models, classes={"a": FIVE, "b": FIVE, "c": OTHERS})
    plan = plan_heads(given)
    assert plan.groups == (("a", "b"), ("c",))
    found = merged_heads(plan, given.head, None, {n: dict(given.tensors(n)) for n in given}, given)
    assert found["a"] is found["b"]
    mean = (models["a"].linear.bias + models["b"].linear.bias) / 2
    torch.testing.assert_close(found["a"]["linear.bias"], mean)
    assert torch.equal(found["c"]["linear.bias"], models["c"].linear.bias)


def test_classes_that_nobody_knows_are_assumed_by_shape(net) -> None:
    alike = BaseModelPool({"_pretrained_": net(5), "a": net(5, seed=1), "b": net(5, seed=2)})
    assert plan_heads(alike).kind == "merged"
    assert plan_heads(alike).assumed == ("a", "b")
    apart = BaseModelPool({"_pretrained_": net(5), "a": net(4, seed=1), "b": net(3, seed=2)})
    assert plan_heads(apart).kind == "tasks"


def test_one_who_is_not_known_is_taken_for_the_known_of_its_shape(net) -> None:
    models = {"_pretrained_": net(5), "a": net(5, seed=1), "b": net(5, seed=2)}
    plan = plan_heads(BaseModelPool(models, classes={"a": FIVE}))
    assert plan.kind == "merged"
    assert plan.labels is not None
    assert plan.labels.names == FIVE
    two = plan_heads(BaseModelPool(models, classes={"a": FIVE, "b": OTHERS}))
    assert two.kind == "tasks"


def test_named_tasks_are_different_whatever_their_heads_shapes(net) -> None:
    models = {"_pretrained_": net(5), "a": net(5, seed=1), "b": net(5, seed=2)}
    given = BaseModelPool(models, tasks={"a": "pets", "b": "flowers"})
    assert plan_heads(given).kind == "tasks"
    labels = {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 3, 4]}
    both = BaseModelPool(models, classes=labels, tasks={"a": "pets", "b": "flowers"})
    assert plan_heads(both).kind == "tasks"
    experts = {name: dict(both.tensors(name)) for name in both}
    found = merged_heads(plan_heads(both), both.head, None, experts, both)
    assert list(found) == ["pets", "flowers"]


def test_experts_of_one_task_must_share_their_classes(of_size) -> None:
    given = pool(of_size, FIVE, OTHERS, of_base=FIVE, tasks={"a": "t", "b": "t"})
    experts = {name: dict(given.tensors(name)) for name in given}
    with pytest.raises(UserError, match="task 't': a and b have different classes"):
        merged_heads(plan_heads(given), given.head, None, experts, given)


def test_union_takes_rows_by_class_whatever_the_shapes(of_size) -> None:
    given = pool(of_size, FIVE, OTHERS, of_base=FIVE)  # three heads of five outputs
    plan = plan_heads(given, "union")
    assert plan.labels is not None
    assert plan.labels.names == BOTH
    experts = {name: dict(given.tensors(name)) for name in given}
    base = dict(given.tensors("_pretrained_"))
    rows = merged_heads(plan, given.head, base, experts, given)[""]["linear.weight"]
    assert torch.equal(rows[:5], experts["a"]["linear.weight"])
    assert torch.equal(rows[5:], experts["b"]["linear.weight"])


def test_rows_go_where_their_classes_say() -> None:
    base = torch.arange(4.0)[:, None]
    a, b = torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0], [21.0]])
    space = LabelSpace.of
    united = union_rows(
        (base, space([0, 1, 2, 3])),
        [(a, space([2, 0])), (b, space([0, 3]))],
        space([0, 1, 2, 3]),
    )
    assert united.flatten().tolist() == [(11 + 20) / 2, 1.0, 10.0, 21.0]


def test_the_classes_of_a_union_are_the_bases_where_it_knows_them_all(base) -> None:
    def labels(own: dict[str, list[int]]) -> tuple[int, ...] | None:
        given = BaseModelPool(dict.fromkeys(["_pretrained_", "a", "b"], base), classes=own)
        return union_space(given).labels

    ten = list(range(10))
    assert labels({"_pretrained_": ten, "a": [7, 2], "b": [3]}) == tuple(ten)
    assert labels({"_pretrained_": ten, "a": [12, 2], "b": [3]}) == (2, 3, 12)
    assert labels({"_pretrained_": [4, 3], "a": [3], "b": [4]}) == (4, 3)


def test_a_union_needs_the_classes_of_every_expert(base) -> None:
    given = BaseModelPool({"_pretrained_": base, "a": base, "b": base}, classes={"a": [1]})
    with pytest.raises(UserError, match="those of b are not known"):
        plan_heads(given, "union")


def test_a_kept_head_needs_a_base(net) -> None:
    given = BaseModelPool([net(5), net(4)])
    with pytest.raises(UserError, match="keeps the base's head, and the pool has no"):
        plan_heads(given, "pretrained")
