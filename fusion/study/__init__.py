"""Summaries of several runs, from their reports to a table, figures and a page."""

from fusion.study.runs import Run, read_runs
from fusion.study.summarise import summarise

__all__ = ["Run", "read_runs", "summarise"]
