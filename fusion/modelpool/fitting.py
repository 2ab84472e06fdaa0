"""Find the state dict in a checkpoint file that fits an architecture exactly.

Training loops wrap their weights: in an entry of the file (``state_dict``, ``model``, ``ema``), and
under the names of modules around the network (``module.`` of data parallelism, ``_orig_mod.`` of
``torch.compile``, the attribute of a Lightning module). No list of such names is needed: a wrapper
is removed only if its content has exactly the keys and shapes of the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fusion.errors import UserError, shown

Shapes = Mapping[str, tuple[int, ...]]

_WRAPPERS = frozenset({"module", "_orig_mod"})  # parts of names that wrapping a submodule adds
_LISTED = 6  # names that a message lists
_LONGEST = 300  # characters of a message, whatever the file holds


@dataclass(frozen=True)
class Fit:
    """Location of an architecture's tensors in a file.

    Attributes:
        entry: dotted path of the state dict in the file; empty for the file itself.
        prefix: prefix of the names that the architecture's do not have, such as ``"model."``.
        names: the architecture's key → name in the entry. Counters of batch norm may be missing:
            a file from before torch 0.4.1 has none, and a network starts them at 0.
        aside: number of tensors in the entry outside the prefix.
    """

    entry: str
    prefix: str
    names: dict[str, str]
    aside: int

    @property
    def key(self) -> str:
        """Key that selects this fit among several: entry and prefix, dotted."""
        return f"{self.entry}.{self.prefix}".strip(".")

    def told(self) -> str:
        """Describe the removed wrappers; empty if the file is the plain state dict."""
        inside = f" of its entry '{shown(self.entry)}'" if self.entry else ""
        stripped = f", whose names begin with '{shown(self.prefix)}'" if self.prefix else ""
        wrapped = any(self.prefix + key != name for key, name in self.names.items())
        parts = ", wrapped in further modules" if wrapped else ""
        left = f"; {self.aside} outside were left aside" if self.aside else ""
        if not (inside or stripped or parts):
            return ""
        return f"took {len(self.names)} tensors{inside}{stripped}{parts}{left}"


def find_fit(entries: Mapping[str, Shapes], expected: Shapes, *, key: str | None = None) -> Fit:
    """Find the one state dict in a file that fits an architecture.

    Args:
        entries: dotted path → name → shape, for every mapping of tensors in the file.
        expected: key → shape of the architecture.
        key: dotted path of the entry to take, or the beginning of names in it, or both; an empty
            string for the file itself.

    Raises:
        UserError: none fits, with the mismatch of the nearest one, or several do, with the keys to
            choose from.
    """
    found = [fit for entry in entries for fit in _fits(entry, entries[entry], expected)]
    if key is not None:
        exact = [fit for fit in found if fit.key == key]
        found = exact or [fit for fit in found if fit.key.startswith(f"{key}.")]
    if not found:
        raise UserError(_misfit(entries if key is None else _chosen(entries, key), expected))
    if len(found) > 1:
        keys = [shown(fit.key) or "''" for fit in found[:_LISTED]]
        choices = ", ".join(f"key={key}" for key in keys)
        raise UserError(f"holds {len(found)} state dicts that fit; choose one with {choices}")
    return found[0]


def is_counter(key: str) -> bool:
    """Return whether ``key`` names a counter of batch norm, which files may lack."""
    return key.rpartition(".")[2] == "num_batches_tracked"


def _fits(entry: str, shapes: Shapes, expected: Shapes) -> list[Fit]:
    """Return every fit of ``expected`` in one state dict, the plain one first."""
    for names in _namings(shapes):
        found = []
        for prefix in _prefixes(names, expected):
            inside = {name for name in names if name.startswith(prefix)}
            missing = [key for key in expected if prefix + key not in names]
            if len(inside) + len(missing) == len(expected) and all(map(is_counter, missing)):
                taken = {key: names[prefix + key] for key in expected if prefix + key in names}
                if all(shapes[name] == expected[key] for key, name in taken.items()):
                    found.append(Fit(entry, prefix, taken, len(names) - len(inside)))
        if found:
            return found
    return []


def _namings(shapes: Shapes) -> Iterator[dict[str, str]]:
    """Yield the names unchanged, and without the parts added by wrapped submodules."""
    yield {name: name for name in shapes}
    bare = {_without_wrappers(name): name for name in shapes}
    if len(bare) == len(shapes) and bare.keys() != shapes.keys():
        yield bare


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(names: Mapping[str, str], expected: Shapes) -> list[str]:
    """Return the prefixes of the architecture's longest key wherever it occurs."""
    kept = [key for key in expected if not is_counter(key)]
    if not kept:
        return []
    anchor = max(kept, key=len)
    before = {name.removesuffix(anchor) for name in names if name.endswith(anchor)}
    return sorted(prefix for prefix in before if not prefix or prefix.endswith("."))


