"""Cards on disk: read back as written, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool import BaseModelPool
from fusion.modelpool.card import Card, CardNote, digest_weights, write
from fusion.weights import ModuleSource

LETTERS = LabelSpace.of(["a", "b", "c", "d"])


@pytest.fixture
def statistics() -> dict[str, Tensor]:
    rows = torch.randn(50, 2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {
        "gram/conv1.weight": torch.einsum("ngi,ngj->gij", rows, rows),
        "moments/bn1.running_mean": rows[:2, 0, :8],
        "classes/linear.weight": rows[:4, 0],
    }


@pytest.fixture
def card(tmp_path, statistics, experts) -> Path:
    """A card of the expert a."""
    note = CardNote(digest_weights(ModuleSource(experts["a"])), 50, LETTERS)
    write(tmp_path / "a.card.safetensors", note, statistics.items())
    return tmp_path / "a.card.safetensors"


def rewritten(card: Path, **changes: object) -> Path:
    """The card with other entries in its note; tensors and digest stay."""
    with safe_open(card, "pt") as opened:
        metadata = opened.metadata()
    metadata["card"] = json.dumps(json.loads(metadata["card"]) | changes)
    save_file(load_file(card), card, metadata)
    return card


def test_a_card_is_read_as_it_was_written(card, statistics) -> None:
    found = Card(card)
    assert set(found) == set(statistics)
    assert found.note.images == 50
    assert found.note.labels == LETTERS
    for name, tensor in statistics.items():
        assert found.info(name).shape == tensor.shape
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.read(name, 3, 7), found[name].flatten()[3:7])
    gram = found["gram/conv1.weight"]
    assert torch.equal(gram, gram.mT)


def test_a_pool_knows_the_classes_of_a_card(card, experts) -> None:
    pool = BaseModelPool(experts, cards={"a": card})
    assert pool.labels("a") == LETTERS
    assert pool.labels("b") is None
    assert (pool.has_card("a"), pool.has_card("b"), pool.has_card()) == (True, False, False)
    assert pool.card("b") is None
    found = pool.card("a")
    assert found is not None
    assert found is pool.card("a")


@pytest.mark.parametrize("place", [-1, -4000])
def test_a_card_with_one_other_bit_is_damaged(card, place) -> None:
    content = bytearray(card.read_bytes())
    content[max(place, -len(content) + 900)] ^= 1
    card.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Card(card)


def test_a_card_that_says_something_else_than_it_did_is_damaged(card) -> None:
    with pytest.raises(UserError, match="is damaged: its content is not what was written"):
        Card(rewritten(card, images=5000))


def test_a_card_that_ends_early_is_damaged(card) -> None:
    card.write_bytes(card.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        Card(card)


def test_what_is_no_card_says_so(tmp_path, experts) -> None:
    with pytest.raises(UserError, match="there is no file"):
        Card(tmp_path / "none")
    save_file(experts["a"].state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="is no merge card; write one with fusion_bench card="):
        Card(tmp_path / "weights.safetensors")


def test_a_card_of_another_version_says_so(tmp_path, statistics, monkeypatch) -> None:
    monkeypatch.setattr("fusion.modelpool.card.FORMAT", 2)
    write(tmp_path / "new", CardNote("", 1, None), statistics.items())
    monkeypatch.undo()
    with pytest.raises(UserError, match="has the format 2, and this version reads 1"):
        Card(tmp_path / "new")


def test_counters_of_batches_play_no_part_and_every_weight_does(experts) -> None:
    digest = digest_weights(ModuleSource(experts["a"]))
    experts["a"].bn1.num_batches_tracked += 1
    assert digest_weights(ModuleSource(experts["a"])) == digest
    experts["a"].bn1.running_var[3] *= 1.0001
    assert digest_weights(ModuleSource(experts["a"])) != digest


def test_the_card_of_other_weights_is_refused_before_any_work(card, experts) -> None:
    experts["a"].conv1.weight.data[0, 0, 0, 0] += 1e-6
    pool = BaseModelPool(experts, cards={"a": card})
    with pytest.raises(UserError, match="belongs to other weights than those of 'a'"):
        pool.preflight()


def test_the_card_of_other_layers_is_refused(card) -> None:
    pool = BaseModelPool({"x": nn.Sequential(nn.Linear(2, 4))}, cards={"x": card})
    with pytest.raises(UserError, match="of the layer 'conv1\\.weight', which 'x' lacks"):
        pool.card("x")


def test_the_card_of_other_classes_is_refused(card, experts) -> None:
    pool = BaseModelPool(experts, cards={"a": card}, classes={"a": ["b", "a", "c", "d"]})
    with pytest.raises(UserError, match="with the classes a, b, c, d, and 'a' has b, a, c, d"):
        pool.card("a")
    named = BaseModelPool(
        experts, cards={"a": card}, classes={"a": list("abcd")}, tasks={"a": "letters"}
    )
    assert named.card("a") is not None


@pytest.mark.parametrize("name", ["_pretrained_", "c"])
def test_only_experts_have_cards(card, pool, name) -> None:
    with pytest.raises(UserError, match="cards: the pool has no model"):
        BaseModelPool(pool, cards={name: card})
