"""build_pyramid: p2 to p6 or p7 over whatever levels a backbone has."""

import pytest
import torch
from detbackbones import (
    TimmBackbone,
    TorchvisionBackbone,
    add_backbone_config,
    build_pyramid,
)
from detbackbones.backbones.pyramid import FeaturePyramid, SimpleFeaturePyramid
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from support import images
from torch import nn


class Toy(Backbone):
    """A chain of convolutions: levels a, b, ... of the strides and channels given."""

    def __init__(self, strides, channels, *, img_size=None, divisor=0, constraints=None):
        super().__init__()
        self.img_size, self.divisor, self.constraints = img_size, divisor, constraints or {}
        self._out_features = list("abcdefgh"[: len(strides)])
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(zip(self._out_features, channels))
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, after // before, padding=1)
            for c_in, c_out, before, after in zip([3, *channels], channels, [1, *strides], strides)
        )

    def forward(self, x):
        assert self.img_size is None or x.shape[-2:] == (self.img_size, self.img_size)
        levels = {}
        for name, conv in zip(self._out_features, self.convs):
            levels[name] = x = conv(x)
        return levels

    @property
    def size_divisibility(self):
        return self.divisor

    @property
    def padding_constraints(self):
        return self.constraints


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
    pyramid = build_pyramid(
        bottom_up, 8, in_features=["p4", "p3", "p2"], min_level=3, fuse_type=fuse_type
    ).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        levels, own = pyramid(x), bottom_up(x)
        assert list(levels) == ["p3", "p4", "p5"]
        fused = pyramid.fpn_lateral5(own["p4"])
        for n, name in ((4, "p3"), (3, "p2")):
            up = torch.nn.functional.interpolate(fused, scale_factor=2, mode="nearest")
            fused = factor * (getattr(pyramid, f"fpn_lateral{n}")(own[name]) + up)
        torch.testing.assert_close(levels["p3"], pyramid.fpn_output3(fused))


def without_gradient(pyramid, levels):
    """Parameters that a loss on all levels does not reach: DistributedDataParallel wants none."""
    sum(level.square().mean() for level in levels.values()).backward()
    return [n for n, p in pyramid.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    "strides, channels, min_level, completed",
    [
        # channels of res2, res3, ... under the FPN, None for a SimpleFeaturePyramid
        ((4, 8, 16, 32), (4, 5, 6, 7), 2, [4, 5, 6, 7]),
        ((16, 32), (6, 7), 2, [1, 3, 6, 7]),
        ((16, 32), (7, 6), 2, [1, 3, 7, 6]),
        ((16, 32), (6, 7), 3, [3, 6, 7]),
        ((8, 16, 32), (7, 8, 9), 2, [3, 7, 8, 9]),
        ((8, 16, 32), (7, 8, 9), 3, [7, 8, 9]),
        ((4, 8, 16), (5, 6, 7), 2, [5, 6, 7, 7]),
        ((4, 16, 32), (5, 6, 7), 2, [5, 5, 6, 7]),
        ((4, 32), (5, 6), 2, [5, 5, 5, 6]),
        ((4,), (5,), 2, [5, 5, 5, 5]),
        ((4,), (5,), 3, [5, 5, 5, 5]),
        ((8,), (6,), 2, [3, 6, 6, 6]),
        ((8,), (6,), 3, [6, 6, 6]),
        ((16,), (8,), 2, None),
        ((16,), (8,), 3, None),
        ((32,), (9,), 2, [1, 2, 4, 9]),
        ((32,), (9,), 3, None),
        ((64,), (16,), 2, [1, 2, 4, 8]),
        ((16, 32, 64), (6, 7, 8), 2, [1, 3, 6, 7]),
        ((4, 8, 16, 16), (4, 5, 6, 7), 2, [4, 5, 7, 7]),
        ((16, 16), (4, 8), 2, None),
        ((1, 2, 4), (3, 4, 5), 1, [4, 5, 5, 5, 5]),
    ],
)
def test_levels_are_completed(strides, channels, min_level, completed):
    bottom_up = Toy(strides, channels)
    retinanet = min_level == 3
    pyramid = build_pyramid(
        bottom_up,
        8,
        min_level=min_level,
        top_block=LastLevelP6P7(8, 8, "p5") if retinanet else LastLevelMaxPool(),
    )
    names = [f"p{n}" for n in range(min_level, 8 if retinanet else 7)]
    assert run(pyramid, [(60, 90), (50, 64)]) == (
        {name: 2 ** int(name[1:]) for name in names},
        (64, 96),
    )
    assert isinstance(pyramid, SimpleFeaturePyramid if completed is None else FeaturePyramid)
    if completed is not None:
        assert [shape.channels for shape in pyramid.completed.output_shape().values()] == completed
    left_out = (
        ["bottom_up.convs.2.weight", "bottom_up.convs.2.bias"] if strides[2:] == (64,) else []
    )
    assert without_gradient(pyramid, pyramid(images(2, 3, 64, 96))) == left_out


