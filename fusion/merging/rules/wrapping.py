"""Rules around another rule, which require from the pipeline what the inner rule requires."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion.merging.rule import Need, Rule
from fusion.merging.rules.task_arithmetic import TaskArithmetic


@dataclass(frozen=True, kw_only=True)
class WrappingRule(Rule):
    """A rule that changes what another rule receives or returns; both are measured from the base.

    Args:
        rule: the inner rule.
    """

    rule: Rule = field(default_factory=TaskArithmetic)

    @property
    def needs(self) -> frozenset[Need]:
        """The requirements of the inner rule, and a base."""
        return self.rule.needs | {Need.BASE}

    @property
    def statistics(self) -> frozenset[str]:
        """The statistics that the inner rule reads."""
        return self.rule.statistics

    @property
    def elementwise(self) -> bool:
        """As for the inner rule."""
        return self.rule.elementwise

    @property
    def affine(self) -> bool:
        """As for the inner rule."""
        return self.rule.affine

    @property
    def folded(self) -> bool:
        """As for the inner rule."""
        return self.rule.folded

    @property
    def sequential(self) -> bool:
        """As for the inner rule."""
        return self.rule.sequential
