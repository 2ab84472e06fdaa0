"""Methods by name, from plain Python: the presets of ``config/method/`` without Hydra."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from fusion.config_folder import config_folder
from fusion.elsewhere import OPTIONS, choice_hint
from fusion.errors import UserError, suggestion
from fusion.method.base import BaseAlgorithm
from fusion.target import build, locate

if TYPE_CHECKING:
    import pandas as pd

_ARXIV = re.compile(r"arXiv[\s:]*(\d{4}\.\d{4,5})")
# Values of references in the YAML of a method without Hydra; nothing is cached on disk.
_REFERENCES: dict[str, Any] = {"${seed}": 0, "${path.cache_dir}": None}


def merge(models: object, method: str = "simple_average", **options: Any) -> nn.Module:
    """Merge networks in one line.

    Args:
        models: the input of :meth:`BaseAlgorithm.run`: a pool, a ``dict[str, nn.Module]`` with the
            base as ``_pretrained_``, or a list of experts.
        method: name of a method, as in ``fusion_bench method=…``; :func:`methods` lists them.
        options: of the method or of its rule, by their names in the YAML.

    Returns:
        the merged network; a :class:`~fusion.models.MultiTaskNetwork` where the experts have
        heads of different tasks.

    Raises:
        UserError: there is no such method or option, or the pool cannot be merged by it.

    Example::

        >>> import fusion
        >>> from fusion.models import CifarResNet
        >>> base, a, b = (CifarResNet(8) for _ in range(3))
        >>> pool = {"_pretrained_": base, "a": a, "b": b}
        >>> merged = fusion.merge(pool, "ties_merging", density=0.5)
        >>> type(merged).__name__
        'CifarResNet'
    """
    return algorithm(method, **options).run(models)


def algorithm(method: str, **options: Any) -> BaseAlgorithm:
    """Return the algorithm called ``method`` with some options changed.

    Raises:
        UserError: there is no such method or option.
    """
    return configured(preset(method), method, **options)


def configured(spec: Mapping[str, Any], method: str, **options: Any) -> BaseAlgorithm:
    """Return the algorithm that a mapping describes, with some options changed.

    Args:
        spec: mapping with ``_target_``; an option may belong to the rule inside it.
        method: its name in messages.
        options: by name.

    Raises:
        UserError: there is no such option, or the mapping describes no algorithm.
    """
    changed = copy.deepcopy(dict(spec))
    for name, value in options.items():
        owner = _owner(changed, name)
        if owner is None:
            known = list(_options(changed))
            ours = OPTIONS.get(name)
            hint = f"; here it is called '{ours}'" if ours in known else suggestion(name, known)
            raise UserError(
                f"method {method} has no option '{name}'{hint} (options: {', '.join(known)})"
            )
        owner[name] = value
    made = build(changed)
    if not isinstance(made, BaseAlgorithm):
        raise UserError(f"method {method} is no algorithm but a {type(made).__name__}")
    return made


def has_option(spec: Mapping[str, Any], name: str) -> bool:
    """Return whether a method that a mapping describes, or a rule inside it, has an option."""
    return name in _options(spec)


def method_names() -> list[str]:
    """Return the names of the methods that come with this package."""
    return sorted(file.stem for file in (config_folder() / "method").glob("*.yaml"))


def preset(method: str) -> dict[str, Any]:
    """Return the mapping with ``_target_`` of a method from its YAML file.

    Raises:
        UserError: there is no such method.
    """
    file = config_folder() / "method" / f"{method}.yaml"
    if not file.is_file():
        known = method_names()
        raise UserError(
            f"there is no method '{method}'{choice_hint(method, known)} (there are "
            f"{', '.join(known)})"
        )
    found: dict[str, Any] = {}
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    for default in values.pop("defaults", []):
        if default != "_self_":
            found |= preset(default)
    for key, value in values.items():
        # A custom rule replaces the default's; the two are not mixed.
        found[key] = _REFERENCES.get(value, value) if isinstance(value, str) else value
    return found


def methods() -> pd.DataFrame:
    """Return one row per method: ``name``, ``summary``, ``needs`` and ``paper``.

    ``needs`` states the requirements of a method in addition to the experts, ``paper`` is its arXiv
    number.

    Example::

        >>> import fusion
        >>> table = fusion.methods().set_index("name")
        >>> table.loc["regmean", "needs"], table.loc["regmean", "paper"]
        ('images without labels', '2212.09849')
    """
    import pandas as pd

    rows = []
    for name in method_names():
        spec = preset(name)
        about = spec.get("rule") or spec
        if str(about["_target_"]) == "???":
            continue
        target = locate(str(about["_target_"]))
        needs = build(about).needs if "rule" in spec else getattr(target, "needs", ())
        rows.append(
            {
                "name": name,
                "summary": summary(name),
                "needs": ", ".join(sorted(need.value for need in needs)),
                "paper": paper(name),
            }
        )
    return pd.DataFrame(rows)


def summary(method: str) -> str:
    """Return the summary of a method, the first line of its YAML file."""
    file = config_folder() / "method" / f"{method}.yaml"
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def paper(method: str) -> str:
    """Return the arXiv number of a method's paper, ``""`` where its docstring names none."""
    spec = preset(method)
    target = str((spec.get("rule") or spec)["_target_"])
    if target == "???":
        return ""
    found = locate(target)
    number = _ARXIV.search(found.__doc__ or "") or _ARXIV.search(_module_doc(found))
    return number[1] if number else ""


def _module_doc(target: Any) -> str:
    return importlib.import_module(target.__module__).__doc__ or ""


def _owner(spec: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the mapping that holds an option: the method's, or that of a rule inside it."""
    if name in spec and not name.startswith("_"):
        return spec
    rule = spec.get("rule")
    return _owner(rule, name) if isinstance(rule, dict) else None


def _options(spec: Mapping[str, Any]) -> dict[str, Any]:
    rule = spec.get("rule")
    inner = _options(rule) if isinstance(rule, Mapping) else {}
    return {**{k: v for k, v in spec.items() if not k.startswith("_")}, **inner}
