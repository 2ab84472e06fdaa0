"""Pools by name from Python, composed as by the command, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fusion.cli.configuration import composed
from fusion.cli.folders import choices
from fusion.cli.help import description
from fusion.config_folder import config_folder
from fusion.errors import UserError
from fusion.modelpool import BaseModelPool
from fusion.options import FilePath, Seed, Text, checked
from fusion.target import build
from fusion.taskpool import BaseTaskPool, ClassificationTaskPool

if TYPE_CHECKING:
    import pandas as pd

Pool = TypeVar("Pool", BaseModelPool, BaseTaskPool)

_GROUPS = ("modelpool", "taskpool")


@checked
def load_modelpool(
    name: Text,
    *,
    overrides: Sequence[str] = (),
    seed: Seed = 0,
    config_dir: FilePath | None = None,
) -> BaseModelPool:
    """Return the pool of ``fusion_bench modelpool=NAME``.

    Nothing is trained or read before a member is requested.

    Args:
        name: of a pool; :func:`pools` lists those that come with this package.
        overrides: further settings in the form of the command, such as
            ``"modelpool.models.a.epochs=3"`` or ``"path.cache_dir=FOLDER"``.
        seed: the command's ``seed``: of members that are trained, and of data that are drawn.
        config_dir: a folder of custom YAML, as for ``--config-dir``.

    Raises:
        UserError: there is no such pool or setting, or a value that it needs is missing.

    Example::

        >>> import fusion
        >>> pool = fusion.load_modelpool("digits_tasks")
        >>> pool.model_names
        ['digit', 'parity', 'below_five', 'quarter_turn']
    """
    chosen = [f"modelpool={name}", f"seed={seed}", *overrides]
    return _made(composed(chosen, ("modelpool",), config_dir=config_dir), BaseModelPool)


@checked
def load_taskpool(
    name: Text,
    *,
    pool: BaseModelPool | None = None,
    overrides: Sequence[str] = (),
    seed: Seed = 0,
    config_dir: FilePath | None = None,
) -> BaseTaskPool:
    """Return the tasks that ``fusion_bench taskpool=NAME`` measures.

    Args:
        name: of a task pool; :func:`pools` lists those that come with this package.
        pool: the pool whose networks will be measured. Images whose preprocessing the YAML does not
            give are prepared as the weights of its base expect. Not needed for pools of digits.
        overrides, seed, config_dir: as for :func:`load_modelpool`.

    Raises:
        UserError: there is no such task pool or setting, or a value that it needs is missing.

    Example::

        >>> import fusion
        >>> tasks = fusion.load_taskpool("digits_tasks")
        >>> tasks.task_names
        ['digit', 'parity', 'below_five', 'quarter_turn']
    """
    chosen = [f"taskpool={name}", f"seed={seed}", *overrides]
    tasks = _made(composed(chosen, ("taskpool",), config_dir=config_dir), BaseTaskPool)  # type: ignore[type-abstract]
    if pool is not None and isinstance(tasks, ClassificationTaskPool):
        tasks.preprocessing = pool.preprocessing
    return tasks


def pools() -> pd.DataFrame:
    """Return one row for each pool that comes with this package.

    The columns are ``group`` (``modelpool`` or ``taskpool``), ``name`` and ``summary``.

    Example::

        >>> import fusion
        >>> table = fusion.pools()
        >>> "digits_tasks" in set(table.loc[table["group"] == "taskpool", "name"])
        True
    """
    import pandas as pd

    folder = config_folder()
    rows = [
        {"group": group, "name": name, "summary": description(folder / group / f"{name}.yaml")}
        for group in _GROUPS
        for name in choices(group, [folder])
    ]
    return pd.DataFrame(rows)


def _made(values: Mapping[str, Any], kind: type[Pool]) -> Pool:
    ((group, spec),) = values.items()
    made = build(spec)
    if not isinstance(made, kind):
        raise UserError(f"{group} must be a {kind.__name__}, not a {type(made).__name__}")
    return made
