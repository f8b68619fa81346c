"""Depthwise convolutions that a CPU trains in float32, where bfloat16 would take longer."""

import torch
from torch import nn


class TrainsInFloat32(nn.Conv2d):
    """A convolution that leaves a CPU's autocast if it is depthwise, with a kernel above 3 x 3.

    Its gradients in bfloat16 take oneDNN twice as long as those in float32, or longer: of 96 maps
    of 96 x 96 pixels, 7 x 7, two images, channels last, 74 against 35 ms on an Intel Xeon with
    bfloat16 of its own. Of 3 x 3 they take as long. Inference stays in bfloat16.
    """

    def leaves_autocast(self, x: torch.Tensor) -> bool:
        """Whether it computes in float32 what it is given under autocast.

        Args:
            x: (N, in_channels, H, W).
        """
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        on_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        return learns and on_cpu and large_depthwise(self)

    def _conv_forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not self.leaves_autocast(x):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            output = super()._conv_forward(x.float(), weight, bias)
        return output.to(torch.get_autocast_dtype("cpu"))


def large_depthwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise, with a kernel that is longer than 3 in some direction."""
    return conv.groups == conv.in_channels > 1 and max(conv.kernel_size) > 3


def train_depthwise_in_float32(model: nn.Module) -> None:
    """Let the large depthwise convolutions of torch's own class leave a CPU's autocast.

    Those that are folded do so by themselves; timm's that pad as TensorFlow does stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and large_depthwise(module):
            module.__class__ = TrainsInFloat32