def test_made_levels():
    """Finer ones as SimpleFeaturePyramid makes them, coarser ones by pooling."""
    bottom_up = Toy((8, 32), (12, 5))
    completed = build_pyramid(bottom_up, 8, min_level=1).completed
    names = [type(layer).__name__ for layer in completed.finer["res1"]]
    assert names == ["ConvTranspose2d", "LayerNorm", "GELU", "ConvTranspose2d"]
    own = bottom_up(images(2, 3, 64, 96))
    levels = completed(own)
    assert {n: tuple(level.shape[1:]) for n, level in levels.items()} == {
        "res1": (3, 32, 48),
        "res2": (6, 16, 24),
        "res3": (12, 8, 12),
        "res4": (12, 4, 6),
        "res5": (5, 2, 3),
    }
    assert levels["res3"] is own["a"] and levels["res5"] is own["b"]
    assert torch.equal(levels["res2"], completed.finer["res2"](own["a"]))
    assert torch.equal(
        levels["res4"], own["a"].unflatten(3, (6, 2)).unflatten(2, (4, 2)).amax((3, 5))
    )


@pytest.mark.parametrize(
    "strides, in_features, min_level, names",
    [
        ((4, 8, 16, 32), ["b", "c", "d"], 2, ["p2", "p3", "p4", "p5"]),
        ((4, 8, 16, 32), ["a", "b", "c", "d"], 3, ["p2", "p3", "p4", "p5"]),
        ((4, 8, 16, 32), ["b", "c"], 3, ["p3", "p4", "p5"]),
        ((4, 8, 16, 32, 64), ["c", "d", "e"], 3, ["p3", "p4", "p5"]),
        ((4, 8, 16, 32, 64), ["e"], 4, ["p4", "p5"]),
        ((4, 8, 16, 32, 96), None, 2, ["p2", "p3", "p4", "p5"]),
    ],
)
def test_in_features(strides, in_features, min_level, names):
    bottom_up = Toy(strides, [8] * len(strides))
    pyramid = build_pyramid(bottom_up, 8, in_features=in_features, min_level=min_level)
    assert list(run(pyramid)[0]) == names


@pytest.mark.parametrize("in_features, used", [(None, "d"), (["a", "c"], "c"), (["b", "a"], "b")])
def test_last_level_of_a_stride(in_features, used):
    bottom_up = Toy((16, 16, 16, 16), (8, 8, 8, 8))
    assert build_pyramid(bottom_up, 8, in_features=in_features).in_feature == used
    bottom_up = Toy((16, 16, 16, 16, 32), (8, 8, 8, 8, 8))
    pyramid = build_pyramid(bottom_up, 8, in_features=in_features and [*in_features, "e"])
    assert pyramid.completed.names == {"res4": used, "res5": "e"}


def test_top_block_on_the_own_p5():
    """A level called p5, the output of index 5, is none of the pyramid."""
    bottom_up = TimmBackbone("vit_tiny_patch16_224", out_indices=range(12))
    pyramid = build_pyramid(bottom_up, 8, top_block=LastLevelMaxPool())
    assert pyramid.in_feature == "p11"
    assert run(pyramid)[0] == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


@pytest.mark.parametrize(
    "name, arguments, made",
    [
        ("resnet18", {}, []),
        ("resnet18", {"output_stride": 16}, []),
        ("visformer_tiny", {}, ["res2"]),
        ("vit_tiny_patch16_224", {}, None),
    ],
)
def test_real_backbones(name, arguments, made):
    bottom_up = TimmBackbone(name, **arguments)
    pyramid = build_pyramid(bottom_up, 8, top_block=LastLevelMaxPool())
    assert run(pyramid)[0] == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    if made is not None:
        assert list(pyramid.completed.finer) == made
    size = bottom_up.img_size or 64
    assert not without_gradient(pyramid, pyramid(images(2, 3, size, size)))
    prefix = "net." if made is None else "bottom_up."
    keys = {key for key in pyramid.state_dict() if key.startswith(prefix)}
    assert keys == {prefix + key for key in bottom_up.state_dict()}


def test_keys_of_a_complete_pyramid():
    bottom_up = TimmBackbone("resnet18")
    upstream = FPN(bottom_up, ["res2", "res3", "res4", "res5"], 8, top_block=LastLevelMaxPool())
    pyramid = build_pyramid(bottom_up, 8, top_block=LastLevelMaxPool())
    assert list(pyramid.state_dict()) == list(upstream.state_dict())
    pyramid.load_state_dict(upstream.state_dict())
    x = images(2, 3, 64, 96)
    for name, level in upstream.eval()(x).items():
        assert torch.equal(level, pyramid.eval()(x)[name])


