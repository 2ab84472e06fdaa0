"""A merge from file to file is the merge in memory, bit for bit, and so is its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.merging import Need, Rule, rules, streaming
from fusion.merging.members import LayerChoice
from fusion.merging.rules import (
    EMR,
    PCB,
    ConsensusTA,
    Dare,
    LiNeS,
    MagMax,
    Mean,
    Slerp,
    TaskArithmetic,
    Ties,
)
from fusion.method import Merge
from fusion.method.base import ResultFile
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.models import CifarResNet, MultiTaskNetwork
from fusion.weights import load_safetensors, save_safetensors
from fusion.weights.sums import CHUNK

ARCHITECTURE = {"_target_": "fusion.models.CifarResNet", "depth": 8, "in_channels": 1, "width": 0.5}
RULES: dict[str, Rule] = {
    "Mean": Mean(),
    "TaskArithmetic": TaskArithmetic(),
    "Ties": Ties(),
    "Dare": Dare(density=0.5),
    "Dare-Ties": Dare(rule=Ties(density=0.7), density=0.3),
    "MagMax": MagMax(),
    "PCB": PCB(),
    "ConsensusTA": ConsensusTA(),
    "ConsensusTA-tasks": ConsensusTA(per_task=True),
    "EMR": EMR(),
    "EMR-unified": EMR(per_task=False),
    "LiNeS": LiNeS(),
    "LiNeS-Dare": LiNeS(rule=Dare(density=0.5), beta=0.2),
}
METADATA = {"provenance": "a test"}


class Tied(nn.Module):
    """A convolution and its norm that run twice, a skip connection, a head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24))
        self.second = self.first
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("table", torch.arange(24.0).view(1, 24, 1, 1), persistent=False)
        self.fc = nn.Linear(24, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) + self.table
        x = x + self.scale * self.second(self.first(x).relu())
        return self.fc(x.mean((2, 3)))


def test_every_elementwise_rule_without_data_is_here() -> None:
    made = [getattr(rules, name)() for name in rules.__all__]
    data = {Need.IMAGES, Need.LABELS, Need.GRADIENTS}
    names = {type(r).__name__ for r in made if r.elementwise and not r.needs & data}
    assert {type(rule).__name__ for rule in RULES.values()} == names


@pytest.fixture
def written(tmp_path) -> Callable[..., BaseModelPool]:
    """Write networks to files, and return the pool of these."""

    def write(
        networks: Mapping[str, nn.Module], *, architecture: Any = None, **options: Any
    ) -> BaseModelPool:
        members = {}
        for name, network in networks.items():
            path = tmp_path / f"{name}.safetensors"
            save_safetensors(path, network.state_dict())
            outputs = list(network.state_dict().values())[-1].shape[0]
            members[name] = Checkpoint(path, architecture or {**ARCHITECTURE, "num_classes": outputs})
        return BaseModelPool(members, **options)

    return write


