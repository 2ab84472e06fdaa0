"""Preprocessing that published weights expect, read from their publication."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusion.errors import UserError
from fusion.options import Pixels, Text, checked
from fusion.target import locate


@checked
@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images for a network.

    Args:
        mean: of each channel, on the scale 0..1, subtracted.
        std: of each channel, on the scale 0..1, divided by afterwards.
        resize: pixels that the shorter side is scaled to.
        crop: side in pixels of the square then taken from the middle.
        interpolation: resampling filter, such as ``bilinear`` or ``bicubic``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Pixels
    crop: Pixels
    interpolation: Text = "bilinear"

    def __post_init__(self) -> None:
        # YAML has lists only.
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))


def preprocessing_of(architecture: Mapping[str, Any]) -> Preprocessing | None:
    """Return the preprocessing of the weights that ``architecture`` names; nothing is downloaded.

    Args:
        architecture: mapping with ``_target_``. Of torchvision's networks, ``weights`` says
            which (``DEFAULT``, ``IMAGENET1K_V1``, ``ResNet18_Weights.DEFAULT`` or the enum's
            member). Of ``timm.create_model``, ``model_name`` says which, pretrained or not.

    Returns:
        None where no published weights are named, or none that classify images.

    Raises:
        UserError: weights that do not exist, or whose preprocessing is not scaling the shorter side
            and cropping the middle.
    """
    target = str(architecture["_target_"])
    if target.startswith("torchvision.models."):
        return _torchvision(architecture, target)
    if target in ("timm.create_model", "timm.models.create_model"):
        return _timm(architecture)
    return None


def _torchvision(architecture: Mapping[str, Any], target: str) -> Preprocessing | None:
    from torchvision.models import get_model_weights, get_weight

    weights = architecture.get("weights")
    if weights is None:
        return None
    name = str(architecture.get("name", "")) if target.endswith(".get_model") else target
    if isinstance(weights, str):
        try:
            if "." in weights:
                weights = get_weight(weights)
            else:
                known = get_model_weights(name if "." not in name else locate(name))
                weights = known[weights]
        except (KeyError, ValueError) as error:
            raise UserError(f"weights: '{target}' has no weights {weights!r} ({error})") from error
    transforms = weights.transforms()
    wanted = ("mean", "std", "resize_size", "crop_size", "interpolation")
    if not all(hasattr(transforms, option) for option in wanted):
        return None  # of detection, segmentation, video
    return Preprocessing(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        resize=_one(transforms.resize_size),
        crop=_one(transforms.crop_size),
        interpolation=transforms.interpolation.value,
    )


def _timm(architecture: Mapping[str, Any]) -> Preprocessing | None:
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    args = list(architecture.get("_args_", ()))
    name = architecture.get("model_name", args[0] if args else None)
    config = get_pretrained_cfg(str(name))
    if config is None:
        return None
    overlay = architecture.get("pretrained_cfg_overlay") or {}
    data = resolve_data_config(pretrained_cfg={**config.to_dict(), **overlay})
    if data["crop_mode"] != "center":
        raise UserError(
            f"model_name: the weights '{name}' are prepared for by crop mode '{data['crop_mode']}',"
            f" not by a crop of the middle; give mean, std, resize and image_size yourself"
        )
    crop = int(data["input_size"][-1])
    return Preprocessing(
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        resize=math.floor(crop / data["crop_pct"]),  # as timm's evaluation does
        crop=crop,
        interpolation=data["interpolation"],
    )


def _one(size: int | Sequence[int]) -> int:
    return int(size) if isinstance(size, int) else int(size[0])
