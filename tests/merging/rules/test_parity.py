"""Each rule against its published formula, restated in NumPy on two linear layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from fusion.merging.rule import Piece
from fusion.merging.rules import (
    EMR,
    PCB,
    TSVM,
    WUDI,
    ConsensusTA,
    Fisher,
    IsoC,
    IsoCTS,
    LiNeS,
    MagMax,
    Mean,
    ModelStock,
    RegMean,
    Slerp,
    TaskArithmetic,
    Ties,
)
from fusion.models import Layer

SHAPES = {"first": (12, 30), "second": (20, 10)}
N = 3
NAMES = ("a", "b", "c")


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def network() -> list[Piece]:
    """Two linear layers, in float64."""
    pieces = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        base = numbers(*shape, seed=number)
        changes = 0.1 * numbers(N, *shape, seed=10 + number)
        inputs = numbers(N, 1, 50, shape[1] + 1, seed=20 + number)
        statistics = {
            "fisher": torch.tensor(numbers(N, *shape, seed=30 + number) ** 2),
            "gram": torch.tensor(inputs.swapaxes(-1, -2) @ inputs / 50),
        }
        pieces.append(
            Piece(
                key=f"{name}.weight",
                layer=Layer(name, f"{name}.weight", (f"{name}.weight",), 1, "linear", ()),
                depth=float(number),
                base=torch.tensor(base),
                experts=torch.tensor(base + changes),
                names=NAMES,
                shares=(1 / N,) * N,
                statistics=statistics,
            )
        )
    return pieces


def flat(network: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """The base (d,) and the task vectors (n, d) of the whole network."""
    base = np.concatenate([piece.base.numpy().ravel() for piece in network])
    experts = np.concatenate([piece.experts.flatten(1).numpy() for piece in network], axis=1)
    return base, experts - base


def split(vector: np.ndarray) -> list[np.ndarray]:
    sizes = np.cumsum([rows * columns for rows, columns in SHAPES.values()])[:-1]
    parts = np.split(vector, sizes)
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES.values(), strict=True)]


@pytest.fixture
def check(network, merge_all):
    """Compare a rule's network with the expected arrays."""

    def compare(rule, expected) -> None:
        merged = merge_all(rule, network)
        for piece, array in zip(network, expected, strict=True):
            assert_allclose(merged[piece.key].numpy(), array, rtol=1e-8, atol=1e-10)

    return compare


def test_mean(network, check) -> None:
    check(Mean(), [piece.experts.numpy().mean(0) for piece in network])


def test_slerp_is_shoemakes(network, merge_all) -> None:
    t = 0.3
    two = [
        replace(
            piece,
            experts=piece.experts[:2],
            names=NAMES[:2],
            shares=(1 - t, t),
        )
        for piece in network
    ]
    merged = merge_all(Slerp(), two)
    for piece in two:
        a, b = piece.experts.numpy()
        norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
        angle = np.arccos((a * b).sum() / norm_a / norm_b)
        direction = (
            np.sin((1 - t) * angle) * a / norm_a + np.sin(t * angle) * b / norm_b
        ) / np.sin(angle)
        expected = ((1 - t) * norm_a + t * norm_b) * direction
        assert_allclose(merged[piece.key].numpy(), expected, rtol=1e-8)


def test_task_arithmetic(network, check) -> None:
    """2212.04089, section 2."""
    base, changes = flat(network)
    check(TaskArithmetic(scale=0.4), split(base + 0.4 * changes.sum(0)))


def trimmed(changes: np.ndarray, density: float) -> np.ndarray:
    kept = int(np.ceil(density * changes.shape[1]))
    order = np.argsort(-np.abs(changes), axis=1)[:, :kept]
    result = np.zeros_like(changes)
    np.put_along_axis(result, order, np.take_along_axis(changes, order, axis=1), axis=1)
    return result


