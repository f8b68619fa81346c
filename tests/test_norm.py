"""Freezing batch norm changes nothing that the model computes, and then nothing changes it."""

import copy

import detectron2.layers
import pytest
import timm
import torch
import torchvision
from detbackbones import TimmBackbone
from detbackbones.norm import convert_norm, norm_from_layer
from models import assert_close, images, randomise
from timm.layers import BatchNormAct2d
from torch import nn

BLOCKS = {
    "BatchNorm2d": (nn.BatchNorm2d(4), (3, 4, 6, 5)),
    "eps 1e-3": (nn.BatchNorm2d(4, eps=1e-3), (3, 4, 6, 5)),
    "a large eps": (BatchNormAct2d(4, eps=0.5), (3, 4, 6, 5)),
    "with its activation": (BatchNormAct2d(4, act_layer="silu"), (3, 4, 6, 5)),
    "SyncBatchNorm": (nn.SyncBatchNorm(4, eps=0.1), (3, 4, 6, 5)),
    "BatchNorm1d on (N, C)": (nn.BatchNorm1d(4, eps=0.1), (3, 4)),
    "BatchNorm1d on (N, C, L)": (nn.BatchNorm1d(4), (3, 4, 7)),
    "BatchNorm1d without affine": (nn.BatchNorm1d(4, affine=False), (3, 4)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("nested", [False, True])
def test_frozen_norm_computes_the_same(name, nested):
    block, shape = copy.deepcopy(BLOCKS[name])
    if block.affine:
        randomise(block)
    block.running_mean.uniform_(-1, 1)
    model = nn.Sequential(nn.Sequential(block)) if nested else block
    x = images(*shape)
    expected = model.eval()(x)
    frozen = convert_norm(model, "FrozenBN").train()
    assert_close(frozen(x), expected)
    assert_close(frozen(5 * x - 5), expected * 0 + frozen.eval()(5 * x - 5))
    assert not list(frozen.parameters())


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "levit_conv_128s"])
def test_frozen_models_compute_the_same(name):
    model = randomise(timm.create_model(name, num_classes=0)).eval()
    x = images(1, 3, 224, 224)
    expected = model(x)
    eps = {m.eps for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    frozen = convert_norm(model, "FrozenBN")
    assert_close(frozen(x), expected)
    assert {m.eps for m in frozen.modules() if hasattr(m, "running_var")} == eps
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules())


def test_tf_models_keep_their_eps():
    backbone = TimmBackbone("tf_efficientnet_b0", norm="FrozenBN", out_features=["res2"])
    assert {m.eps for m in backbone.modules() if hasattr(m, "running_var")} == {1e-3}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_training_changes_no_frozen_value(name):
    backbone = randomise(TimmBackbone(name)).train()
    backbone.load_source(
        {k.removeprefix("model."): v for k, v in randomise(backbone).state_dict().items()}
    )
    frozen = TimmBackbone(name, norm="FrozenBN").train()
    frozen.load_state_dict(backbone.state_dict())
    norms = {k for k, v in frozen.named_buffers()}
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=0.1, weight_decay=0.5)
    sum(v.square().mean() for v in frozen(images(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    changed = {k for k, v in frozen.state_dict().items() if not torch.equal(v, before[k])}
    assert len(norms) >= 80 and not changed & norms
    assert changed == {k for k, p in frozen.named_parameters()}


@pytest.mark.parametrize(
    "norm, kind", [("SyncBN", nn.SyncBatchNorm), ("BN", nn.BatchNorm2d), ("", nn.BatchNorm2d)]
)
def test_other_norms(norm, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert type(convert_norm(model, norm)[1]) is kind


def test_bn_thaws_a_frozen_norm():
    model = convert_norm(nn.Sequential(nn.BatchNorm2d(4, eps=0.1)), "FrozenBN")
    thawed = convert_norm(model, "BN")[0]
    assert type(thawed) is nn.BatchNorm2d and thawed.eps == 0.1 and thawed.weight.requires_grad


@pytest.mark.parametrize(
    "layer, norm",
    [
        (detectron2.layers.FrozenBatchNorm2d, "FrozenBN"),
        (torchvision.ops.FrozenBatchNorm2d, "FrozenBN"),
        ("FrozenBatchNorm2d", "FrozenBN"),
        ("detectron2.layers.batch_norm.FrozenBatchNorm2d", "FrozenBN"),
        (nn.BatchNorm2d, "BN"),
        (nn.SyncBatchNorm, "SyncBN"),
    ],
)
def test_norm_from_layer(layer, norm):
    assert norm_from_layer(layer, "") == norm == norm_from_layer(layer, norm)


@pytest.mark.parametrize("layer", [nn.LayerNorm, "torch.nn.GroupNorm", 3, lambda n: None])
def test_norm_from_layer_refuses_other_layers(layer):
    with pytest.raises(ValueError, match="norm_layer=.* valid are 'FrozenBatchNorm2d'"):
        norm_from_layer(layer, "")


def test_norm_from_layer_refuses_a_contradiction():
    with pytest.raises(ValueError, match="norm_layer=FrozenBatchNorm2d means .*norm='SyncBN'"):
        norm_from_layer(torchvision.ops.FrozenBatchNorm2d, "SyncBN")


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm='FrozenBn' is unknown: valid are '', 'FrozenBN'"):
        convert_norm(nn.BatchNorm2d(3), "FrozenBn")
