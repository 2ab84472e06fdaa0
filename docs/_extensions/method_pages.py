"""Writes one page for each method before the manual is read: from its YAML and its docstring."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measured import Table, first_command, tables

from fusion.config_folder import config_folder
from fusion.merging import MatrixRule, Need, Rule, TaskRule
from fusion.method.presets import method_names, paper, preset, summary
from fusion.target import build

FOLDER = "methods"
DOCS = Path(__file__).parent.parent
TABLES = tuple(
    DOCS / f"{page}.md" for page in ("benchmark_results", "benchmark_cifar10", "methods")
)
GROUPS = {
    "From the weights alone": "These need no data, only the members of the pool.",
    "From weights and images": "These also look at some of the experts' training images.",
    "Other algorithms": "These are algorithms of their own, not rules of the merge pipeline.",
    "Analyses and tools": "These study a pool or wrap another method.",
}
_TOOLS = ("custom", "dummy", "interpolation_barrier", "merge", "search")
_LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: (?P<value>[^#]*?))?(?: *# (?P<about>.*))?$")
_EXAMPLES = {"interpolation_barrier": "digits_pair"}


def write_pages(folder: Path) -> None:
    """Write the pages of all methods and their table of contents into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {name: page(name) for name in method_names()}
    pages["index"] = index(list(pages))
    for name, text in pages.items():
        file = folder / f"{name}.rst"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
    for file in folder.glob("*.rst"):
        if file.stem not in pages:
            file.unlink()


def index(names: list[str]) -> str:
    """Return the page that lists the methods by what they need."""
    lines = [*heading("Methods, one by one", "="), ""]
    for group, about in GROUPS.items():
        members = [name for name in names if group_of(name) == group]
        lines += [*heading(group, "-"), "", about, ""]
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 30 70", ""]
        lines += ["   * - ``method=``", "     - what it does"]
        for name in members:
            lines += [f"   * - :doc:`{name}`", f"     - {plain(summary(name))}"]
        lines += ["", ".. toctree::", "   :hidden:", "", *(f"   {name}" for name in members), ""]
    return "\n".join(lines)


def page(name: str) -> str:
    """Return the page of one method."""
    spec = preset(name)
    about = spec.get("rule") or spec
    target = str(about["_target_"])
    rule = build(about) if "rule" in spec and target != "???" else None
    lines = [*heading(name, "="), "", plain(summary(name)), ""]
    if name not in ("custom", "merge"):
        pool = _EXAMPLES.get(name, "digits_tasks")
        command = f"fusion_bench method={name} modelpool={pool} taskpool={pool}"
        if name == "interpolation_barrier":
            command = f"fusion_bench method={name} modelpool={pool}"
        if name == "weighted_average":
            command += " 'method.weights=[3,1,1,1]'"
        lines += [".. code-block:: bash", "", f"   {command}", ""]
    if rule is not None:
        python = f'model = fusion.merge(pool, "{name}")'
        if name == "weighted_average":
            python = f'model = fusion.merge(pool, "{name}", weights=[3, 1, 1, 1])'
        lines += [".. code-block:: python", "", f"   {python}", ""]
        lines += [*heading("At a glance", "-"), ""]
        for term, text in facts(rule).items():
            lines += [f"**{term}.** {text}", ""]
    if number := paper(name):
        lines += [f"**Paper.** `arXiv {number} <https://arxiv.org/abs/{number}>`__", ""]
    if name == "merge":  # its rule is the reader's; the page is about the pipeline
        target = str(spec["_target_"])
    if target != "???":
        module = target.rpartition(".")[0]
        lines += [*heading("Definition", "-"), ""]
        lines += [
            f".. currentmodule:: {module}",
            "",
            f".. autoclass:: {target}",
            "   :no-index:",
            "",
        ]
    lines += measured(name)
    lines += options(name, rule)
    return "\n".join(lines)


def facts(rule: Rule) -> dict[str, str]:
    """Return what the pipeline does with the parts of a network under a rule."""
    needs = [need.value for need in Need if need in rule.needs]
    found = {"Needs": "The experts" + (f", {' and '.join(needs)}" if needs else " alone") + "."}
    if isinstance(rule, MatrixRule):
        found["Convolutions"] = (
            "A kernel is merged as the matrices of its groups: one row for each output channel, "
            "one column for each input channel and kernel position. Depthwise kernels, biases and "
            "norm parameters are averaged."
        )
    elif rule.affine:
        found["Convolutions"] = (
            "Kernel and bias are solved together, as one linear map of the image patches under "
            "the kernel, for each group. Tensors that the data do not reach are averaged."
        )
    elif rule.elementwise:
        found["Convolutions"] = "Every parameter is merged entry by entry; its shape has no part."
    else:
        found["Convolutions"] = "Every parameter is merged as one tensor, whatever its shape."
    found["Batch norm"] = (
        "It is folded into the layer before it, so that the rule matches what the norm returns."
        if rule.folded
        else "Scale and shift pass through the rule. Running statistics never do: "
        "``batch_norm=auto`` measures them again where the pool has images."
    )
    found["Heads"] = (
        "Merged like any layer where all experts have the same classes; kept, one for each task, "
        "where their classes differ."
    )
    if isinstance(rule, TaskRule) and rule.per_task:
        found["Result"] = "A network for each task, behind one interface."
    if rule.sequential:
        found["Order"] = (
            "Layers are merged from input to output; each is measured behind those merged before."
        )
    return found


