"""Strip pretrained weights from the mapping of an architecture.

A checkpoint has its own weights, and a structure on the meta device has none. Fetching the weights
that torchvision or timm publish would be a useless download.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fusion.errors import UserError
from fusion.target import locate

TIMM = "timm.create_model"

# Options of a network that torchvision's weights change besides its tensors.
_IMPLIED: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False},
    "inception_v3": {"transform_input": True},
}

_CHANGED_BY_WEIGHTS = tuple(
    f"torchvision.models.{package}" for package in ("detection", "segmentation", "optical_flow")
)


def in_torchvision(target: str) -> bool:
    """Return whether ``target`` lies below ``torchvision.models``."""
    return target.startswith("torchvision.models.")


def without_pretrained_weights(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``spec`` without the weights that torchvision's or timm's constructors would fetch.

    The structure stays the one with those weights: where they imply other options (the input
    transform of GoogLeNet), these are named instead. A mapping with another target is returned
    unchanged.

    Raises:
        UserError: ``weights`` of a detection, segmentation or optical-flow network, which change
            its structure in ways that have no option, or a target that does not exist.
    """
    target = str(spec.get("_target_"))
    if in_torchvision(target):
        return _torchvision(dict(spec), target)
    if target == TIMM:
        return _timm(dict(spec))
    return dict(spec)


def _timm(spec: dict[str, Any]) -> dict[str, Any]:
    named = zip(inspect.signature(locate(TIMM)).parameters, spec.pop("_args_", ()), strict=False)
    spec = {**spec, **dict(named), "pretrained": False}
    spec.pop("checkpoint_path", None)
    return spec


def _torchvision(spec: dict[str, Any], target: str) -> dict[str, Any]:
    given = next(filter(None, [spec.pop(name, None) for name in ("weights", "pretrained")]), None)
    spec.pop("pretrained_backbone", None)
    if "weights_backbone" in inspect.signature(locate(target)).parameters:
        spec["weights_backbone"] = None  # unlike weights, it has a default that is fetched
    if given is None:
        return spec
    if target.startswith(_CHANGED_BY_WEIGHTS):
        raise UserError(
            f"{target}: weights = {given!r} would change the structure of the network that a "
            f"checkpoint fills; leave weights out"
        )
    name = target.rpartition(".")[2]
    if name == "get_model":
        name = str(spec.get("name", next(iter(spec.get("_args_", ())), "")))
    return {**_IMPLIED.get(name, {}), **spec}
