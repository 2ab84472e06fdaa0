"""The help text: every option of every group, read from the YAML files themselves."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fusion.cli.folders import extra_folders

_WIDTH = 100
_EXAMPLES = """\
Commands to begin with:
  fusion_bench method=snr_selective_merge modelpool=digits taskpool=digits
      train a small network and two experts on real images (once), merge them, measure everything
  fusion_bench method=git_rebasin modelpool=digits_tasks taskpool=digits_tasks merge experts of four
      tasks with separate heads and data
  fusion_bench method=dummy modelpool=digits taskpool=digits
      measure the pretrained model without merging
  fusion_bench -m method=snr_selective_merge method.top_p=0.1,0.3 modelpool=digits taskpool=digits
      a sweep: one job per value, each in a separate folder; table, figures and a page at its end
  fusion_bench experiment=snr_study modelpool=digits
      the whole study as one sweep; with output_path=FOLDER it can be stopped and resumed
  fusion_bench summarize=FOLDER
      write table, figures and page of a sweep again, from its runs' reports
  fusion_bench export=merged.safetensors task=NAME to=plain.safetensors
      one task of a merged network as a plain one: a state dict (.safetensors, .pt) or .onnx
  fusion_bench push=FOLDER to=user/name
      upload a run's network, model card and report to the Hugging Face hub, private by default
  fusion_bench card=NAME modelpool=POOL to=NAME.card.safetensors
      statistics of one expert's images, for a merge elsewhere that never sees the images
"""
_FLAGS = """\
Flags:
  --multirun, -m     run every combination of comma-separated values
  --cfg job          show the composed configuration, run nothing
  --config-dir DIR   add a folder of your own YAML files to the groups below
  --version          show the version
  --hydra-help       Hydra's own flags
"""


def help_text(config_dir: Path, arguments: Sequence[str] = ()) -> str:
    """Return the help: usage, groups, keys, flags, examples.

    With a choice among the arguments (``method=NAME --help``) the options of that choice follow.
    """
    folders = [config_dir, *extra_folders(arguments)]
    parts = [
        "fusion_bench: merge fine-tuned convolutional networks and measure what comes out.\n\n"
        "Usage: fusion_bench modelpool=NAME [method=NAME] [taskpool=NAME] [option=value ...]\n"
    ]
    chosen = [_chosen(folders, argument) for argument in arguments]
    if any(chosen):
        parts += [text for text in chosen if text]
        return "\n".join(parts)
    parts += [_EXAMPLES, "Groups (choose with group=name; its options: group=name --help):"]
    parts += [_group(folders, name) for name in _group_names(folders)]
    parts += ["Keys (set with key=value):\n" + _keys(config_dir / "fusion_bench.yaml"), _FLAGS]
    return "\n".join(parts)


def _group_names(folders: Sequence[Path]) -> list[str]:
    """Return the groups in the order of the primary configuration, nested ones after theirs."""
    found = {
        str(file.parent.relative_to(folder))
        for folder in folders
        for file in folder.rglob("*.yaml")
        if file.parent != folder
    }
    order = ["method", "modelpool", "taskpool", "finetune", "merge", "experiment"]
    order += ["fabric", "path", "hydra"]
    place = {name: index for index, name in enumerate(order)}
    return sorted(found, key=lambda name: (place.get(name.split("/")[0], len(order)), name))


def _group(folders: Sequence[Path], name: str) -> str:
    files = {
        file.stem: file
        for folder in reversed(folders)
        for file in sorted((folder / name).glob("*.yaml"))
    }
    entries = [(stem, description(file)) for stem, file in sorted(files.items())]
    return f"{name}\n" + _columns(entries)


def description(file: Path) -> str:
    """Return the comment that the file begins with; Hydra's own header may precede it."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next((line for line in lines if not line.startswith("# @package")), "")
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def _keys(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [re.match(r"(\w+): .*?(?: # (.*))?$", line) for line in lines]
    return _columns([(match[1], match[2] or "") for match in found if match])


def _columns(entries: Sequence[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in entries), default=0)
    lines = []
    for name, text in entries:
        wrapped = textwrap.wrap(text, _WIDTH - width - 4) or [""]
        lines.append(f"  {name.ljust(width)}  {wrapped[0]}".rstrip())
        lines += [" " * (width + 4) + more for more in wrapped[1:]]
    return "\n".join(lines) + "\n"


def _chosen(folders: Sequence[Path], argument: str) -> str:
    """Return the YAML of a choice such as ``method=dummy``, the options' own documentation."""
    group, equals, name = argument.partition("=")
    if not equals or "." in group:
        return ""
    for folder in folders:
        file = folder / group / f"{name}.yaml"
        if file.is_file():
            body = file.read_text(encoding="utf-8", errors="replace").rstrip()
            return f"{group}={name}\n" + textwrap.indent(body, "  ") + "\n"
    return ""
