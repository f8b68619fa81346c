"""The yacs keys, and configs by name."""

import pytest
import torch
from detbackbones import (
    TimmBackbone,
    TorchvisionBackbone,
    add_backbone_config,
    get_config,
    list_configs,
)
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec


def config(*changes):
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.merge_from_list(list(changes))
    return cfg


def test_input_is_what_the_weights_expect():
    cfg = config()
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([255 * s for s in (0.229, 0.224, 0.225)])


def test_keys_of_timm(tmp_path):
    source = TimmBackbone("resnet18", out_features=["res2"])
    file = str(tmp_path / "resnet18.pth")
    state = {k.removeprefix("model."): v for k, v in source.state_dict().items()}
    torch.save(state, file)
    cfg = config(
        *("MODEL.TIMM.MODEL_NAME", "resnet18"),
        *("MODEL.TIMM.OUT_FEATURES", "['res2']"),
        *("MODEL.TIMM.CHECKPOINT_PATH", file),
        *("MODEL.TIMM.NORM", "BN"),
        *("MODEL.BACKBONE.FREEZE_AT", 0),
    )
    backbone = TimmBackbone(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == ["res2"]
    assert all(p.requires_grad for p in backbone.parameters())
    for key, value in source.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[key])


def test_stride_and_drop_path_of_timm():
    cfg = config(
        *("MODEL.TIMM.MODEL_NAME", "convnext_atto"),
        *("MODEL.TIMM.OUTPUT_STRIDE", 16),
        *("MODEL.TIMM.DROP_PATH_RATE", 0.2),
    )
    backbone = TimmBackbone(cfg, ShapeSpec(channels=3))
    assert backbone.output_shape()["res5"].stride == 16
    drops = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "kind, key", [(TimmBackbone, "TIMM"), (TorchvisionBackbone, "TORCHVISION")]
)
def test_gradient_checkpointing(kind, key):
    keys = [f"MODEL.{key}.{name}" for name in ("MODEL_NAME", "GRAD_CHECKPOINTING")]
    saved = []
    for value in (False, True):
        backbone = kind(config(keys[0], "resnet18", keys[1], value), ShapeSpec(channels=3))
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(kept.append, lambda x: x):
            backbone(torch.rand(1, 3, 64, 64))
        saved.append(len(kept))
    assert saved[1] < saved[0] / 2


def test_keys_of_torchvision():
    cfg = config(
        *("MODEL.TORCHVISION.MODEL_NAME", "resnet18"),
        *("MODEL.TORCHVISION.OUT_FEATURES", "['res4']"),
        *("MODEL.BACKBONE.FREEZE_AT", 3),
    )
    backbone = TorchvisionBackbone(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == ["res4"]
    assert {n.split(".")[1] for n, p in backbone.named_parameters() if p.requires_grad} == {
        "layer3"
    }
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules())


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.TIMM.MODEL_NAME", "resnet81", "model_name='resnet81'"),
        ("MODEL.TIMM.NORM", "GN", "norm='GN'"),
        ("MODEL.BACKBONE.FREEZE_AT", 7, "freeze_at=7"),
        ("MODEL.TIMM.OUT_FEATURES", ["res9"], "out_features=.'res9'."),
    ],
)
def test_wrong_values(key, value, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(config(key, value), ShapeSpec(channels=3))


def test_unknown_config():
    name = "mask_rcnn/timm_r50_fpn_1x.py"
    assert name in list_configs()
    with pytest.raises(FileNotFoundError, match=f"'mask_rcnn/tim_r50_fpn_1x.py': .*'{name}'"):
        get_config("mask_rcnn/tim_r50_fpn_1x.py")
