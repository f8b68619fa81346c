"""Under a CPU's autocast large depthwise convolutions are trained in float32."""

import copy

import pytest
import torch
from detbackbones import TimmBackbone
from detbackbones.adapt.depthwise import TrainsInFloat32, train_depthwise_in_float32
from detbackbones.adapt.folded_conv import FoldedConv2d
from detbackbones.adapt.norm import FrozenBatchNorm2d
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
        ({"kernel_size": (1, 7), "groups": 8}, True),
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


def test_a_folded_one_that_is_frozen_passes_the_gradient_on():
    """As with LoRA, where layers before it learn and it does not."""
    conv = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False).requires_grad_(False)
    norm = FrozenBatchNorm2d(nn.BatchNorm2d(8))
    with torch.no_grad():
        norm.running_mean.copy_(images(8))
    folded = FoldedConv2d(conv, norm)
    x = images(2, 8, 12, 12).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = folded(x)
    output.float().square().sum().backward()
    gradient, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert folded(x).dtype == torch.bfloat16  # what is remembered is of the other type then
    exact = norm(conv(x.float())).bfloat16()
    exact.float().square().sum().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=0.02, atol=0.02)


def test_lora_trains_under_autocast():
    backbone = TimmBackbone("tf_efficientnet_lite0", pretrained=False, lora_rank=2).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(level.float().mean() for level in backbone(images(2, 3, 64, 64)).values())
    loss.backward()
    updates = [p for name, p in backbone.named_parameters() if ".lora_B" in name]
    assert updates and all(torch.isfinite(p.grad).all() for p in updates)
