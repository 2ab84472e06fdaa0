"""The networks of coverage_table.py: one or more small members of each convolutional family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """How to build a network and what to feed it.

    Attributes:
        build: Makes the network; imports what it needs only then.
        shapes: The shape of each input, without the batch axis.
        forward: What to trace in place of the network's own forward pass.
    """

    build: Callable[[], Any]
    shapes: tuple[Shape, ...] = ((3, 64, 64),)
    forward: Callable[..., Any] | None = None


def image(side: int) -> tuple[Shape, ...]:
    return ((3, side, side),)


def list_of(names: str) -> list[str]:
    return names.split()


# -- classifiers -----------------------------------------------------------------------------------

TIMM = list_of("""
    bat_resnext26ts eca_resnext26ts gcresnet50t gcresnext26ts gernet_s mobileone_s0 mobileone_s1
    regnetz_b16 regnetz_b16_evos regnetz_c16 regnetz_d8 repvgg_a0 repvgg_b1g4 resnet32ts
    resnet50_mlp resnet51q resnext26ts seresnext26ts test_byobnet
    convmixer_768_32
    convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny_hnf convnextv2_atto
    test_convnext test_convnext2 test_convnext3
    cs3darknet_focus_s cs3darknet_s cs3edgenet_x cs3sedarknet_xdw cspdarknet53 cspresnet50
    cspresnet50d cspresnext50 darknet17 darknetaa53 sedarknet21 cspnext_tiny
    densenet121 densenetblur121d
    dla34 dla46_c dla46x_c dla60_res2net dla60_res2next dla60x_c dpn48b dpn68
    efficientnet_b0 efficientnet_b0_g16_evos efficientnet_b0_g8_gn efficientnet_b0_gn
    efficientnet_b1_pruned efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es
    efficientnet_lite0 efficientnet_x_b3 efficientnetv2_rw_t fbnetc_100 gc_efficientnetv2_rw_t
    mixnet_s mnasnet_050 mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv2_035
    semnasnet_050 spnasnet_100 test_efficientnet test_efficientnet_evos test_efficientnet_gn
    test_efficientnet_ln tf_efficientnet_b0 tf_efficientnet_cc_b0_4e tf_efficientnet_es
    tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s tinynet_e
    fasternet_t0 fastvit_t8 fastvit_mci0
    ghostnet_050 ghostnetv2_100 ghostnetv3_050
    hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small hrnet_w18_ssld
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small mambaout_femto test_mambaout
    convformer_s18 poolformer_s12 poolformerv2_s12
    fbnetv3_b lcnet_035 mobilenetv3_large_075 mobilenetv3_small_050 mobilenetv4_conv_aa_medium
    mobilenetv4_conv_blur_medium mobilenetv4_conv_small_035 tf_mobilenetv3_small_minimal_100
    nasnetalarge pnasnet5large
    dm_nfnet_f0 eca_nfnet_l0 nf_ecaresnet26 nf_regnet_b0 nf_resnet26 nf_seresnet26 nfnet_l0
    test_nfnet
    rdnet_tiny
    regnetv_040 regnetx_002 regnety_002 regnety_040_sgn regnetz_005
    repghostnet_050 repvit_m0_9
    res2net50_26w_4s res2net50_48w_2s res2net50d res2next50
    resnest14d resnest50d_1s4x24d resnest50d_4s2x40d
    ecaresnet26t ecaresnet50d_pruned ecaresnetlight ecaresnext26t_32x4d resnet10t resnet18
    resnet18d resnet26t resnet50 resnet50_gn resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d
    seresnet18 seresnext26d_32x4d test_resnet wide_resnet50_2
    resnetv2_18 resnetv2_50 resnetv2_50d_evos resnetv2_50d_frn resnetv2_50d_gn
    resnetv2_50x1_bit
    rexnet_100 rexnetr_100 selecsls42 selecsls60b
    legacy_senet154 legacy_seresnet18 legacy_seresnext26_32x4d
    skresnet18 skresnext50_32x4d starnet_s050 starnet_s1 tresnet_m
    vgg11 vgg11_bn
    ese_vovnet19b_slim ese_vovnet19b_slim_dw ese_vovnet39b_evos eca_vovnet39b vovnet39a
    legacy_xception xception41 xception41p
""")
# Mostly convolutional, with some attention: what of them is covered, the table says.
TIMM_HYBRIDS = list_of("""
    csatv2 edgenext_xx_small edgenext_small_rw efficientformer_l1 efficientvit_b0 focalnet_tiny_srf
    shvit_s1 swiftformer_xs mobilenetv5_300m_enc
