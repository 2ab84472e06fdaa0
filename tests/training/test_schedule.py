from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest

from fusion.training.schedule import Schedule, learning_rate_factor


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_step_learns(schedule: Schedule, steps: int) -> None:
    factors = [learning_rate_factor(schedule, step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_shapes_of_the_schedules() -> None:
    cosine = [learning_rate_factor("cosine", step, 100) for step in range(100)]
    assert all(later < earlier for earlier, later in pairwise(cosine))
    assert cosine[0] > 0.99
    assert cosine[-1] < 0.01
    one_cycle = [learning_rate_factor("one_cycle", step, 100) for step in range(100)]
    peak = one_cycle.index(max(one_cycle))
    assert 20 <= peak <= 30
    assert one_cycle[0] < 0.1
    assert one_cycle[-1] < 0.01
    assert {learning_rate_factor("constant", step, 9) for step in range(9)} == {1.0}
