"""The learning rate over the steps of a training run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["one_cycle", "cosine", "constant"]

_WARM_UP = 0.25  # share of the steps in which one_cycle rises to the full learning rate


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Return the factor on the learning rate in ``step`` (from 0) of ``steps``; in (0, 1].

    ``one_cycle`` rises in a line and falls as a cosine (after Smith and Topin, 2018), ``cosine``
    only falls (Loshchilov and Hutter, 2017, without restarts).
    """
    if schedule == "constant":
        return 1.0
    position = (step + 0.5) / steps
    if schedule == "one_cycle":
        if position < _WARM_UP:
            return position / _WARM_UP
        position = (position - _WARM_UP) / (1 - _WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * position))