""")
TIMM_SIDES = {
    "bat_resnext26ts": 256,
    "inception_resnet_v2": 96, "inception_v3": 96, "inception_v4": 96,
    "nasnetalarge": 96, "pnasnet5large": 96, "legacy_xception": 96,
    "convmixer_768_32": 56, "convformer_s18": 64, "csatv2": 512, "mobilenetv5_300m_enc": 256,
    "edgenext_small_rw": 64, "efficientformer_l1": 224, "vgg11": 32, "vgg11_bn": 32,
}  # fmt: skip
TORCHVISION = list_of("""
    alexnet vgg11 vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet
    inception_v3 squeezenet1_0 mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5
    efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny
""")


def timm_network(name: str) -> Any:
    import timm

    return timm.create_model(name, num_classes=10)


def torchvision_network(name: str) -> Any:
    from torchvision import models

    options = {} if not name.startswith(("googlenet", "inception", "vgg")) else {
        "init_weights": False
    }  # fmt: skip
    return models.get_model(name, weights=None, num_classes=10, **options)


# -- segmentation ----------------------------------------------------------------------------------

SMP = list_of("""
    Unet:resnet18 Unet:mobilenet_v2 Unet:efficientnet-b0 UnetPlusPlus:resnet18 MAnet:resnet18
    Linknet:resnet18 FPN:resnet18 PSPNet:resnet18 PAN:resnet18 DeepLabV3:resnet18
    DeepLabV3Plus:resnet18 UPerNet:resnet18
