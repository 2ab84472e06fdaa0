from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusion
from fusion.data import ClassSubset, ImageTensors, label_space
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool import BaseModelPool, Checkpoint, as_modelpool
from fusion.models import CifarResNet

SPEC = {
    "_target_": "fusion.models.CifarResNet",
    "depth": 8,
    "num_classes": 10,
    "in_channels": 1,
    "width": 0.5,
}


class CountingFactory:
    """Makes a network and counts how often."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.made = 0

    def __call__(self) -> nn.Module:
        self.made += 1
        return self.network


def test_the_two_import_paths_are_one_class() -> None:
    assert fusion.BaseModelPool is BaseModelPool


def test_every_kind_of_member_becomes_a_network(base, tmp_path) -> None:
    BaseModelPool({"_pretrained_": SPEC}).save_model(base, tmp_path / "whole.safetensors")
    torch.save(base.state_dict(), tmp_path / "pickled.pt")
    pool = BaseModelPool(
        {
            "module": base,
            "mapping": SPEC,
            "callable": lambda: CifarResNet(8, 10, in_channels=1, width=0.5),
            "safetensors": Checkpoint(tmp_path / "whole.safetensors"),
            "pickled": Checkpoint(tmp_path / "pickled.pt", SPEC),
            "mapping of a checkpoint": {
                "_target_": "fusion.modelpool.Checkpoint",
                "path": str(tmp_path / "pickled.pt"),
                "architecture": SPEC,
            },
        }
    )
    images = torch.rand(2, 1, 8, 8)
    for name, model in pool.named_models():
        assert model.eval()(images).shape == (2, 10), name
    for name in ("module", "safetensors", "pickled", "mapping of a checkpoint"):
        assert torch.equal(pool.load_model(name).eval()(images), base(images)), name


def test_nothing_is_built_before_it_is_asked_for(base) -> None:
    factory = CountingFactory(base)
    mapping = {"_target_": f"{__name__}.missing_on_purpose"}
    pool = BaseModelPool({"_pretrained_": factory, "other": factory})
    assert factory.made == 0
    models = pool.models()
    assert factory.made == 0
    next(models)
    assert factory.made == 1  # one at a time
    with pytest.raises(UserError, match="missing_on_purpose"):
        pool.add_model("never", mapping)


def test_what_is_loaded_is_a_copy(base, equal, net) -> None:
    pool = BaseModelPool({"_pretrained_": base})
    with torch.no_grad():
        for parameter in pool.load_pretrained_model().parameters():
            parameter.zero_()
    assert equal(base, net())
    assert equal(pool.load_pretrained_model(), base)


@pytest.mark.parametrize(
    "names", [[], ["_pretrained_"], ["a"], ["_pretrained_", "b", "a"], ["b", "_joint_", "a"]]
)
def test_length_iteration_and_membership_are_about_the_experts(names, base) -> None:
    pool = BaseModelPool(dict.fromkeys(names, base))
    assert list(pool) == pool.model_names == [name for name in names if name in ("a", "b")]
    assert len(pool) == len(list(pool))
    for name in ("a", "b", "c", "_pretrained_", "_joint_", 1, None):
        assert (name in pool) == (name in list(pool))
    assert bool(pool) == bool(pool.all_model_names)  # a base alone can be measured and saved
    assert pool.all_model_names == names


def test_special_names_are_not_experts(base) -> None:
    pool = BaseModelPool({"_pretrained_": base, "_joint_": base, "b": base, "a": base})
    assert pool.model_names == list(pool) == ["b", "a"]
    assert pool.all_model_names == ["_pretrained_", "_joint_", "b", "a"]
    assert pool.has_pretrained
    assert [name for name, _ in pool.named_models()] == ["b", "a"]
    assert BaseModelPool.is_special_model("_x_")
    assert not any(map(BaseModelPool.is_special_model, ("x", "_x", "x_", "__")))


def test_a_pool_of_only_a_base_is_not_nothing(base) -> None:
    assert BaseModelPool({"_pretrained_": base})
    assert not BaseModelPool({})


def test_pretrained_or_first(base, net, equal) -> None:
    other = net(seed=5)
    assert equal(BaseModelPool([other, base]).load_pretrained_or_first_model(), other)
    both = BaseModelPool({"x": other, "_pretrained_": base})
    assert equal(both.load_pretrained_or_first_model(), base)
    with pytest.raises(UserError, match="the pool is empty"):
        BaseModelPool({}).load_pretrained_or_first_model()
    with pytest.raises(UserError, match="add a member named '_pretrained_'"):
        BaseModelPool([other]).load_pretrained_model()


def test_a_list_gets_numbers_as_names(base) -> None:
    assert BaseModelPool([base, base]).model_names == ["0", "1"]


def test_an_unknown_name_is_told_with_the_nearest(base) -> None:
    pool = BaseModelPool({"expert_a": base})
    with pytest.raises(UserError, match="no model 'expert_aa'; did you mean 'expert_a'"):
        pool.load_model("expert_aa")


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (3, "is a int; a pool takes"),
        ({"depth": 8}, "no '_target_' .it has 'depth'"),
        ({"_target_": "fusion.models.CifarResnet"}, "did you mean 'CifarResNet'"),
    ],
)
def test_what_is_no_member_is_refused_at_once(member, said) -> None:
    with pytest.raises(UserError, match=said):
        BaseModelPool({"x": member})


def test_a_misspelt_option_of_a_member_is_told() -> None:
    pool = BaseModelPool({"_pretrained_": {**SPEC, "dept": 8}})
    with pytest.raises(UserError, match="no option 'dept'; did you mean 'depth'"):
        pool.preflight()


def test_a_factory_that_makes_no_network_is_told() -> None:
    with pytest.raises(UserError, match="returned a Counter; expected a torch"):
        BaseModelPool({"x": {"_target_": "collections.Counter"}}).load_model("x")


def test_models_can_be_added_once(base) -> None:
    pool = BaseModelPool({"_pretrained_": base})
    pool.add_model("late", base)
    assert pool.model_names == ["late"]
    with pytest.raises(UserError, match="already has a model 'late'"):
        pool.add_model("late", base)
    with pytest.raises(UserError, match="without '/'"):
        pool.add_model("a/b", base)


def test_a_saved_model_brings_its_architecture_and_classes(base, tmp_path, equal) -> None:
    pool = BaseModelPool({"_pretrained_": SPEC}, classes={"_pretrained_": range(10)})
    labels = pool.labels("_pretrained_")
    pool.save_model(base, tmp_path / "m.safetensors", labels=labels, metadata={"note": "mine"})
    again = BaseModelPool({"m": Checkpoint(tmp_path / "m.safetensors")})
    assert equal(again.load_model("m"), base)
    assert again.labels("m") == LabelSpace.of(list(range(10)))


def test_a_head_of_another_size_comes_back_with_its_size(net, tmp_path, equal) -> None:
    pool = BaseModelPool({"_pretrained_": SPEC})
    pool.save_model(net(4), tmp_path / "m.safetensors")
    again = Checkpoint(tmp_path / "m.safetensors").build()
    assert again.linear.out_features == 4
    assert equal(again, net(4))


def test_a_network_that_is_not_finite_is_not_written(base, tmp_path) -> None:
    sick = copy.deepcopy(base)
    with torch.no_grad():
        sick.bn1.running_var[0] = torch.nan
    with pytest.raises(UserError, match=r"'bn1\.running_var' has entries that are NaN"):
        BaseModelPool([base]).save_model(sick, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_datasets_are_built_when_asked_for_and_once(base) -> None:
    digits = {"_target_": "fusion.data.digits", "split": "val"}
    pool = BaseModelPool(
        {"d": base, "e": base},
        train_datasets={"d": digits},
        val_datasets={"d": digits},
        test_datasets={"d": digits, "e": {"_target_": "fusion.data.digits", "split": "tset"}},
    )
    assert isinstance(pool.load_train_dataset("d"), ImageTensors)
    assert pool.load_val_dataset("d") is pool.load_val_dataset("d")
    assert pool.load_val_dataset("d") is pool.load_train_dataset("d")  # one description, one set
    assert digits == {"_target_": "fusion.data.digits", "split": "val"}
    with pytest.raises(UserError, match="did you mean 'test'"):
        pool.load_test_dataset("e")
    with pytest.raises(UserError, match="no train data of 'e'"):
        pool.load_train_dataset("e")


def test_data_belong_to_a_member_and_the_bases_are_the_default(base, train_digits) -> None:
    a = ClassSubset(train_digits, [0, 1])
    given = {"a": a, "_pretrained_": train_digits}
    pool = BaseModelPool({"a": base, "b": base}, train_datasets=given)
    assert pool.dataset("a") is a
    assert pool.dataset("b") is train_digits
    assert pool.images() == {"a": a, "b": train_digits}
    assert pool.images(["b"]) is train_digits
    assert not pool.has_data("test")
    with pytest.raises(UserError, match="train_datasets: the pool has no model 'c'"):
        BaseModelPool({"a": base}, train_datasets={"c": a})


def test_data_that_all_experts_share_are_one_set(base, train_digits) -> None:
    pool = BaseModelPool({"a": base, "b": base}, train_datasets={"_pretrained_": train_digits})
    assert pool.images() is train_digits


def test_classes_are_given_for_members_that_are_there(base) -> None:
    pool = BaseModelPool({"a": base, "b": base}, classes={"a": [3, 1]})
    assert pool.labels("a") == LabelSpace.of([3, 1])
    assert pool.labels("b") is None
    with pytest.raises(UserError, match="classes: the pool has no model 'b'"):
        BaseModelPool({"a": base}, classes={"b": [3, 1]})


def test_a_member_has_the_classes_of_its_own_data(base, train_digits) -> None:
    pool = BaseModelPool({"a": base, "b": base}, test_datasets={"a": train_digits})
    assert pool.labels("a") == label_space(train_digits)
    assert pool.labels("b") is None


def test_a_task_is_named_for_its_expert_unless_the_pool_says_otherwise(base) -> None:
    models = {"_pretrained_": base, "a": base, "b": base, "c": base}
    pool = BaseModelPool(models, tasks={"a": "pets", "c": "pets"}, classes={"a": ["cat", "dog"]})
    assert pool.tasks == {"pets": ["a", "c"], "b": ["b"]}
    assert pool.labels("a").task == "pets"
    with pytest.raises(UserError, match="tasks: the pool has no model 'd'"):
        BaseModelPool(models, tasks={"d": "x"})


def test_the_head_may_be_named(base) -> None:
    assert set(BaseModelPool([base]).head.tensors) == {"linear.weight", "linear.bias"}
    named = BaseModelPool([base], head=["layer3", "linear"]).head
    assert "layer3.0.conv1.weight" in named
    with pytest.raises(UserError, match="called 'liner'; did you mean 'linear'"):
        BaseModelPool([base], head=["liner"]).head  # noqa: B018


def test_a_tied_network_keeps_its_tie(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 2, 3)
            self.second = nn.Conv2d(2, 2, 3)
            self.second.weight = self.first.weight

    tied = Tied()
    pool = BaseModelPool({"a": tied, "_pretrained_": Tied})
    for loaded in (pool.load_model("a"), pool.architecture("a"), pool.architecture("_pretrained_")):
        assert loaded.first.weight is loaded.second.weight
    pool.save_model(tied, tmp_path / "t.safetensors")
    again = Checkpoint(tmp_path / "t.safetensors", Tied).build()
    assert again.first.weight is again.second.weight
    assert torch.equal(again.first.weight, tied.first.weight)


def test_as_modelpool_takes_what_algorithms_take(base) -> None:
    pool = BaseModelPool([base])
    assert as_modelpool(pool) is pool
    assert as_modelpool({"_pretrained_": base}).has_pretrained
    assert as_modelpool([base, base]).model_names == ["0", "1"]
    assert as_modelpool(base).all_model_names == ["_pretrained_"]
    with pytest.raises(UserError, match="not a int"):
        as_modelpool(3)


def test_only_leaves_out_the_other_experts_with_their_data_and_keeps_the_base(base) -> None:
    def made() -> CifarResNet:
        return copy.deepcopy(base)

    models = {"_pretrained_": made, "a": made, "b": made, "c": made}
    data = {name: {"_target_": "fusion.data.digits"} for name in "abc"}
    options = {"train_datasets": data, "classes": {"b": list(range(10))}, "tasks": {"b": "digit"}}
    pool = BaseModelPool(models, **options, only=["c", "a"])
    assert pool.all_model_names == ["_pretrained_", "a", "c"]
    assert not pool.has_data("train", "b")
    assert pool.tasks == {"a": ["a"], "c": ["c"]}
    with pytest.raises(UserError, match=r"only=_pretrained_.*there are a, b, c"):
        BaseModelPool(models, only=["_pretrained_"])
    with pytest.raises(UserError, match="no model 'd'"):
        BaseModelPool(models, train_datasets={"d": data["a"]}, only=["a"])
