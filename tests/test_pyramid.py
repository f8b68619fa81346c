"""build_pyramid: p2 to p6 or p7 over whatever levels a backbone has."""

import pytest
import torch
from detbackbones import (
    TimmBackbone,
    TorchvisionBackbone,
    add_backbone_config,
    build_pyramid,
)
from detbackbones.pyramid import SimpleFeaturePyramid
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from models import images


def run(pyramid, sizes=((64, 96),)):
    """Pad images as detectron2's detectors do; check every level against output_shape()."""
    batch = ImageList.from_tensors(
        [images(3, *size) for size in sizes],
        pyramid.size_divisibility,
        padding_constraints=pyramid.padding_constraints,
    ).tensor
    levels = pyramid(batch)
    h, w = batch.shape[-2:]
    for name, shape in pyramid.output_shape().items():
        assert levels[name].shape == (
            len(sizes),
            shape.channels,
            -(-h // shape.stride),
            -(-w // shape.stride),
        )
    return {name: shape.stride for name, shape in pyramid.output_shape().items()}, (h, w)


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: TimmBackbone("resnet18"),
        lambda: TorchvisionBackbone("resnet18"),
        lambda: TimmBackbone("swin_tiny_patch4_window7_224"),
    ],
)
def test_fpn(backbone):
    pyramid = build_pyramid(backbone(), 32, norm="GN", top_block=LastLevelMaxPool())
    assert isinstance(pyramid, FPN) and pyramid.size_divisibility == 32
    strides, size = run(pyramid, [(250, 333), (201, 300)])
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert size == (256, 352)
    assert pyramid.fpn_lateral2.norm.num_groups == 32


def test_simple_feature_pyramid():
    bottom_up = TimmBackbone("vit_tiny_patch16_224")
    pyramid = build_pyramid(bottom_up, 32, top_block=LastLevelMaxPool())
    assert isinstance(pyramid, SimpleFeaturePyramid) and pyramid.net is bottom_up
    assert pyramid.size_divisibility == 32
    assert pyramid.padding_constraints == {"size_divisibility": 32}
    strides, size = run(pyramid, [(250, 333), (201, 300)])
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert size == (256, 352)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_retinanet_levels(name):
    top_block = LastLevelP6P7(32, 32, "p5")
    pyramid = build_pyramid(TimmBackbone(name), 32, min_level=3, top_block=top_block)
    assert run(pyramid)[0] == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}


@pytest.mark.parametrize("fuse_type, factor", [("sum", 1), ("avg", 0.5)])
def test_arguments_reach_the_fpn(fuse_type, factor):
    bottom_up = TimmBackbone("resnet18", out_indices=(1, 2, 3, 4)).eval()
    pyramid = build_pyramid(bottom_up, 8, in_features=["p3", "p2"], fuse_type=fuse_type).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        levels, own = pyramid(x), bottom_up(x)
        assert list(levels) == ["p3", "p4"]
        top = pyramid.fpn_lateral4(own["p3"])
        up = torch.nn.functional.interpolate(top, scale_factor=2, mode="nearest")
        fused = factor * (pyramid.fpn_lateral3(own["p2"]) + up)
        torch.testing.assert_close(levels["p3"], pyramid.fpn_output3(fused))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_features": ["res7"]}, r"\['res7'\] .* 'res2', 'res3', 'res4', 'res5'"),
        ({"in_features": ["res2", "res4"]}, r"strides \[4, 16\]"),
        ({"min_level": 6}, r"min_level=6 .* \[4, 8, 16, 32\]"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pyramid(TimmBackbone("resnet18"), **arguments)


def yacs(name, **changes):
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.TIMM.MODEL_NAME = "resnet18"
    cfg.MODEL.TORCHVISION.MODEL_NAME = "resnet18"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


P2_TO_P6 = ["p2", "p3", "p4", "p5", "p6"]
P3_TO_P7 = ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    "name, levels",
    [
        ("build_timm_fpn_backbone", P2_TO_P6),
        ("build_torchvision_fpn_backbone", P2_TO_P6),
        ("build_retinanet_timm_fpn_backbone", P3_TO_P7),
        ("build_retinanet_torchvision_fpn_backbone", P3_TO_P7),
        ("TimmBackbone", ["res2", "res3", "res4", "res5"]),
        ("TorchvisionBackbone", ["res2", "res3", "res4", "res5"]),
    ],
)
def test_yacs_builders(name, levels):
    backbone = build_backbone(yacs(name))
    assert list(run(backbone)[0]) == levels


