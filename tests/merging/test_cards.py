"""Merges from cards are those with images, and need none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import fusion
from fusion.data import ClassSubset, ImageTensors
from fusion.errors import UserError
from fusion.merging import Piece, TaskRule
from fusion.method import Merge
from fusion.modelpool import BaseModelPool
from fusion.modelpool.card import Card
from fusion.models import MultiTaskNetwork, find_layers

CLASSES = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9)}
SMALL = {"images": 120, "batch_size": 64}
SMALL_MERGE = {"statistics_images": 120, "batch_size": 64, "plot": False}


@pytest.fixture(scope="module")
def data(train_digits: ImageTensors) -> dict[str, ImageTensors]:
    few = train_digits.select(torch.arange(400))
    return {name: ClassSubset(few, classes) for name, classes in CLASSES.items()}


@pytest.fixture
def with_images(pool, data) -> BaseModelPool:
    return BaseModelPool(pool, train_datasets=data)


@pytest.fixture
def with_cards(pool, with_images, tmp_path) -> BaseModelPool:
    """The pool with cards of its experts and no images."""
    return BaseModelPool(pool, cards=cards_of(with_images, tmp_path))


def cards_of(pool: BaseModelPool, folder: Path) -> dict[str, Path]:
    return {
        name: fusion.write_card(pool, name, folder / f"{name}.card.safetensors", **SMALL)
        for name in pool
    }


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return max(
        float((first[key] - second[key]).abs().max() / first[key].abs().max().clamp(min=1e-6))
        for key in first
        if first[key].is_floating_point()
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("regmean", {"folded": True, "batch_norm": "merge"}),
        ("regmean", {"folded": True, "batch_norm": "grams", "head": "joint"}),
        ("regmean", {"folded": False, "batch_norm": "grams"}),
        ("simple_average", {"batch_norm": "grams"}),
    ],
)
def test_a_merge_from_cards_is_the_merge_with_images(
    with_images, with_cards, method, options
) -> None:
    """To the precision of float32, in which cards are written."""
    from_images = fusion.merge(with_images, method, **options, **SMALL_MERGE)
    from_cards = fusion.merge(with_cards, method, **options, **SMALL_MERGE)
    assert largest_difference(from_images, from_cards) < 1e-4
    head = options.get("head", "auto")
    if method == "regmean":
        average = fusion.merge(with_cards, "simple_average", **SMALL_MERGE, head=head)
        assert largest_difference(average, from_cards) > 0.01


def test_folded_batch_norm_and_gram_statistics_go_together(with_cards) -> None:
    """Of a folded rule the running statistics are those of the Gram matrices already."""
    folded = {"folded": True, **SMALL_MERGE}
    one = fusion.merge(with_cards, "regmean", batch_norm="merge", **folded)
    assert largest_difference(one, fusion.merge(with_cards, "regmean", **folded)) < 1e-5


def test_networks_of_several_tasks_have_the_statistics_of_their_own_weights(
    with_cards, experts
) -> None:
    """A rule that gives each task its expert's weights gives it the expert's statistics, too."""
    mine = Merge(rule=EachItsOwn(), batch_norm="grams", plot=False).run(with_cards)
    assert isinstance(mine, MultiTaskNetwork)
    for name, expert in experts.items():
        card = with_cards.card(name)
        assert card is not None
        norm = mine.for_task(name).layer2[0].bn2
        mean, variance = card["moments/layer2.0.bn2.running_mean"]
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(norm.running_mean, expert.layer2[0].bn2.running_mean, atol=1e-2)


@dataclass(frozen=True, kw_only=True)
class EachItsOwn(TaskRule):
    """Each task's network is its expert."""

    per_task: bool = True

    def merge(self, piece: Piece) -> torch.Tensor:
        return piece.experts.mean(0)

    def separate(self, piece: Piece) -> torch.Tensor:
        return piece.experts


def test_a_pool_may_have_cards_of_some_experts_and_images_of_others(
    pool, data, with_images, tmp_path
) -> None:
    card = cards_of(with_images, tmp_path)["a"]
    mixed = BaseModelPool(pool, cards={"a": card}, train_datasets={"b": data["b"]})
    options = {"folded": True, "batch_norm": "merge", **SMALL_MERGE}
    one = fusion.merge(mixed, "regmean", **options)
    assert largest_difference(one, fusion.merge(with_images, "regmean", **options)) < 1e-4