def elected_mean(changes: np.ndarray) -> np.ndarray:
    agrees = np.sign(changes) == np.sign(changes.sum(0))
    agrees &= changes != 0
    return (changes * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def test_ties_trims_over_the_whole_network(network, check) -> None:
    """2306.01708, algorithm 1."""
    base, changes = flat(network)
    merged = base + 0.7 * elected_mean(trimmed(changes, 0.3))
    check(Ties(density=0.3, scale=0.7), split(merged))


def test_ties_trims_each_tensor(network, check) -> None:
    expected = []
    for piece in network:
        changes = (piece.experts - piece.base).flatten(1).numpy()
        change = elected_mean(trimmed(changes, 0.3)).reshape(piece.base.shape)
        expected.append(piece.base.numpy() + change)
    check(Ties(density=0.3, scope="tensor"), expected)


def test_magmax(network, check) -> None:
    """2407.06322, section 4."""
    base, changes = flat(network)
    winner = np.abs(changes).argmax(0)
    check(MagMax(), split(base + 0.5 * np.take_along_axis(changes, winner[None], 0)[0]))


def test_pcb(network, check) -> None:
    """2410.02396, equations 1 to 4."""
    base, changes = flat(network)

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum()

    beta = np.stack(
        [
            softmax(N * norm(own * own)) * sum(softmax(norm(own * other)) for other in changes)
            for own in changes
        ]
    )
    beta = trimmed(beta, 0.4)
    merged = (beta * changes).sum(0) / np.where(beta.sum(0) > 0, beta.sum(0), 1)
    check(PCB(density=0.4, scale=1.2), split(base + 1.2 * merged))


def test_model_stock(network, check) -> None:
    """2403.19522, the ratio of n models."""
    expected = []
    for piece in network:
        base, experts = piece.base.numpy(), piece.experts.numpy()
        changes = (experts - base).reshape(N, -1)
        units = changes / np.linalg.norm(changes, axis=1, keepdims=True)
        cosine = np.mean([units[0] @ units[1], units[0] @ units[2], units[1] @ units[2]])
        ratio = N * cosine / (1 + (N - 1) * cosine) if cosine > 0 else 0
        expected.append(ratio * experts.mean(0) + (1 - ratio) * base)
    check(ModelStock(), expected)
    assert any(
        not np.allclose(array, piece.base) for array, piece in zip(expected, network, strict=True)
    )


def test_consensus(network, check, walk) -> None:
    """2405.07813, TALL masks and their consensus."""
    base, changes = flat(network)
    total = changes.sum(0)
    masks = np.abs(changes) >= 0.5 * np.abs(total - changes)
    rule = ConsensusTA(scale=0.3, mask_threshold=0.5, minimum_tasks=2)
    check(rule, split(base + 0.3 * (masks.sum(0) >= 2) * total))
    for task, name in enumerate(NAMES):
        expected = split(base + masks[task] * total)
        for piece, array in zip(network, expected, strict=True):
            assert_allclose(rule.separate(piece)[task].numpy(), array, err_msg=name)


def test_emr(network, check, walk) -> None:
    """2405.17461, algorithm 1."""
    base, changes = flat(network)
    sign = np.sign(changes.sum(0))
    elected = sign * np.where(np.sign(changes) == sign, np.abs(changes), 0).max(0)
    check(EMR(), split(base + elected))
    masks = changes * elected > 0
    factors = np.abs(changes).sum(1) / np.abs(masks * elected).sum(1)
    plan = EMR().prepare(walk(network))
    for task in range(N):
        expected = split(base + factors[task] * masks[task] * elected)
        for piece, array in zip(network, expected, strict=True):
            separate = EMR().separate(replace(piece, plan=plan))
            assert_allclose(separate[task].numpy(), array)


def test_lines(network, check) -> None:
    """2410.17146, section 4: the first layer's factor from norms over the network."""
    _base, changes = flat(network)
    total = changes.sum(0)
    winner = np.abs(changes).argmax(0)
    merged = np.take_along_axis(changes, winner[None], 0)[0]
    alpha = np.linalg.norm(total) / np.linalg.norm(merged) / N
    factors = (alpha, alpha + 0.6)  # depths 0 and 1
    expected = [
        piece.base.numpy() + factor * change
        for piece, factor, change in zip(network, factors, split(merged), strict=True)
    ]
    check(LiNeS(rule=MagMax(scale=1.0), beta=0.6), expected)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_tsvm(network, check) -> None:
    """2412.00081, algorithm 1."""
    expected = []
    for piece in network:
        base = piece.base.numpy()
        kept = min(base.shape) // N
        parts = [
            (u[:, :kept], s[:kept], v[:kept])
            for u, s, v in (
                np.linalg.svd(expert - base, full_matrices=False)
                for expert in piece.experts.numpy()
            )
        ]
        left = orthogonal(np.concatenate([part[0] for part in parts], axis=1))
        right = orthogonal(np.concatenate([part[2] for part in parts], axis=0))
        values = np.concatenate([part[1] for part in parts])
        expected.append(base + 0.9 * left @ np.diag(values) @ right)
    check(TSVM(scale=0.9), expected)


def test_iso_c(network, check) -> None:
    """2502.04959, algorithm 1."""
    expected = []
    for piece in network:
        base = piece.base.numpy()
        u, s, v = np.linalg.svd((piece.experts.numpy() - base).sum(0), full_matrices=False)
        expected.append(base + 1.3 * s.mean() * u @ v)
    check(IsoC(scale=1.3), expected)


@pytest.mark.parametrize("common_share", [0.0, 0.4, 0.8, 1.0])
def test_iso_cts(common_share, network, check) -> None:
    """2502.04959, algorithm 2."""
    expected = []
    for piece in network:
        base = piece.base.numpy()
        changes = piece.experts.numpy() - base
        rank = min(base.shape)
        own = min(rank // N, round((rank - int(common_share * rank)) / N))
        common = rank - own * N
        u, s, v = np.linalg.svd(changes.sum(0), full_matrices=False)
        left, values, right = [u[:, :common]], [s[:common]], [v[:common]]
        for change in changes:
            rest = change - left[0] @ left[0].T @ change
            u, s, v = np.linalg.svd(rest, full_matrices=False)
            left.append(u[:, :own])
            values.append(s[:own])
            right.append(v[:own])
        sides = orthogonal(np.concatenate(left, 1)), orthogonal(np.concatenate(right, 0))
        expected.append(base + np.concatenate(values).mean() * sides[0] @ sides[1])
    check(IsoCTS(common_share=common_share), expected)


def interference(merged: np.ndarray, changes: np.ndarray) -> float:
    """2503.08099, the loss of section 4."""
    return sum(
        np.linalg.norm((merged - change) @ change.T) ** 2 / np.linalg.norm(change) ** 2
        for change in changes
    )


def test_wudi(network, check) -> None:
    """The minimum of the paper's loss plus the ridge, by its normal equations."""
    expected = []
    for piece in network:
        base = piece.base.numpy()
        changes = piece.experts.numpy() - base
        grams = [change.T @ change / np.linalg.norm(change) ** 2 for change in changes]
        ridge = 0.5 * np.eye(base.shape[1])
        right = sum(change @ gram for change, gram in zip(changes, grams, strict=True))
        merged = (right + changes.sum(0) @ ridge) @ np.linalg.inv(sum(grams) + ridge)
        expected.append(base + merged)
    check(WUDI(ridge=0.5), expected)


def test_wudi_by_adam_walks_down_the_papers_loss(network, merge_all) -> None:
    for piece in network:
        changes = piece.experts - piece.base
        merged = torch.nn.Parameter(changes.sum(0))
        optimizer = torch.optim.Adam([merged], lr=1e-3)
        for _ in range(20):
            products = (merged - changes) @ changes.mT
            loss = (products.square().sum((1, 2)) / changes.square().sum((1, 2))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rule = WUDI(iterations=20, learning_rate=1e-3)
        result = merge_all(rule, [piece])[piece.key] - piece.base
        assert_allclose(result.numpy(), merged.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_the_closed_form_of_wudi_interferes_less_than_the_sum(network, merge_all) -> None:
    merged = {ridge: merge_all(WUDI(ridge=ridge), network) for ridge in (1e-6, 1.0)}
    for piece in network:
        changes = (piece.experts - piece.base).numpy()
        losses = [
            interference((merged[ridge][piece.key] - piece.base).numpy(), changes)
            for ridge in (1e-6, 1.0)
        ]
        assert losses[0] < losses[1] < 0.9 * interference(changes.sum(0), changes)


def test_fisher(network, check) -> None:
    """2111.09832, section 3; the Fishers are normalised over the network."""
    fishers = np.concatenate([piece.statistics["fisher"].flatten(1) for piece in network], axis=1)
    base, changes = flat(network)
    weighted = (fishers * (base + changes)).sum(0) / fishers.sum(0)
    check(Fisher(floor=1e-12, normalise=False), split(weighted))
    fishers = fishers / np.linalg.norm(fishers, axis=1, keepdims=True)
    weighted = (fishers * (base + changes)).sum(0) / fishers.sum(0)
    check(Fisher(floor=1e-12), split(weighted))


def test_regmean(network, check) -> None:
    """2212.09849, equation 2, with the entries off the diagonal multiplied by α."""
    expected = []
    for piece in network:
        grams = piece.statistics["gram"].numpy()[:, 0, :-1, :-1]
        diagonals = np.stack([np.diag(np.diag(gram)) for gram in grams])
        grams = 0.9 * grams + 0.1 * diagonals
        pulls = sum(
            gram @ expert.T for gram, expert in zip(grams, piece.experts.numpy(), strict=True)
        )
        expected.append(np.linalg.solve(grams.sum(0), pulls).T)
    check(RegMean(ridge=1e-10), expected)
