"""The barrier between networks trained from different initialisations, over several pairs.

One run of ``method=interpolation_barrier`` per seed, through the configuration, then the mean and
the standard error over the pairs: a Markdown table, ``barrier.csv`` and ``barrier.pdf``/``.png``.

    .venv/bin/python scripts/interpolation_barrier.py --pairs 5 --output barrier
    .venv/bin/python scripts/interpolation_barrier.py --pool my_pair --config-dir my_conf
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pandas as pd

from fusion.cli.configuration import composed
from fusion.figures.barrier import barrier_figure
from fusion.figures.style import save_figure
from fusion.files import write_text
from fusion.method.interpolation_barrier import barriers
from fusion.target import build
from fusion.training.devices import make_fabric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pool", default="digits_pair", help="a pool of two networks")
    parser.add_argument("--config-dir", type=Path, help="a folder of YAML of your own")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/barrier"))
    parser.add_argument("overrides", nargs="*", help="further options, as for fusion_bench")
    arguments = parser.parse_args()
    if arguments.pairs < 1:
        parser.error(f"--pairs is {arguments.pairs}; give 1 or more")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    tables = []
    for seed in range(arguments.pairs):
        chosen = ["method=interpolation_barrier", f"modelpool={arguments.pool}", f"seed={seed}"]
        keys = ("method", "modelpool", "fabric")
        values = composed([*chosen, *arguments.overrides], keys, config_dir=arguments.config_dir)
        method, pool = build(values["method"]), build(values["modelpool"])
        method.fabric = make_fabric(
            {k: v for k, v in values["fabric"].items() if k not in ("_target_", "loggers")}
        )
        method.run(pool)
        tables.append(method.table.assign(pair=seed))
    table = pd.concat(tables)
    write_text(arguments.output / "barrier.csv", table.to_csv(index=False))
    save_figure(barrier_figure(table), arguments.output, "barrier")
    print(markdown(table))


def markdown(table: pd.DataFrame) -> str:
    """Return the midpoint's accuracy and the barriers, mean ± standard error over the pairs."""
    found = pd.concat([barriers(pair) for _, pair in table.groupby("pair")])
    ends = 100 * table.loc[table["t"].isin([0, 1]), "accuracy"]
    lines = [
        f"Parents: {ends.min():.1f} to {ends.max():.1f} %",
        "",
        "| alignment | batch norm | midpoint, % | barrier, points | in the loss, nats |",
        "|---|---|---|---|---|",
    ]
    for (how, treatment), rows in found.groupby(["alignment", "batch_norm"], sort=False):
        cells = [
            mean_and_error(100 * rows["midpoint"], 1),
            mean_and_error(100 * rows["barrier"], 1),
            mean_and_error(rows["loss_barrier"], 2),
        ]
        lines.append(f"| {how} | {treatment} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_error(values: pd.Series, digits: int) -> str:
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.sem():.{digits}f}"


if __name__ == "__main__":
    main()
