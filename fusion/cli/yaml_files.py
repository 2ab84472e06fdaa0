"""Checks of a user's YAML files; messages name the file, the line and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from fusion.errors import UserError, shown

# A configuration of the size of ours has some hundred entries; aliases that stand for more than
# this many together are a mistake, or an attack on memory ("billion laughs").
_MOST_ENTRIES = 100_000
_PREFIX = "tag:yaml.org,2002:"
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")
_MOST_DIGITS = 4300  # of a whole number that Python reads
_DEFAULT = "give a list of entries such as '- method: dummy' and '- _self_'"


def check_files(folders: Sequence[Path], overrides: Sequence[str]) -> None:
    """Check the selected files of a user, also that none takes unbounded time to read.

    Args:
        folders: the user's.
        overrides: choices and settings.

    Raises:
        UserError: names the file, the line where there is one, and the cure.
    """
    for file in yaml_files(folders):
        text = file.read_bytes()
        aliases = b"&" in text and b"*" in text
        chosen = any(
            f"{file.parent.relative_to(folder)}={file.stem}" in overrides
            for folder in folders
            if file.is_relative_to(folder)
        )
        if (aliases or chosen) and (wrong := fault(file)) and (chosen or "alias" in wrong):
            raise UserError(wrong)


def default_place(folders: Sequence[Path], name: str) -> str | None:
    """Return the file and line where a user's list of defaults has ``name``, or ``None``."""
    for file in yaml_files(folders):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if re.match(rf"\s*-.*(?<!\w){re.escape(name)}(?!\w)", line):
                return f"'{file}', line {number}"
    return None


def first_fault(folders: Sequence[Path]) -> str | None:
    """Return the mistake in the first file that cannot be used, or ``None``."""
    faults = (fault(file) for file in yaml_files(folders))
    return next((wrong for wrong in faults if wrong is not None), None)


def yaml_files(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the YAML files in ``folders``, in their order."""
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            if file.is_file():
                yield file


def fault(file: Path) -> str | None:
    """Return the mistake in a YAML file in one sentence, or ``None``."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return (
            f"'{file}', line {line}: the byte {raw[error.start]:#x} is not UTF-8; save it as UTF-8"
        )
    try:
        return _fault_of_tree(file, yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        return _fault_of_syntax(file, error)
    except yaml.YAMLError as error:  # a character that YAML does not know
        return f"'{file}': {shown(' '.join(str(error).split()), 200)}; save it as plain UTF-8 text"
    except RecursionError:
        return f"'{file}' is nested too deeply; write it with fewer levels"


def _fault_of_syntax(file: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"'{file}'" + (f", line {mark.line + 1}" if mark is not None else "")
    problem = " ".join(str(error.problem or error.context).split())
    if "'\\t'" in problem:
        return f"{where}: there is a tab; YAML is indented by spaces only"
    context = f" {' '.join(error.context.split())}" if error.context else ""
    return f"{where} is no YAML{context}: {problem}; correct it there or in the line above"


def _fault_of_tree(file: Path, root: yaml.Node | None) -> str | None:
    if root is None:
        return None
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        return f"'{file}', line {root.start_mark.line + 1}: it is {kind}; give name: value pairs"
    wrong = _fault_of_aliases(file, root) or _fault_of_entries(file, root)
    for key, value in root.value:
        if wrong is None and key.value == "defaults":
            wrong = _fault_of_defaults(file, value)
    return wrong


def _fault_of_aliases(file: Path, root: yaml.Node) -> str | None:
    """Count the entries with aliases expanded."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()
    circles: list[int] = []

    def size(node: yaml.Node) -> int:
        if id(node) in inside:
            circles.append(node.start_mark.line + 1)
        elif id(node) not in sizes:
            inside.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            inside.discard(id(node))
        return sizes.get(id(node), 0)

    total = size(root)
    if circles:
        return f"'{file}', line {circles[0]}: an alias stands for itself; write it out"
    if total > _MOST_ENTRIES:
        return f"'{file}': its aliases stand for {total} entries; write out what is meant"
    return None


def _fault_of_entries(file: Path, root: yaml.Node) -> str | None:
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        where = f"'{file}', line {node.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, _ in node.value:
                where = f"'{file}', line {key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode):
                    return f"{where}: a name is a list or a mapping; give text"
                if key.tag.endswith(":null"):
                    return f"{where}: the name before ':' is empty; give one"
                if key.value in names:
                    return f"{where}: the name '{key.value}' stands twice; leave one of them out"
                names.add(key.value)
        elif isinstance(node, yaml.ScalarNode) and (wrong := _fault_of_value(node)):
            return f"{where}: {wrong}"
        if not node.tag.startswith(_PREFIX) or node.tag.removeprefix(_PREFIX) not in _TAGS:
            tag = shown(node.tag.removeprefix(_PREFIX))
            return f"{where}: the tag '{tag}' is not read; leave it out"
        waiting += reversed(list(_children(node)))
    return None


def _fault_of_value(node: yaml.ScalarNode) -> str | None:
    if node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
        return f"a number of {len(node.value)} digits; give a smaller one"
    if "\0" in node.value:
        return "a text with a null character; leave it out"
    if "${" in node.value:
        try:
            parse(node.value)
        except GrammarParseError:
            return f"'{shown(node.value)}' is no reference; write '${{name}}'"
    return None


def _fault_of_defaults(file: Path, node: yaml.Node) -> str | None:
    entries = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for entry in entries:
        where = f"'{file}', line {entry.start_mark.line + 1}"
        kinds, choice = r":str$", entry
        if isinstance(entry, yaml.MappingNode) and len(entry.value) == 1:
            kinds, choice = r":(str|null|seq)$", entry.value[0][1]
        if entry is node or not re.search(kinds, choice.tag):
            return f"{where}: this is no default; {_DEFAULT}"
        if entry.value == file.stem:
            return f"{where}: the file names itself in its defaults; leave that out"
    return None


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value
