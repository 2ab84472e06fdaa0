"""Text of the card: members, method, results, and how to load the network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusion.evaluation import MERGED, Evaluation
from fusion.figures.accuracy_table import accuracy_rows
from fusion.labels import LabelSpace
from fusion.method.presets import method_names, paper, summary
from fusion.model_card.header import header
from fusion.model_card.loading import architecture_name, with_package, without_package
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.modelpool.written import written_labels, written_tasks
from fusion.run_folder import LIBRARY

_CLASSES = 12  # maximum number that are named; for more, the number is given


def model_card(report: Mapping[str, Any], path: Path) -> str:
    """Return the model card of a run, Markdown with the metadata of the Hugging Face hub.

    Every number in it is one of the report's.

    Args:
        report: the content of ``report.json``.
        path: the network that the run made, a file that this package wrote.
    """
    method = report["choices"].get("method") or report["method"]
    experts = [name for name in report["models"] if not BaseModelPool.is_special_model(name)]
    title = f"{method}: {', '.join(experts) or PRETRAINED}"
    known = method in method_names()
    parts = [
        header(report, title=title, tags=[LIBRARY, method]),
        f"# {_plain(title)}",
        _lead(report, method if known else None, len(experts)),
        f"## Members\n\n{_members(report)}",
        f"## Method\n\n{_method(report, method, known=known)}",
        f"## Outputs\n\n{_outputs(path)}",
        f"## Results\n\n{_results(report)}",
        f"## Load it\n\n{_loading(path)}",
        f"## Made by\n\n{_made_by(report)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _lead(report: Mapping[str, Any], method: str | None, experts: int) -> str:
    what = "" if method is None else f" {summary(method).rstrip('.')}."
    base = " and their base" if PRETRAINED in report["models"] else ""
    lines = f"One network made from {experts} expert{'' if experts == 1 else 's'}{base}.{what}"
    if "fast_dev_run=true" in report["choices"].get("overrides", ()):
        lines += (
            "\n\n**A trial run** (`fast_dev_run=true`): everything was done on one batch. Its "
            "numbers mean nothing."
        )
    return lines


def _members(report: Mapping[str, Any]) -> str:
    sources = report.get("sources", {})
    tasks = {expert: task for task, expert in report["experts"].items()}
    rows = [["member", "role", "measured on", "weights from"]]
    for name in report["models"]:
        role = "base" if name == PRETRAINED else "expert"
        role = "special" if role == "expert" and BaseModelPool.is_special_model(name) else role
        source = sources.get(name) or ""
        # A local path is of no use to others.
        source = source if "://" in source else Path(source).name
        rows.append([_plain(name), role, _plain(tasks.get(name, "")), _plain(source)])
    return _table(rows)


def _method(report: Mapping[str, Any], method: str, *, known: bool) -> str:
    lines = [f"`{method}`"]
    if known and (number := paper(method)):
        lines[0] += f", [arXiv {number}](https://arxiv.org/abs/{number})"
    lines[0] += f"; seed {report['seed']}."
    for name, options in report.get("options", {}).items():
        plain = json.loads(json.dumps(options, default=str))
        plain.pop("cache_dir", None)  # the folder of statistics does not change the result
        text = yaml.safe_dump({name: plain}, sort_keys=False, allow_unicode=True)
        lines.append(f"```yaml\n{text}```")
    return "\n\n".join(lines)


def _outputs(path: Path) -> str:
    tasks = written_tasks(path)
    if tasks is None:
        return f"One head: {_classes(written_labels(path))}."
    rows = [["task", "classes, in the order of the outputs"]]
    rows += [[_plain(task), _classes(labels)] for task, labels in tasks.items()]
    return f"A head for each task:\n\n{_table(rows)}"


def _classes(labels: LabelSpace | None) -> str:
    if labels is None:
        return "its classes are unknown"
    names = [_plain(name) for name in labels.shown[:_CLASSES]]
    more = f", … ({len(labels)})" if len(labels) > _CLASSES else ""
    return ", ".join(names) + more


def _results(report: Mapping[str, Any]) -> str:
    results = report.get("evaluation", {})
    if not results.get(MERGED):
        return "It was not measured: the run had no task pool."
    measured = Evaluation(results, report["shares_of_experts"], report["experts"])
    rows = accuracy_rows(results, measured.means)
    controls = set(report["controls"])
    rows[0] = [_plain(heading) for heading in rows[0]]
    for row in rows[1:]:
        name = row[0]
        row[0] = f"**{name}**" if name == MERGED else _plain(name)
        row[0] += " (control)" if name in controls else ""
    images = {
        task: int(found["images"]) for task, found in results[MERGED].items() if "images" in found
    }
    counted = ", ".join(f"{_plain(task)}: {count}" for task, count in images.items())
    lines = [
        "Accuracy in percent; a dash is a task that a network has no outputs for."
        + (" A control is what the merge has to beat." if controls else "")
        + (f" Images of each task: {counted}." if counted else ""),
        _table(rows),
    ]
    if "of experts" in measured.means:
        lines.append("*of experts* is the mean of the accuracies as shares of the experts' own.")
    return "\n\n".join(lines)


def _loading(path: Path) -> str:
    lines = [f"```python\n{with_package(path)}\n```"]
    bare = without_package(path)
    if bare is not None:
        lines += [f"Without {LIBRARY}:", f"```python\n{bare}\n```"]
    else:
        name = architecture_name(path)
        of = "" if name is None else f" The architecture is `{name}`."
        task = " task=TASK" if written_tasks(path) else ""
        lines.append(
            f"For use without {LIBRARY}, `fusion_bench export={path.name}{task} to=model.onnx` "
            f"writes a plain network (or `.pt`, `.safetensors`).{of}"
        )
    return "\n\n".join(lines)


def _made_by(report: Mapping[str, Any]) -> str:
    lines = []
    if overrides := report["choices"].get("overrides"):
        command = " \\\n    ".join(["fusion_bench", *map(shlex.quote, overrides)])
        lines.append(f"```bash\n{command}\n```")
    environment = report["environment"]
    lines.append(
        f"{LIBRARY} {report['fusion']}, PyTorch {environment['torch']}, Python "
        f"{environment['python']}, {environment['time'][:10]}. `report.json` has every measurement."
    )
    return "\n\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns without any text are omitted."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in zip(*kept, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(kept) + "|", *lines[1:]])


def _plain(text: str) -> str:
    """Return a name as Markdown shows it: nothing in it is markup, all in one line."""
    text = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_[]<>#" else c for c in text)
