"""Measure each setting of the benchmark: its experts, its base, the simple average, the time.

    python scripts/settings_table.py digits_tasks_4 glyphs_8
    python scripts/settings_table.py cifar10_tasks_5 --overrides path.data_dir=FOLDER \
        path.checkpoint=resnet20.safetensors

Without names these are the settings that need no files. Accuracies are means over the tasks in
percent. Batch norm is recalibrated, and networks trained apart are aligned before the average.
"""

from __future__ import annotations

import argparse
import json
from statistics import mean
from typing import Any

from pools import composed

from fusion.config_folder import config_folder
from fusion.method.presets import algorithm
from fusion.modelpool import BaseModelPool, TrainedModel
from fusion.target import build
from fusion.taskpool import JOINT, ClassificationTaskPool
from fusion.weights import read_metadata


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = sorted(file.stem for file in (config_folder() / "setting").glob("*.yaml"))
    without_files = [name for name in everything if not name.startswith("cifar10")]
    parser.add_argument("settings", nargs="*", default=without_files)
    parser.add_argument("--overrides", nargs="*", default=[], help="as for fusion_bench")
    arguments = parser.parse_args()
    print(
        "| setting | tasks or parts | experts | base, their heads | simple average | training, s |"
    )
    print("| --- | --: | --: | --: | --: | --: |")
    for name in arguments.settings:
        print(row(name, arguments.overrides), flush=True)


def row(setting: str, overrides: list[str]) -> str:
    values = composed([f"setting={setting}", *overrides], ("modelpool", "taskpool"))
    pool, tasks = build(values["modelpool"]), build(values["taskpool"])
    experts = [own_accuracy(pool, tasks, name) for name in pool.model_names]
    base = merged(pool, tasks, "task_arithmetic", scale=0.0) if pool.has_pretrained else None
    options = {} if pool.has_pretrained else {"align": "activations"}
    average = merged(pool, tasks, "simple_average", **options)
    cells = [mean(experts), base, average]
    shown = ["–" if cell is None else f"{100 * cell:.1f}" for cell in cells]
    seconds = sum(training_seconds(pool, name) for name in pool.all_model_names)
    return f"| `{setting}` | {len(pool)} | {' | '.join(shown)} | {seconds:.0f} |"


def own_accuracy(pool: BaseModelPool, tasks: ClassificationTaskPool, name: str) -> float:
    """Return an expert's accuracy on its own task, or on the only one."""
    found = tasks.evaluate(pool.load_model(name), labels=pool.labels(name))
    task = pool.task(name) if pool.task(name) in found else tasks.task_names[0]
    return float(found[task]["accuracy"])


def merged(
    pool: BaseModelPool, tasks: ClassificationTaskPool, method: str, **options: Any
) -> float:
    merge = algorithm(method, **options)
    found = tasks.evaluate(merge.run(pool), labels=merge.result_labels(pool))
    return mean(found[task]["accuracy"] for task in found if task != JOINT)


def training_seconds(pool: BaseModelPool, name: str) -> float:
    entry = pool.entry(name)
    if not isinstance(entry.member, TrainedModel):
        return 0.0
    history = json.loads(read_metadata(entry.member.path(entry))["history"])
    return sum(epoch["seconds"] for epoch in history)


if __name__ == "__main__":
    main()
