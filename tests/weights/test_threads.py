"""Blocks that are distributed among threads."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from fusion.weights.threads import cores, threads_over_blocks


def test_results_come_in_order_and_blocks_are_requested_as_they_are_needed():
    requested = []

    def blocks():
        for number in itertools.count():
            requested.append(number)
            yield number

    with threads_over_blocks("cpu", most=2) as each:
        found = list(itertools.islice(each(lambda number: number**2, blocks()), 50))
    assert found == [number**2 for number in range(50)]
    assert len(requested) < 60


def test_blocks_are_worked_on_at_the_same_time():
    if cores() < 2:
        pytest.skip("needs two cores")
    together = threading.Barrier(2, timeout=20)
    with threads_over_blocks("cpu", most=2) as each:
        assert sorted(each(lambda _: together.wait(), range(4))) == [0, 0, 1, 1]


def test_an_error_reaches_the_caller_and_no_further_block_is_started():
    started = []

    def work(number):
        started.append(number)
        if number == 3:
            raise ValueError("block 3")

    with pytest.raises(ValueError, match="block 3"), threads_over_blocks("cpu", most=2) as each:
        list(each(work, range(1000)))
    assert len(started) < 20


def test_torch_has_its_threads_back_afterwards():
    before = torch.get_num_threads()
    with threads_over_blocks("cpu", most=1) as each:
        assert set(each(lambda _: torch.get_num_threads(), range(5))) == {1}
    assert torch.get_num_threads() == before
