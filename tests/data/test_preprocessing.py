from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import (
    EfficientNet_B0_Weights,
    EfficientNet_B1_Weights,
    ResNet18_Weights,
    ResNet50_Weights,
)

from fusion.data import Preprocessing, image_folder, preprocessing_of
from fusion.errors import UserError
from fusion.target import build


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize(
    ("network", "weights", "expected"),
    [
        ("resnet18", "DEFAULT", ResNet18_Weights.DEFAULT),
        ("resnet50", "IMAGENET1K_V1", ResNet50_Weights.IMAGENET1K_V1),
        ("resnet50", "ResNet50_Weights.IMAGENET1K_V2", ResNet50_Weights.IMAGENET1K_V2),
        ("efficientnet_b0", EfficientNet_B0_Weights.DEFAULT, EfficientNet_B0_Weights.DEFAULT),
        ("efficientnet_b1", "DEFAULT", EfficientNet_B1_Weights.DEFAULT),
    ],
)
def test_torchvision_weights_see_what_their_own_transform_makes(
    photos: Path, network: str, weights: object, expected: ResNet18_Weights
) -> None:
    """Bit for bit the same pixels, and the same normalisation up to rounding."""
    spec = {"_target_": f"torchvision.models.{network}", "weights": weights, "num_classes": 1000}
    dataset = image_folder(
        photos, preprocessing=preprocessing_of(spec), in_memory=False, per_class=1
    )
    theirs = expected.transforms()
    for index in range(2):
        image = theirs(Image.open(dataset.path(index)))  # type: ignore[union-attr]
        torch.testing.assert_close(dataset[index][0], image, rtol=0, atol=1e-5)


def test_where_nothing_is_published_nothing_is_said() -> None:
    get_model = {"_target_": "torchvision.models.get_model", "name": "resnet18"}
    assert preprocessing_of({**get_model, "weights": "DEFAULT"}) == Preprocessing(
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=256, crop=224
    )
    detector = "torchvision.models.detection.fasterrcnn_resnet50_fpn"
    for spec in (
        get_model,
        {"_target_": "torchvision.models.resnet18", "weights": None},
        {"_target_": detector, "weights": "DEFAULT"},
        {"_target_": "fusion.models.CifarResNet", "depth": 20},
    ):
        assert preprocessing_of(spec) is None


@pytest.mark.parametrize("weights", ["IMAGENET", "ResNet18_Weights.V9", "ResNet1_Weights.DEFAULT"])
def test_weights_that_do_not_exist_are_refused(weights: str) -> None:
    with pytest.raises(UserError, match=f"resnet18' has no weights '{weights}'"):
        preprocessing_of({"_target_": "torchvision.models.resnet18", "weights": weights})


@pytest.mark.parametrize("name", ["resnet10t.c3_in1k", "mobilenetv3_small_050.lamb_in1k"])
def test_timm_networks_are_prepared_for_as_timm_does(name: str, photos: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False)
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    spec = {"_target_": "timm.create_model", "model_name": name, "pretrained": True}
    found = preprocessing_of(spec)
    dataset = image_folder(photos, preprocessing=found, in_memory=False, per_class=1)
    image = theirs(Image.open(dataset.path(1)))  # type: ignore[union-attr]
    torch.testing.assert_close(dataset[1][0], image, rtol=0, atol=1e-5)
    assert preprocessing_of({"_target_": "timm.create_model", "_args_": [name]}) == found
    wide = preprocessing_of({**spec, "pretrained_cfg_overlay": {"input_size": (3, 96, 96)}})
    assert wide is not None
    assert wide.crop == 96


def test_timm_networks_of_another_preparation_are_refused() -> None:
    pytest.importorskip("timm")
    spec = {"_target_": "timm.create_model", "model_name": "no_such_network"}
    assert preprocessing_of(spec) is None
    squashed = "convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384"
    with pytest.raises(UserError, match="crop mode 'squash'"):
        preprocessing_of({"_target_": "timm.create_model", "model_name": squashed})


def test_yaml_names_the_network_whose_preprocessing_it_wants(photos: Path) -> None:
    network = {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}
    dataset = build(
        {
            "_target_": "fusion.data.image_folder",
            "root": photos,
            "image_size": 112,  # wins; half of 224, so the shorter side becomes half of 256
            "preprocessing": {
                "_target_": "fusion.data.preprocessing_of",
                "_recursive_": False,  # or the network would be built, weights and all
                "architecture": network,
            },
        }
    )
    half = image_folder(photos, image_size=112, resize=128)
    assert torch.equal(dataset.pixels(3), half.pixels(3))
