"""The streamed sums against the dense computation in float64."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fusion.weights import ModuleSource, SafetensorsSource, save_safetensors
from fusion.weights.task_vectors import READ, SLICE, sample_task_vectors, sum_task_vectors


class Weights(nn.Module):
    """Named tensors as a module."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@pytest.fixture
def pool():
    """A base and three experts; one tensor needs several reads, and many entries are unchanged."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"long": (READ + 3 * SLICE + 5,), "conv": (6, 4, 3, 3), "one": ()}

    def draw():
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base = draw()
    experts = [{n: base[n] + 1e-3 * t.relu() for n, t in draw().items()} for _ in range(3)]
    experts[1] = {name: 2 * base[name] - experts[0][name] for name in shapes}  # the other way
    experts[2]["conv"] = experts[2]["conv"].to(memory_format=torch.channels_last)
    experts[2]["long"] = experts[2]["long"].to(torch.bfloat16)
    return base, experts


def sources(pool):
    base, experts = pool
    return ModuleSource(Weights(**base)), [ModuleSource(Weights(**e)) for e in experts], list(base)


def dense(pool, positions=None):
    """Return the task vectors (n, k) in float64."""
    base, experts = pool
    rows = []
    for expert in experts:
        parts = [(expert[n].double() - base[n].double()).reshape(-1) for n in base]
        if positions is not None:
            parts = [part[positions[n]] for n, part in zip(base, parts, strict=True)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_sums_equal_the_dense_computation(pool, sampled):
    base, experts, names = sources(pool)
    positions = None
    if sampled:
        positions = {
            "long": torch.tensor([0, 7, READ - 1, READ, READ + 9]),
            "conv": torch.arange(5, 200),
            "one": torch.tensor([], dtype=torch.int64),
        }
    vectors = dense(pool, positions)
    sums = sum_task_vectors(base, experts, names, positions=positions).total()
    gram = vectors @ vectors.T
    cosines = gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt())
    assert_close(sums.cosines[0], cosines, rtol=0, atol=1e-7)
    assert_close(sums.norms[0], vectors.norm(dim=1), rtol=1e-7, atol=0)
    assert torch.equal(sums.changed[0], (vectors != 0).sum(1).double())
    assert_close(sums.magnitude[0], vectors.abs().sum(1), rtol=1e-6, atol=0)
    assert sums.entries.item() == vectors.shape[1]
    size = vectors.abs()
    for i in range(3):
        for j in range(3):
            differ = vectors[i].sign() * vectors[j].sign() < 0
            both = size[i] + size[j]
            share = both[differ].sum() / both.sum()
            assert_close(sums.sign_conflicts[0, i, j], share, rtol=0, atol=1e-6)


def test_steps_of_one_size_lose_nothing_to_rounding():
    """Sums of many equal squares, as after one step of Adam, are where float32 would drift."""
    generator = torch.Generator().manual_seed(0)
    toward = torch.randn(4 * SLICE, generator=generator)
    base = ModuleSource(Weights(w=torch.zeros(4 * SLICE)))
    signs = [(torch.randn(4 * SLICE, generator=generator) + 2 * toward).sign() for _ in range(4)]
    steps = [1.234567e-4 * (1 + number) * sign for number, sign in enumerate(signs)]
    experts = [ModuleSource(Weights(w=step)) for step in steps]
    vectors = torch.stack(steps).double()
    gram = vectors @ vectors.T
    cosines = gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt())
    streamed = sum_task_vectors(base, experts, ["w"]).cosines[0]
    assert_close(streamed, cosines, rtol=0, atol=1e-7)


def test_each_tensor_has_its_own_row(pool):
    base, experts, names = sources(pool)
    sums = sum_task_vectors(base, experts, names)
    alone = sum_task_vectors(base, experts, ["conv"])
    merged = sums.total([1])
    for field in fields(sums):
        assert torch.equal(getattr(merged, field.name), getattr(alone, field.name))
    assert_close(sums.base_square, torch.stack([pool[0][n].double().square().sum() for n in names]))


def test_parts_that_are_computed_apart_add_up_bit_for_bit(pool):
    base, experts, names = sources(pool)
    whole = sum_task_vectors(base, experts, names)
    halves = [sum_task_vectors(base, experts, names, only=only) for only in ([1], [0, 2])]
    for field in fields(whole):
        first, second = (getattr(half, field.name) for half in halves)
        assert torch.equal(first + second, getattr(whole, field.name))


def test_the_number_of_threads_changes_nothing_and_torchs_own_come_back(pool, monkeypatch):
    base, experts, names = sources(pool)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            monkeypatch.setattr("fusion.weights.threads.cores", lambda number=number: number)
            torch.set_num_threads(number)
            results.append(sum_task_vectors(base, experts, names))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for field in fields(other):
            assert torch.equal(getattr(other, field.name), getattr(results[0], field.name))


def test_checkpoints_give_what_modules_give(pool, tmp_path):
    base, experts, names = sources(pool)
    files = []
    for number, tensors in enumerate([pool[0], *pool[1]]):
        files.append(tmp_path / f"{number}.safetensors")
        save_safetensors(files[-1], tensors)
    stored = [SafetensorsSource(path) for path in files]
    read = []
    from_files = sum_task_vectors(stored[0], stored[1:], names, on_read=read.append)
    from_modules = sum_task_vectors(base, experts, names)
    for field in fields(from_files):
        assert torch.equal(getattr(from_files, field.name), getattr(from_modules, field.name))
    assert sum(read) == sum(source.info(name).nbytes for source in stored for name in names)


def test_an_unchanged_expert_has_no_cosine(pool):
    base, experts, names = sources(pool)
    sums = sum_task_vectors(base, [experts[0], base], names).total()
    assert sums.cosines[0, 0, 0] == 1
    assert sums.cosines[0, 1].isnan().all()
    assert sums.cosines[0, :, 1].isnan().all()
    assert sums.changed[0, 1] == 0


def test_opposite_experts_conflict_everywhere(pool):
    base, experts, _ = sources(pool)
    sums = sum_task_vectors(base, experts[:2], ["conv"]).total()
    assert_close(sums.cosines[0, 0, 1].item(), -1.0, rtol=0, atol=1e-6)
    assert_close(sums.sign_conflicts[0, 0, 1].item(), 1.0, rtol=0, atol=1e-6)
    assert sums.sign_conflicts[0, 0, 0] == 0


def test_a_sample_holds_the_entries_at_the_positions(pool):
    base, experts, names = sources(pool)
    assert_close(sample_task_vectors(base, experts, names).double(), dense(pool))
    positions = {
        "long": torch.tensor([3, READ, READ + 9]),
        "conv": torch.tensor([215]),
        "one": torch.tensor([0]),
    }
    sample = sample_task_vectors(base, experts, names, positions=positions)
    assert sample.dtype == torch.float32
    assert_close(sample.double(), dense(pool, positions))