""")


def torchvision_segmentation(name: str) -> Any:
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5)


def torchvision_segmentation_aux(name: str) -> Any:
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


def smp_network(name: str) -> Any:
    import segmentation_models_pytorch as smp

    kind, encoder = name.split(":")
    return getattr(smp, kind)(encoder, encoder_weights=None, classes=5)


# -- detection: backbone, feature pyramid and heads; anchors, transform and NMS are not traced -----


def detector(name: str) -> Any:
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None, num_classes=5)


def one_stage(model: Any, x: Any) -> Any:
    return model.head(list(model.backbone(x).values()))


def two_stages(model: Any, x: Any) -> Any:
    """Region proposal head, and the box (mask, keypoint) heads on some boxes of each level."""
    from torchvision.ops import roi_align

    features = model.backbone(x)
    heads = model.roi_heads
    boxes = [x.new_tensor([[1.0, 2.0, 9.0, 12.0], [3.0, 0.0, 14.0, 8.0]])] * len(x)

    def crops(size: tuple[int, int]) -> Any:
        return [roi_align(feature, boxes, size, sampling_ratio=2) for feature in features.values()]

    found = [model.rpn.head(list(features.values()))]
    found += [heads.box_predictor(heads.box_head(c)) for c in crops(heads.box_roi_pool.output_size)]
    if heads.has_mask():
        size = heads.mask_roi_pool.output_size
        found += [heads.mask_predictor(heads.mask_head(c)) for c in crops(size)]
    if heads.has_keypoint():
        size = heads.keypoint_roi_pool.output_size
        found += [heads.keypoint_predictor(heads.keypoint_head(c)) for c in crops(size)]
    return found


DETECTORS: dict[str, tuple[int, Callable[..., Any]]] = {
    "retinanet_resnet50_fpn": (128, one_stage),
    "retinanet_resnet50_fpn_v2": (128, one_stage),
    "fcos_resnet50_fpn": (128, one_stage),
    "ssd300_vgg16": (300, one_stage),
    "ssdlite320_mobilenet_v3_large": (320, one_stage),
    "fasterrcnn_resnet50_fpn": (128, two_stages),
    "fasterrcnn_resnet50_fpn_v2": (128, two_stages),
    "fasterrcnn_mobilenet_v3_large_fpn": (128, two_stages),
    "maskrcnn_resnet50_fpn": (128, two_stages),
    "keypointrcnn_resnet50_fpn": (128, two_stages),
}


# -- video and optical flow ------------------------------------------------------------------------


def video_network(name: str) -> Any:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=10)


def optical_flow(name: str) -> Any:
    from torchvision import models

    return models.get_model(name, weights=None)


def three_updates(model: Any, first: Any, second: Any) -> Any:
    return model(first, second, num_flow_updates=3)


# -- audio -----------------------------------------------------------------------------------------


def m5() -> Any:
    """M5 of Dai et al., 2016 (1610.00087): four convolutions on the wave form."""
    from torch import nn

    def block(n_in: int, n_out: int, kernel: int, stride: int = 1) -> list[Any]:
        return [
            nn.Conv1d(n_in, n_out, kernel, stride), nn.BatchNorm1d(n_out), nn.ReLU(),
            nn.MaxPool1d(4),
        ]  # fmt: skip

    return nn.Sequential(
        *block(1, 32, 80, 16), *block(32, 32, 3), *block(32, 64, 3), *block(64, 64, 3),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10), nn.LogSoftmax(-1),
    )  # fmt: skip


def wav2vec(norm: str) -> Any:
    """The convolutions of wav2vec 2.0 (2006.11477), with the positional one under weight norm."""
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [(1, 64, 10, 5), *[(64, 64, 3, 2)] * 4, *[(64, 64, 2, 2)] * 2]
            self.layers = nn.ModuleList(nn.Conv1d(*size, bias=norm == "layer") for size in sizes)
            group = [nn.GroupNorm(64, 64), *[nn.Identity()] * 6]
            layer = [nn.LayerNorm(64) for _ in sizes]
            self.norms = nn.ModuleList(group if norm == "group" else layer)
            self.project = nn.Linear(64, 96)
            position = nn.Conv1d(96, 96, 16, padding=8, groups=4)
            self.position = weight_norm(position, dim=2)
            self.head = nn.Linear(96, 10)

        def forward(self, x: Any) -> Any:
            for layer, scale in zip(self.layers, self.norms, strict=True):
                x = layer(x)
                x = scale(x) if norm == "group" else scale(x.transpose(1, 2)).transpose(1, 2)
                x = nn.functional.gelu(x)
            x = self.project(x.transpose(1, 2))
            shift = self.position(x.transpose(1, 2))[:, :, :-1]
            x = x + nn.functional.gelu(shift).transpose(1, 2)
            return self.head(x.mean(1))

    return Encoder()


def temporal() -> Any:
    """A temporal convolutional network (Bai et al., 2018, 1803.01271): dilated, weight norm."""
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm

    class Block(nn.Module):
        def __init__(self, n_in: int, n_out: int, dilation: int) -> None:
            super().__init__()
            self.first = weight_norm(nn.Conv1d(n_in, n_out, 3, dilation=dilation))
            self.second = weight_norm(nn.Conv1d(n_out, n_out, 3, dilation=dilation))
            self.pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
            self.shortcut = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

        def forward(self, x: Any) -> Any:
            y = self.second(self.pad(self.first(self.pad(x)).relu())).relu()
            return (y + self.shortcut(x)).relu()

    return nn.Sequential(
        Block(1, 25, 1), Block(25, 25, 2), Block(25, 40, 4), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip


WAVE = ((1, 8000),)
FAMILIES: Mapping[str, Mapping[str, Network]] = {
    "timm": {
        name: Network(partial(timm_network, name), image(TIMM_SIDES.get(name, 64)))
        for name in [*TIMM, *TIMM_HYBRIDS]
    },
    "torchvision": {
        name: Network(
            partial(torchvision_network, name),
            # The auxiliary head of Inception v3 needs room.
            image(224 if name in ("googlenet", "inception_v3") else 96),
        )
        for name in TORCHVISION
    },
    "segmentation": {
        **{
            name: Network(partial(torchvision_segmentation_aux, name), image(64))
            for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large")
        },
        "lraspp_mobilenet_v3_large": Network(
            partial(torchvision_segmentation, "lraspp_mobilenet_v3_large")
        ),
        **{f"smp.{name}": Network(partial(smp_network, name), image(128)) for name in SMP},
    },
    "detection": {
        name: Network(partial(detector, name), image(side), forward)
        for name, (side, forward) in DETECTORS.items()
    },
    "video": {
        **{
            name: Network(partial(video_network, name), ((3, 8, 32, 32),))
            for name in ("r3d_18", "mc3_18", "r2plus1d_18")
        },
        "s3d": Network(partial(video_network, "s3d"), ((3, 16, 224, 224),)),
        **{
            name: Network(
                partial(optical_flow, name), ((3, 128, 128), (3, 128, 128)), three_updates
            )
            for name in ("raft_small", "raft_large")
        },
    },
    "audio": {
        "M5": Network(m5, WAVE),
        "wav2vec, group norm": Network(partial(wav2vec, "group"), WAVE),
        "wav2vec, layer norm": Network(partial(wav2vec, "layer"), WAVE),
        "temporal": Network(temporal, ((1, 400),)),
    },
}