@pytest.fixture
def both(tmp_path, equal) -> Callable[..., tuple[Merge, nn.Module]]:
    """Merge a pool in memory and from file to file; the results and their files are equal."""

    def run(pool: BaseModelPool, rule: Rule, *, kind: type[Merge] = Merge, **options: Any):
        options = {"batch_norm": "merge", **options}
        dense = kind(rule=rule, streamed=False, **options)
        expected = dense.run(pool)
        pool.save_model(
            expected, tmp_path / "d.safetensors", labels=dense.result_labels(pool), metadata=METADATA
        )
        merge = kind(rule=rule, streamed=True, **options)
        merge.result_file = ResultFile(tmp_path / "s.safetensors", METADATA)
        model = merge.run(pool)
        assert merge.report == {**dense.report, "streamed": True}
        assert merge.record.written == tmp_path / "s.safetensors"
        assert equal(model, expected)
        assert merge.result_file.path.read_bytes() == (tmp_path / "d.safetensors").read_bytes()
        return merge, model

    return run


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("chunks", [1, 5], ids="blocks of {}".format)
def test_blocks_make_the_whole(rule, chunks, written, both, base, peers, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", chunks * CHUNK)  # the largest tensor has 9 chunks
    pool = written({"_pretrained_": base, **peers})
    both(pool, rule, weights=[0.5, 0.3, 0.2], seed=3)


@pytest.mark.parametrize("rule", [Mean(), Ties(), Dare(density=0.5), EMR()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("same", [True, False], ids=["architecture too", "files alone"])
def test_other_precisions(rule, dtype, same, written, both, base, peers) -> None:
    """Half precisions are widened, and the result has the precision of the base's network."""

    def make() -> nn.Module:
        return CifarResNet(8, 10, in_channels=1, width=0.5).to(dtype if same else torch.float32)

    networks = {name: n.to(dtype) for name, n in {"_pretrained_": base, **peers}.items()}
    networks["p2"].float()
    _, model = both(written(networks, architecture=make), rule)
    assert model.conv1.weight.dtype == (dtype if same else torch.float32)


@pytest.mark.parametrize("head", ["auto", "pretrained", "union"])
@pytest.mark.parametrize("rule", [TaskArithmetic(), EMR()], ids=repr)
def test_heads_of_several_tasks(rule, head, written, both, base, experts, peers) -> None:
    classes = {"a": list("0123"), "b": list("456789"), "p1": list("0123456789")}
    classes |= {"p2": classes["p1"], "_pretrained_": list("tuvwxyzabc")}
    if head == "union":
        classes["_pretrained_"] = classes["p1"]
    pool = written(
        {"_pretrained_": base, **experts, "p1": peers["p1"], "p2": peers["p2"]},
        classes=classes,
        tasks={"p1": "all", "p2": "all"},
    )
    merge, model = both(pool, rule, head=head)
    assert isinstance(model, MultiTaskNetwork) == (head == "auto" or isinstance(rule, EMR))
    for make in merge.controls.values():
        control = make()
        network = control.for_task("a") if isinstance(control, MultiTaskNetwork) else control
        assert torch.equal(network.conv1.weight, base.conv1.weight)


def test_a_common_head_of_another_shape_than_the_bases(written, both, base, net) -> None:
    experts = {f"e{seed}": net(4, seed=seed) for seed in (1, 2)}
    classes = {name: list("wxyz") for name in experts} | {"_pretrained_": list("0123456789")}
    _, model = both(written({"_pretrained_": base, **experts}, classes=classes), MagMax())
    assert model.linear.out_features == 4


@pytest.mark.parametrize("treatment", ["pretrained", "interpolate"])
def test_without_a_base(treatment, written, both, peers) -> None:
    both(written(peers), Mean(), batch_norm=treatment)


@pytest.mark.parametrize("rule", [TaskArithmetic(), Dare(density=0.5)], ids=repr)
def test_what_is_tied_stays_tied_and_constants_have_their_values(rule, written, both) -> None:
    networks = {}
    for seed, name in enumerate(("_pretrained_", "a", "b")):
        torch.manual_seed(seed)
        networks[name] = Tied()
        networks[name].first[1].running_mean.normal_()
    _, model = both(written(networks, architecture=Tied), rule)
    assert model.first is model.second
    assert torch.equal(model.table, networks["a"].table)
    model.eval()(torch.rand(2, 1, 8, 8))


class SomeLayers(Merge):
    """Merges two layers, each with shares of its own; the rest stays the base's."""

    def choose(self, members, plan) -> LayerChoice:
        shares = iter([(0.2, 0.3, 0.5), (1.0, 0.0, 0.0)])
        names = [layer.name for layer in members.layers][3:5]
        return LayerChoice({name: next(shares) for name in names})


def test_layers_that_are_not_chosen_are_copied(written, both, base, peers) -> None:
    pool = written({"_pretrained_": base, **peers})
    _, model = both(pool, Ties(), kind=SomeLayers)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, base.state_dict()[k])}
    assert {key.rpartition(".")[0] for key in changed} == {
        "layer1.0.bn2", "layer1.0.conv2", "layer2.0.bn1", "layer2.0.conv1",
    }  # fmt: skip


def test_files_of_torch_save_and_counters_that_a_file_lacks(tmp_path, both, base, peers) -> None:
    members = {}
    for name, network in {"_pretrained_": base, **peers}.items():
        members[name] = Checkpoint(tmp_path / f"{name}.pt", {**ARCHITECTURE, "num_classes": 10})
        state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
        torch.save({"state_dict": state}, tmp_path / f"{name}.pt")
    both(BaseModelPool(members), Ties())


@pytest.mark.parametrize("rule", [Mean(), Ties(), ConsensusTA()], ids=repr)
@pytest.mark.parametrize("where", ["merged", "kept", "statistics"])
@pytest.mark.parametrize("who", ["_pretrained_", "p2"])
def test_entries_that_are_not_finite_are_refused(rule, where, who, written, base, peers, tmp_path):
    key = {"merged": "layer3.0.conv2.weight", "kept": "linear.bias", "statistics": "bn1.running_var"}
    networks = {"_pretrained_": base, **peers}
    networks[who].state_dict()[key[where]].view(-1)[-1] = torch.nan if where == "kept" else torch.inf
    classes = {name: list("0123456789"[:: -1 if name == "p1" else 1]) for name in networks}
    messages = []
    for streamed in (False, True):
        merge = Merge(rule=rule, streamed=streamed, head="pretrained", batch_norm="pretrained")
        merge.result_file = ResultFile(tmp_path / "new" / "merged.safetensors")
        with pytest.raises(UserError) as error:
            merge.run(written(networks, classes=classes))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert f"'{who}': {key[where]} has 1 of" in messages[0]
    assert not list((tmp_path / "new").glob("*"))


def test_a_result_that_is_not_finite_is_not_written(written, base, peers, tmp_path) -> None:
    pool = written({"_pretrained_": base, **peers})
    merge = Merge(rule=TaskArithmetic(scale=1e39), streamed=True)
    merge.output_path = tmp_path / "folder"
    with pytest.raises(UserError, match=r"weight' has entries that are NaN .* was not written"):
        merge.run(pool)
    assert not list(merge.output_path.glob("*"))


def test_from_python_there_is_no_file_but_where_it_is_asked_for(
    written, base, peers, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    pool = written({"_pretrained_": base, **peers})
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    model = Merge(rule=Mean(), streamed=True).run(pool)
    assert not list((tmp_path / "temporary").iterdir())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # the mapping is private
    merge = Merge(rule=Mean(), streamed=True)
    merge.output_path = tmp_path / "folder"
    again = merge.run(pool)
    assert torch.equal(model.conv1.weight, 2 * again.conv1.weight)
    assert [path.name for path in merge.output_path.iterdir()] == ["merged.safetensors"]
    again.conv1.weight.data.zero_()
    assert load_safetensors(merge.output_path / "merged.safetensors")["conv1.weight"].any()
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}


def test_large_files_are_streamed_where_there_is_a_file_for_the_result(
    written, base, peers, tmp_path, monkeypatch
) -> None:
    def streams(pool: object, **options: Any) -> bool:
        merge = Merge(rule=options.pop("rule", Mean()), **options)
        merge.output_path = tmp_path / "folder"
        merge.run(pool)
        return merge.report["streamed"]

    pool = written({"_pretrained_": base, **peers})
    assert not streams(pool)  # small
    monkeypatch.setattr("fusion.method.merge.STREAMED_FROM", 1000)
    assert streams(pool)
    assert not streams(pool, streamed=False)
    assert not streams(pool, align="weights")
    assert not streams(pool, rule=Slerp())
    assert not streams({"_pretrained_": base, **peers})
    merge = Merge(rule=Mean())
    merge.run(pool)
    assert not merge.report["streamed"]


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"rule": Slerp()}, "Slerp needs whole tensors"),
        ({"rule": Ties(scope="tensor")}, "Ties needs whole tensors"),
        ({"rule": Mean(), "align": "weights"}, "aligned experts have to be in memory"),
    ],
    ids=str,
)
def test_what_cannot_be_streamed_is_said(options, obstacle, written, base, peers) -> None:
    pool = written({"_pretrained_": base, **peers})
    with pytest.raises(UserError, match=f"{obstacle}; choose streamed=auto"):
        Merge(streamed=True, **options).run(pool)
    with pytest.raises(UserError, match="the model 'p1' is no file"):
        Merge(streamed=True, rule=Mean()).run({"_pretrained_": base, **peers})
    with pytest.raises(UserError, match="streamed is 'yes'; give true, false or auto"):
        Merge(streamed="yes", rule=Mean())


def test_the_report_and_the_choice_are_the_same_for_frozen_rules(written, both, base, peers) -> None:
    """A rule of one's own, elementwise by declaration."""

    @dataclasses.dataclass(frozen=True)
    class Last(Rule):
        elementwise = True

        def merge(self, piece):
            return piece.experts[-1].clone()

    _, model = both(written({"_pretrained_": base, **peers}), Last())
    assert torch.equal(model.conv1.weight, peers["p3"].conv1.weight)


def test_the_files_of_members_are_read_once_by_a_mean(written, base, peers, monkeypatch) -> None:
    from fusion.weights import SafetensorsSource

    read: list[int] = []
    fill = SafetensorsSource._fill

    def counting(self, name, start, part):
        read.append(part.nbytes)
        fill(self, name, start, part)

    monkeypatch.setattr(SafetensorsSource, "_fill", counting)
    networks = {"_pretrained_": base, **peers}
    Merge(rule=Mean(), streamed=True).run(written(networks))
    size = sum(t.nbytes for n in networks.values() for t in n.state_dict().values())
    small = sum(t.nbytes for n in networks.values() for k, t in n.state_dict().items() if "bn" in k)
    assert size <= sum(read) <= size + 2 * small  # the running statistics are made whole