def measured(name: str) -> list[str]:
    """Return the rows of a method in the tables of :data:`TABLES`, with what makes them."""
    found: dict[tuple[str, tuple[str, ...]], list[tuple[str, list[str]]]] = {}
    for table in measured_tables():
        rows = [(table.title, row) for row in table.of(name)]
        if rows:
            found.setdefault((table.command, tuple(table.heads)), []).extend(rows)
    if not found:
        return []
    about = (
        "When does it help? :doc:`/benchmark_results`, :doc:`/benchmark_cifar10` and "
        ":doc:`/methods` have these numbers beside those of the other methods."
    )
    lines = [*heading("Measured", "-"), "", about, ""]
    for (command, heads), rows in found.items():
        titles = list(dict.fromkeys(title for title, _ in rows))
        if len(titles) > 1:  # alike tables of several settings: a row per setting
            caption, heads = "", ("setting", *heads[1:])
            cells = [[title, *row[1:]] for title, row in rows]
        else:
            caption, cells = f"{plain(titles[0])} ", [row for _, row in rows]
        lines += [f"{caption}(``{command}``):", ""]
        lines += [".. list-table::", "   :header-rows: 1", "   :class: measured", ""]
        for row in (heads, *cells):
            first, *others = (plain(cell.replace("`", "")) for cell in row)
            lines += [f"   * - {first}", *(f"     - {cell}".rstrip() for cell in others)]
        lines.append("")
    return lines


def measured_tables() -> Iterator[Table]:
    """Yield all tables of :data:`TABLES`; one command makes those of the benchmark."""
    for file in TABLES:
        text = file.read_text(encoding="utf-8")
        command = first_command(text) if file.stem.startswith("benchmark_") else ""
        yield from tables(text, command=command)


def options(name: str, rule: Rule | None) -> list[str]:
    """Return the table of options that the YAML file of a method explains."""
    rows = list(described((config_folder() / "method" / f"{name}.yaml").read_text("utf-8")))
    lines = [*heading("Options", "-"), ""]
    if rows:
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 28 16 56", ""]
        lines += ["   * - option", "     - default", "     - meaning"]
        for key, value, about in rows:
            shown = "required" if value == "???" else f"``{value}``"
            lines += [f"   * - ``{key}``", f"     - {shown}", f"     - {plain(about)}"]
        lines.append("")
    if rule is not None and name != "merge":
        own = "Further options" if rows else "It has no options of its own; options"
        lines += [f"{own}, of alignment, heads, batch norm and shares: :doc:`merge`.", ""]
    elif not rows:
        lines += ["It has none.", ""]
    return lines


def described(yaml_text: str) -> list[tuple[str, str, str]]:
    """Return (option, default, meaning) of each line of a YAML file that sets an option."""
    found = []
    parents: list[tuple[int, str]] = []
    for line in yaml_text.splitlines():
        match = _LINE.match(line)
        if match is None or match["key"] == "defaults":
            continue
        depth = len(match["indent"])
        parents = [(d, key) for d, key in parents if d < depth]
        key = ".".join(["method", *(parent for _, parent in parents), match["key"]])
        if not match["value"]:
            parents.append((depth, match["key"]))
        elif match["key"] != "_target_" or match["value"] == "???":
            found.append((key, match["value"], match["about"] or ""))
    return found


def group_of(name: str) -> str:
    """Return the heading under which a method is listed."""
    spec = preset(name)
    if name in _TOOLS or name.startswith("task_vector_"):
        return "Analyses and tools"
    if "rule" not in spec:
        return "Other algorithms"
    needs = build(spec["rule"]).needs
    data = {Need.IMAGES, Need.LABELS, Need.GRADIENTS} & set(needs)
    return "From weights and images" if data else "From the weights alone"


def plain(text: str) -> str:
    """Return a comment as text: nothing in it is markup."""
    return re.sub(r"([*`|\\])", r"\\\1", text).replace("_ ", r"\_ ").replace("_,", r"\_,")


def heading(text: str, line: str) -> list[str]:
    """Return a heading and the line under it."""
    return [text, line * len(text)]


def setup(app: Any) -> Mapping[str, Any]:
    """Write the pages before Sphinx looks for documents."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / FOLDER))
    return {"parallel_read_safe": True}
