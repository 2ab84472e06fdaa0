from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.method.head import check_union, resize, union_labels, union_rows, unite
from fusion.modelpool import BaseModelPool


def test_rows_go_where_their_labels_say() -> None:
    base = torch.arange(4.0)[:, None]
    a, b = torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0], [21.0]])
    united = union_rows(base, (0, 1, 2, 3), [(a, (2, 0)), (b, (0, 3))], (0, 1, 2, 3))
    assert united.flatten().tolist() == [(11 + 20) / 2, 1.0, 10.0, 21.0]


def test_the_labels_are_the_bases_where_it_knows_them_all(base) -> None:
    def labels(own: dict[str, list[int]]) -> tuple[int, ...]:
        pool = BaseModelPool(dict.fromkeys(["_pretrained_", "a", "b"], base), classes=own)
        return union_labels(pool, 10)

    assert labels({"a": [7, 2], "b": [3]}) == tuple(range(10))
    assert labels({"a": [12, 2], "b": [3]}) == (2, 3, 12)
    assert labels({"_pretrained_": [4, 3], "a": [3], "b": [4]}) == (4, 3)


def test_heads_of_one_shape_are_left_to_the_merge(base, peers) -> None:
    pool = BaseModelPool({"_pretrained_": base, **peers}, classes={"_pretrained_": range(10)})
    merged = dict(base.state_dict())
    sources = {name: pool.tensors(name) for name in pool}
    assert unite(merged, base.state_dict(), sources, pool) == tuple(range(10))
    assert all(torch.equal(merged[key], value) for key, value in base.state_dict().items())


def test_every_expert_must_be_known(base) -> None:
    pool = BaseModelPool({"_pretrained_": base, "a": base, "b": base}, classes={"a": [1]})
    with pytest.raises(UserError, match="those of b are not known"):
        check_union(pool)


@pytest.mark.parametrize(
    ("module", "size"), [(nn.Linear(3, 4), "out_features"), (nn.Conv2d(3, 4, 1), "out_channels")]
)
def test_a_head_is_given_its_new_size(module, size) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), module)
    state = {key: tensor[:2].clone() for key, tensor in net[1].state_dict(prefix="1.").items()}
    resize(net, state)
    net.load_state_dict(state, strict=False)
    assert getattr(net[1], size) == 2
    assert net[1].weight.shape[0] == net[1].bias.shape[0] == 2