def test_yacs_keys_reach_the_backbone():
    cfg = yacs(
        "build_timm_fpn_backbone",
        MODEL__TIMM__OUT_FEATURES=["res3", "res4"],
        MODEL__TIMM__NORM="",
        MODEL__BACKBONE__FREEZE_AT=1,
        MODEL__FPN__NORM="GN",
        MODEL__FPN__OUT_CHANNELS=32,
    )
    pyramid = build_backbone(cfg, ShapeSpec(channels=4))
    assert list(pyramid.bottom_up.output_shape()) == ["res3", "res4"]
    state = pyramid.bottom_up.state_dict()
    assert state["model.conv1.weight"].shape[1] == 4
    norms = pyramid.bottom_up.model
    assert isinstance(norms.layer1[0].bn1, torch.nn.BatchNorm2d)
    assert not norms.conv1.weight.requires_grad and norms.layer1[0].conv1.weight.requires_grad
    assert pyramid.fpn_lateral3.norm.num_channels == 32


def batch(size=(250, 333)):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor([[30.0, 40.0, 120.0, 150.0]]))
    instances.gt_classes = torch.tensor([1])
    return [
        {"image": images(3, *size), "height": size[0], "width": size[1], "instances": instances}
    ]


FPN_HEADS = {
    "MODEL__RPN__IN_FEATURES": P2_TO_P6,
    "MODEL__ROI_HEADS__IN_FEATURES": P2_TO_P6[:4],
    "MODEL__ROI_HEADS__NAME": "StandardROIHeads",
    "MODEL__ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
    "MODEL__ROI_BOX_HEAD__NUM_FC": 1,
    "MODEL__ROI_BOX_HEAD__FC_DIM": 16,
    "MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64], [128], [256], [512]],
    "MODEL__ROI_HEADS__NUM_CLASSES": 3,
}
RETINANET = {
    "MODEL__META_ARCHITECTURE": "RetinaNet",
    "MODEL__RETINANET__NUM_CLASSES": 3,
    "MODEL__RETINANET__NUM_CONVS": 1,
    "MODEL__RETINANET__IN_FEATURES": P3_TO_P7,
    "MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64], [128], [256], [512]],
}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("build_timm_fpn_backbone", FPN_HEADS),
        (
            "build_timm_fpn_backbone",
            {**FPN_HEADS, "MODEL__TIMM__MODEL_NAME": "vit_tiny_patch16_224"},
        ),
        ("build_retinanet_torchvision_fpn_backbone", RETINANET),
    ],
)
def test_yacs_detectors_train(name, changes):
    model = build_model(yacs(name, **changes)).train()
    with EventStorage():
        losses = model(batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    backbone = model.backbone
    source = backbone.bottom_up if isinstance(backbone, FPN) else backbone.net
    grads = [p.grad for p in source.parameters() if p.requires_grad]
    assert grads and all(g is not None for g in grads) and any(g.abs().max() > 0 for g in grads)
    with torch.no_grad():
        found = model.eval()([{k: v for k, v in batch()[0].items() if k != "instances"}])
    assert found[0]["instances"].image_size == (250, 333)


def test_yacs_c4_detector_on_a_bare_backbone():
    cfg = yacs(
        "TimmBackbone",
        **{
            **FPN_HEADS,
            "MODEL__RPN__IN_FEATURES": ["res4"],
            "MODEL__ROI_HEADS__IN_FEATURES": ["res4"],
            "MODEL__ANCHOR_GENERATOR__SIZES": [[32, 64, 128]],
        },
    )
    with EventStorage():
        losses = build_model(cfg).train()(batch())
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