def test_a_card_has_every_layer_and_norm_and_the_classes(with_images, experts, tmp_path) -> None:
    card = Card(cards_of(with_images, tmp_path)["b"])
    weights = {layer.weight for layer in find_layers(experts["b"])}
    means = {key for key in experts["b"].state_dict() if key.endswith("running_mean")}
    assert {n.partition("/")[2] for n in card if n.startswith("gram/")} == weights
    assert {n.partition("/")[2] for n in card if n.startswith("moments/")} == means
    shares = card["classes/linear.weight"][:, -1]
    labels = card.note.labels
    assert labels is not None
    assert labels.labels == CLASSES["b"]
    assert shares.shape == (6,)
    assert float(shares.sum()) == pytest.approx(1)
    # Means of the classes and of all images are on one scale: they add up.
    gram = card["gram/linear.weight"][0]
    torch.testing.assert_close(card["classes/linear.weight"].sum(0), gram[-1], rtol=1e-5, atol=1e-6)
    # Half of every Gram matrix, in float32: little more than that is in the file.
    entries = sum(g * c * (c + 1) // 2 for g, c, _ in map(shape_of(card), card) if c)
    assert 4 * entries < card.path.stat().st_size < 4 * entries + 20_000


def shape_of(card: Card):
    def shape(name: str) -> tuple[int, int, int]:
        return tuple(card.info(name).shape) if name.startswith("gram/") else (0, 0, 0)  # type: ignore[return-value]

    return shape


def test_grouped_convolutions_have_a_matrix_for_each_group(train_digits, tmp_path) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten()
    )
    network.append(nn.Linear(8 * 4 * 4, 10)).eval()
    pool = BaseModelPool({"x": network}, train_datasets={"x": train_digits})
    card = Card(fusion.write_card(pool, "x", tmp_path / "x.card.safetensors", **SMALL))
    assert card.info("gram/2.weight").shape == (2, 19, 19)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("fisher_merging", {}, "needs fisher of the experts' images, and the card of 'a' has only"),
        ("layerwise_least_squares", {}, "the pool has none of a, b but cards"),
        ("regmean", {"sequential": True}, "the pool has none of a, b but cards"),
        ("adamerging", {}, "the pool has none of a, b but cards"),
        ("regmean", {"batch_norm": "recalibrate"}, "the pool has none of a, b but cards"),
        ("simple_average", {"batch_norm": "repair"}, "the pool has none of a, b but cards"),
        ("regmean", {"align": "weights"}, "reorders the units of the experts, and the cards of a"),
        ("git_rebasin", {"batch_norm": "grams"}, "the cards of a, b have them in the owners'"),
        ("regmean", {"align": "activations"}, "needs images"),
    ],
)
def test_what_cards_cannot_do_is_said_before_any_work(with_cards, method, options, said) -> None:
    with pytest.raises(UserError, match=said) as caught:
        fusion.merge(with_cards, method, plot=False, **options)
    assert "\n" not in str(caught.value)


def test_a_card_is_written_of_an_expert_with_images_and_outputs_for_them(
    pool, data, with_images, tmp_path
) -> None:
    path = tmp_path / "x.card.safetensors"
    with pytest.raises(UserError, match="the pool has no expert 'c'"):
        fusion.write_card(with_images, "c", path)
    with pytest.raises(UserError, match="the pool has none of 'b'; add them to train_datasets"):
        fusion.write_card(BaseModelPool(pool, train_datasets={"a": data["a"]}), "b", path)
    odd = BaseModelPool(pool, train_datasets=data, classes={"a": ["w", "x", "y", "z"]})
    with pytest.raises(UserError, match="the training data of 'a' has the classes 0, 1, 2, 3"):
        fusion.write_card(odd, "a", path)
    path.touch()
    with pytest.raises(UserError, match="the file is there already"):
        fusion.write_card(with_images, "a", path)
    assert fusion.write_card(with_images, "a", path, overwrite=True, **SMALL) == path
