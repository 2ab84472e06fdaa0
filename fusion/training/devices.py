"""Build Lightning Fabric from options (devices, precision, processes), checked before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from fusion.annotations import told
from fusion.errors import UserError, first_line
from fusion.target import build_nested, check_options, locate, to_install

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Precision = Literal[
    "32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "transformer-engine"
]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]

FABRIC = "lightning.fabric.Fabric"
# Environment variables in which Fabric finds the other machines: PyTorch, SLURM, LSF, MPI.
_CLUSTERS = ("MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def make_fabric(options: Mapping[str, Any], *, target: str = FABRIC, prefix: str = "") -> Fabric:
    """Return the Fabric that some options describe.

    Args:
        options: of ``target``.
        target: import path of the class.
        prefix: prefix of the options for the user, such as ``"fabric."``, for the message.

    Raises:
        UserError: an option is wrong, the machine has no such devices, or several machines are
            requested but no launcher says where they are; Fabric would wait for them forever.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    nodes = options.get("num_nodes", 1)
    if isinstance(nodes, int) and nodes > 1 and not any(name in os.environ for name in _CLUSTERS):
        raise UserError(
            f"{prefix}num_nodes={nodes}: there is no sign of a cluster (none of "
            f"{', '.join(_CLUSTERS)} is set), and the run would wait for the other machines; start "
            f"it through torchrun or the cluster's launcher, or leave num_nodes out"
        )
    constructor = locate(target)
    options = build_nested(dict(options))
    check_options(constructor, target, (), options)
    try:
        made: Fabric = constructor(**options)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(f"{prefix}{key}={value}" for key, value in options.items())
        raise UserError(f"Lightning Fabric refuses {given}: {first_line(error)}") from error
    return made


def check_loggers(loggers: Any, option: str = "fabric.loggers") -> None:
    """Check, before any work, that loggers can be built, without building them.

    Args:
        loggers: a mapping with ``_target_``, a list of such, or nothing; or loggers themselves.
        option: its name, for the message.

    Raises:
        UserError: one is something else, has a wrong option, or needs a package that is missing.
    """
    for logger in loggers if isinstance(loggers, list | tuple) else [loggers] if loggers else []:
        if isinstance(logger, bool | int | float | str) or (
            isinstance(logger, Mapping) and "_target_" not in logger
        ):
            raise UserError(f"{option} is {told(logger)}; give a mapping with _target_, or null")
        if not isinstance(logger, Mapping):
            continue
        target = str(logger["_target_"])
        options = {name: value for name, value in logger.items() if not name.startswith("_")}
        check_options(locate(target), target, (), options)
        missing = [name for name in ("tensorboard", "tensorboardX") if find_spec(name) is None]
        if target.endswith("TensorBoardLogger") and len(missing) == 2:
            raise UserError(f"{option}: {target} needs tensorboard{to_install('tensorboard')}")