@pytest.mark.parametrize("strides", [(16,), (8, 16), (16, 32), (32,), (4, 8, 16, 32)])
def test_one_image_size_alone(strides):
    """240 is no multiple of 32: p5 has ceil(240 / 32) = 8 rows."""
    pyramid = build_pyramid(
        Toy(strides, [8] * len(strides), img_size=240, divisor=240), 8, top_block=LastLevelMaxPool()
    )
    assert pyramid.size_divisibility == 240
    assert pyramid.padding_constraints == {"size_divisibility": 240}
    batch = ImageList.from_tensors(
        [images(3, 200, 240), images(3, 150, 90)],
        pyramid.size_divisibility,
        padding_constraints=pyramid.padding_constraints,
    ).tensor
    rows = {name: level.shape[2:] for name, level in pyramid(batch).items()}
    assert rows == {"p2": (60, 60), "p3": (30, 30), "p4": (15, 15), "p5": (8, 8), "p6": (4, 4)}


@pytest.mark.parametrize(
    "strides, rule, constraints",
    [
        ((4, 8, 16, 32), {}, {"size_divisibility": 32}),
        ((4, 8, 16, 32), {"divisor": 56}, {"size_divisibility": 224}),
        ((16,), {"divisor": 48}, {"size_divisibility": 96}),
        ((8, 16), {"divisor": 48}, {"size_divisibility": 96}),
        ((8, 16), {"constraints": {"size_divisibility": 28}}, {"size_divisibility": 224}),
        (
            (16,),
            {"divisor": 16, "constraints": {"square_size": 1024}},
            {"square_size": 1024, "size_divisibility": 32},
        ),
        ((16,), {"divisor": 224, "img_size": 224}, {"size_divisibility": 224}),
    ],
)
def test_size_rules_of_the_bottom_up(strides, rule, constraints):
    pyramid = build_pyramid(Toy(strides, [8] * len(strides), **rule), 8)
    assert pyramid.padding_constraints == constraints
    assert pyramid.size_divisibility == constraints["size_divisibility"]


@pytest.mark.parametrize(
    "strides, arguments, message",
    [
        ((4, 8), {"in_features": ["c"]}, r"\['c'\] .* 'a', 'b'"),
        ((4, 8), {"min_level": 6}, "min_level=6 .* from 0 to 5"),
        ((14,), {}, "level a has stride 14, .* give patch_size=16"),
    ],
)
def test_wrong_input(strides, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pyramid(Toy(strides, [8] * len(strides)), **arguments)


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


def test_yacs_image_and_patch_size():
    cfg = yacs(
        "build_timm_fpn_backbone",
        MODEL__TIMM__MODEL_NAME="vit_tiny_patch16_224",
        MODEL__TIMM__IMG_SIZE=64,
        MODEL__TIMM__PATCH_SIZE=8,
    )
    backbone = build_backbone(cfg, ShapeSpec(channels=3)).bottom_up
    assert backbone.output_shape()["res3"].stride == 8
    assert backbone.state_dict()["model.pos_embed"].shape == (1, 1 + 8 * 8, 192)


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
    "name, changes, size",
    [
        ("build_timm_fpn_backbone", FPN_HEADS, (250, 333)),
        (
            "build_timm_fpn_backbone",
            {**FPN_HEADS, "MODEL__TIMM__MODEL_NAME": "vit_tiny_patch16_224"},
            (250, 333),
        ),
        (
            "build_timm_fpn_backbone",  # begins at stride 8, and takes images up to 224x224
            {**FPN_HEADS, "MODEL__TIMM__MODEL_NAME": "visformer_tiny"},
            (210, 160),
        ),
        (
            "build_timm_fpn_backbone",
            {**FPN_HEADS, "MODEL__TIMM__OUT_FEATURES": ["res4"]},
            (250, 333),
        ),
        ("build_retinanet_torchvision_fpn_backbone", RETINANET, (250, 333)),
        (
            "build_retinanet_torchvision_fpn_backbone",
            {**RETINANET, "MODEL__TORCHVISION__OUT_FEATURES": ["res2", "res4"]},
            (250, 333),
        ),
    ],
)
def test_yacs_detectors_train(name, changes, size):
    model = build_model(yacs(name, **changes)).train()
    with EventStorage():
        losses = model(batch(size))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    backbone = model.backbone
    source = backbone.bottom_up if isinstance(backbone, FPN) else backbone.net
    grads = [p.grad for p in source.parameters() if p.requires_grad]
    assert grads and all(g is not None for g in grads) and any(g.abs().max() > 0 for g in grads)
    with torch.no_grad():
        found = model.eval()([{k: v for k, v in batch(size)[0].items() if k != "instances"}])
    assert found[0]["instances"].image_size == size


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