def _chosen(entries: Mapping[str, Shapes], key: str) -> dict[str, Shapes]:
    """Return the entries at and below ``key``, to explain why they do not fit."""
    below = {e: shapes for e, shapes in entries.items() if f"{e}.".startswith(f"{key}.")}
    if below:
        return below
    for entry in sorted(entries, key=len, reverse=True):
        start = f"{entry}." if entry else ""
        prefix = f"{key.removeprefix(start)}."
        if key.startswith(start) and any(name.startswith(prefix) for name in entries[entry]):
            shapes = entries[entry]
            return {key: {n[len(prefix) :]: s for n, s in shapes.items() if n.startswith(prefix)}}
    known = [shown(entry) for entry in entries if entry][:_LISTED]
    raise UserError(
        f"has no entry with tensors named '{shown(key)}' (entries: {', '.join(known) or 'none'})"
    )


def _misfit(entries: Mapping[str, Shapes], expected: Shapes) -> str:
    """Return a clause on how the nearest state dict differs from the architecture."""
    candidates = [
        (sum(prefix + key in shapes for key in expected), -len(shapes), entry, prefix)
        for entry, shapes in entries.items()
        for prefix in {"", _common_prefix(shapes), *_prefixes(dict.fromkeys(shapes, ""), expected)}
    ]
    if not candidates:
        return "holds no tensors"
    shared, _, entry, prefix = max(candidates)
    shapes = {n[len(prefix) :]: s for n, s in entries[entry].items() if n.startswith(prefix)}
    where = f"its entry '{shown(entry, 30)}' does not fit" if entry else "does not fit"
    before = f"all {len(shapes)} keys begin with '{shown(prefix, 30)}'" if prefix else ""
    if len(shapes) < len(entries[entry]):
        before = before.replace("all ", "", 1)
    if not shared:
        first, other = (shown(next(iter(keys), ""), 40) for keys in (shapes, expected))
        parts = [
            f"{len(shapes)} of {len(shapes)} keys differ; the first: the file has '{first}', "
            f"the architecture '{other}'"
        ]
    else:
        missing = [key for key in expected if key not in shapes and not is_counter(key)]
        unknown = [key for key in shapes if key not in expected]
        reshaped = [key for key in expected if shapes.get(key, expected[key]) != expected[key]]
        parts = [_counted(missing, "missing")] if missing else []
        parts += [_counted(unknown, "unknown to the architecture")] if unknown else []
        if reshaped:
            theirs, ours = (shown(str(of[reshaped[0]]), 30) for of in (shapes, expected))
            parts.append(
                f"{_counted(reshaped, 'of another shape')} is {theirs}, the architecture has {ours}"
            )
    text = "; ".join([*([before] if before else []), *parts])
    return shown(f"{where} the architecture: {text}", _LONGEST)


def _counted(keys: list[str], what: str) -> str:
    number = "1 tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"
    return f"{number} {what}{', the first:' if len(keys) > 1 else ':'} {shown(keys[0], 40)}"


def _common_prefix(shapes: Shapes) -> str:
    """Return the common dotted prefix of names, with the last dot."""
    first, last = (name.split(".") for name in (min(shapes), max(shapes)))
    common: list[str] = []
    for part, other in zip(first[:-1], last[:-1], strict=False):
        if part != other:
            break
        common.append(part)
    return "".join(f"{part}." for part in common)
