"""The YAML header of a model card, which the hub indexes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from fusion.evaluation import MERGED
from fusion.run_folder import CARD_START

_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)")
_DATASETS = {"fusion.data.cifar10": "uoft-cs/cifar10"}
"""Constructor of a data set → its name on the hub."""


def header(report: Mapping[str, Any], *, title: str, tags: list[str]) -> str:
    """Return the metadata of a card, between two lines of dashes.

    Args:
        report: of the run.
        title: of the model.
        tags: further words to find it by.
    """
    values: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "tags": list(dict.fromkeys(["merge", "cnn", *tags])),
    }
    sources = report.get("sources", {}).values()
    bases = [found[1] for source in sources if (found := _HUB.match(source or ""))]
    if bases:
        values["base_model"] = list(dict.fromkeys(bases))
        values["base_model_relation"] = "merge"
    known = [_DATASETS[name] for name in report.get("datasets", ()) if name in _DATASETS]
    if known:
        values["datasets"] = known
    if results := _results(report):
        values["metrics"] = ["accuracy"]
        values["model-index"] = [{"name": title, "results": results}]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return f"{CARD_START}{text}---\n"


def _results(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measured results, one entry per task."""
    measured = report.get("evaluation", {}).get(MERGED, {})
    return [
        {
            "task": {"type": "image-classification", "name": task},
            "dataset": {"type": _slug(task), "name": task},
            "metrics": [{"type": "accuracy", "value": round(float(found["accuracy"]), 4)}],
        }
        for task, found in measured.items()
        if isinstance(found.get("accuracy"), float)
    ]


def _slug(task: str) -> str:
    """Return a name as the hub takes it for a data set."""
    return re.sub(r"[^\w.-]+", "-", task).strip("-.") or "task"
