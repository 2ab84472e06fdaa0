"""Lightning Fabric from options: devices, precision, processes; refused before it waits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from fusion.errors import UserError, first_line
from fusion.target import build

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Precision = Literal[
    "32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "transformer-engine"
]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]

FABRIC = "lightning.fabric.Fabric"
# What tells Fabric where the other machines are: of PyTorch, SLURM, LSF, MPI.
_CLUSTERS = ("MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def make_fabric(options: Mapping[str, Any], *, target: str = FABRIC, prefix: str = "") -> Fabric:
    """Return the Fabric that some options describe.

    Args:
        options: of ``target``.
        target: import path of the class.
        prefix: how the user knows the options, such as ``"fabric."``, for the message.

    Raises:
        UserError: an option is wrong, the machine has no such devices, or several machines are
            asked for and nothing says where they are, which Fabric would wait for for ever.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    nodes = options.get("num_nodes", 1)
    if isinstance(nodes, int) and nodes > 1 and not any(name in os.environ for name in _CLUSTERS):
        raise UserError(
            f"{prefix}num_nodes={nodes}: there is no sign of a cluster (none of "
            f"{', '.join(_CLUSTERS)} is set), and the run would wait for the other machines; start "
            f"it through torchrun or the cluster's launcher, or leave num_nodes out"
        )
    try:
        made: Fabric = build({"_target_": target, "_recursive_": False, **options})
    except UserError:
        raise
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        given = ", ".join(f"{prefix}{key}={value}" for key, value in options.items())
        raise UserError(f"Lightning Fabric refuses {given}: {first_line(error)}") from error
    return made
