"""Arguments of configs that are written for detrex's wrapper."""

import detectron2.layers
import pytest
import torchvision
from detbackbones.backbones.detrex import norm_from_detrex
from torch import nn


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
def test_norm_layer(layer, norm):
    assert norm_from_detrex(True, layer, "") == norm == norm_from_detrex(True, layer, norm)


@pytest.mark.parametrize("layer", [nn.LayerNorm, "torch.nn.GroupNorm", 3, lambda n: None])
def test_norm_layer_refuses_other_layers(layer):
    with pytest.raises(ValueError, match="norm_layer=.* valid are 'FrozenBatchNorm2d'"):
        norm_from_detrex(True, layer, "")


def test_norm_layer_refuses_a_contradiction():
    with pytest.raises(ValueError, match="norm_layer=FrozenBatchNorm2d means .*norm='SyncBN'"):
        norm_from_detrex(True, torchvision.ops.FrozenBatchNorm2d, "SyncBN")


def test_without_a_norm_layer():
    assert norm_from_detrex(True, None, "SyncBN") == "SyncBN"
