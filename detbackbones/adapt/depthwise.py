"""Depthwise convolutions that a CPU trains in float32, where bfloat16 would take longer."""

import torch
from torch import nn


class TrainsInFloat32(nn.Conv2d):
    """A convolution that leaves a CPU's autocast if it is depthwise, with a kernel above 3 x 3.

    Its gradients in bfloat16 take oneDNN twice as long as those in float32, or longer: of 96 maps
    of 96 x 96 pixels, 7 x 7, two images, channels last, 74 against 35 ms on an Intel Xeon with
    bfloat16 of its own. Of 3 x 3 they take as long. Inference stays in bfloat16.
    """

    def _conv_forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        slow = learns and large_depthwise(self) and x.device.type == "cpu"
        if not (slow and torch.is_autocast_enabled("cpu")):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            output = super()._conv_forward(x.float(), weight, bias)
        return output.to(torch.get_autocast_dtype("cpu"))


def large_depthwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise, with a kernel of more than 3 x 3."""
    return conv.groups == conv.in_channels > 1 and conv.kernel_size > (3, 3)


def train_depthwise_in_float32(model: nn.Module) -> None:
    """Let the large depthwise convolutions of a model leave a CPU's autocast.

    Those that are folded do so by themselves.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and large_depthwise(module):
            module.__class__ = TrainsInFloat32
