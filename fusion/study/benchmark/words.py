"""Numbers of the benchmark as text."""

from __future__ import annotations

import math

import pandas as pd

from fusion.study.benchmark.statistics import standard_error
from fusion.study.markdown import ABSENT


def count(number: int, what: str) -> str:
    """Return ``1 seed``, ``2 seeds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def signed(value: float, *, digits: int = 1) -> str:
    """Return a difference with its sign; one that rounds to zero as ``+0.0``."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def plus_minus(error: float, *, digits: int = 1) -> str:
    """Return `` ± 0.3``, or nothing where no error is known."""
    return "" if math.isnan(error) else f" ± {error:.{digits}f}"


def mean_and_error(values: pd.Series[float], *, digits: int = 1, scale: float = 1.0) -> str:
    """Return mean ± standard error over the known values; a dash where there is none."""
    known = scale * values.dropna().astype(float)
    if known.empty:
        return ABSENT
    return f"{known.mean():.{digits}f}{plus_minus(standard_error(known), digits=digits)}"


def percent(share: float) -> str:
    """Return a share as whole percent."""
    return f"{round(100 * share) + 0:.0f} %".replace("-", "−")


def p_value(value: float) -> str:
    """Return a p value with three digits, a smaller one as such."""
    return "less than 0.001" if value < 0.001 else f"{value:.3f}"
