"""Report the effect of alignment on the experts: in report, log, table and figure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fusion.files import write_text
from fusion.merging.alignment import AlignmentRecord
from fusion.method.base import BaseAlgorithm

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

COLUMNS = ("expert", "group", "kind", "size", "moved", "gain")  # of alignment.csv


def write_alignment(
    algorithm: BaseAlgorithm, records: Mapping[str, AlignmentRecord], *, plot: bool
) -> None:
    """Write the effect of alignment to the report, the log and ``alignment.csv``.

    The figure ``alignment.pdf`` (and ``.png``) is drawn only where a unit moved: in experts that
    were fine-tuned from the reference usually none does, and an empty figure would add nothing to
    the line in the log.
    """
    algorithm.report["alignment"] = {
        name: {
            "changed": record.moved > 0,
            "moved": record.moved,
            "units": sum(group.size for group in record.groups),
            "objective_before": record.objective_before,
            "objective_after": record.objective_after,
            "gain": record.gain,
            "cycle_consistency": record.cycle_consistency,
        }
        for name, record in records.items()
    }
    for name, record in records.items():
        if not record.moved:
            log.info("Alignment of %s: no unit moved", name)
            continue
        cycle = record.cycle_consistency
        log.info(
            "Alignment of %s: %d of %d units moved, objective %.4f → %.4f%s",
            name,
            record.moved,
            sum(group.size for group in record.groups),
            record.objective_before,
            record.objective_after,
            "" if cycle is None else f", cycle consistency {cycle:.2g}",
        )
    if algorithm.output_path is not None and algorithm.fabric.is_global_zero:
        table = alignment_table(records)
        write_text(algorithm.output_path / "alignment.csv", table.to_csv(index=False))
        if plot and table["moved"].any():
            from fusion.figures.alignment import alignment_figure
            from fusion.figures.style import save_figure

            save_figure(alignment_figure(table), algorithm.output_path, "alignment")


def alignment_table(records: Mapping[str, AlignmentRecord]) -> pd.DataFrame:
    """Return one row for each expert and group of units; the columns of ``alignment.csv``.

    ``size`` is the number of units (or blocks) of the group, ``moved`` the number of those that
    changed place, ``gain`` the increase of the objective.
    """
    import pandas as pd

    rows = [{"expert": name, **vars(g)} for name, record in records.items() for g in record.groups]
    return pd.DataFrame(rows, columns=list(COLUMNS))
