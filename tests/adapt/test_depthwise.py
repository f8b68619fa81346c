"""Under a CPU's autocast large depthwise convolutions are trained in float32."""

import copy

import pytest
import torch
from detbackbones import TimmBackbone
from detbackbones.adapt.depthwise import TrainsInFloat32, train_depthwise_in_float32
from support import images
from torch import nn


def _gradient(conv, x):
    output = conv(x)
    output.float().square().sum().backward()
    return output.detach(), conv.weight.grad


@pytest.mark.parametrize(
    "options, in_float32",
    [
        ({"kernel_size": 5, "padding": 2, "groups": 8}, True),
        ({"kernel_size": (7, 1), "groups": 8}, True),
        ({"kernel_size": 3, "padding": 1, "groups": 8}, False),
        ({"kernel_size": 5, "padding": 2, "groups": 4}, False),
    ],
)
def test_gradients_are_those_of_float32(options, in_float32):
    plain = nn.Conv2d(8, 8, **options)
    model = nn.Sequential(copy.deepcopy(plain))
    train_depthwise_in_float32(model)
    x = images(2, 8, 12, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, gradient = _gradient(model[0], x)
        assert output.dtype == torch.bfloat16
        in_bfloat16, other = _gradient(copy.deepcopy(plain), x)
        with torch.no_grad():
            assert torch.equal(model(x), in_bfloat16)
    exact = plain(x.float()).bfloat16()
    exact.float().square().sum().backward()
    assert torch.equal(gradient, plain.weight.grad) == in_float32
    assert torch.equal(gradient, other) != in_float32


def test_a_backbone_has_its_depthwise_convolutions_so():
    backbone = TimmBackbone("convnext_atto", pretrained=False)
    depthwise = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise and all(type(module) is TrainsInFloat32 for module in depthwise)
    backbone = TimmBackbone("mobilenetv3_small_050", pretrained=False, norm="FrozenBN")
    folded = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert folded and all(isinstance(module, TrainsInFloat32) for module in folded)
