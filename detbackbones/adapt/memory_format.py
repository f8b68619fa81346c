"""The memory format of the feature maps, and of the weights that meet them."""

import torch
from timm.layers import SplitAttn
from torch import nn


def gains_from_channels_last(model: nn.Module) -> bool:
    """Whether a model was measured to be faster on a CPU with its maps in channels-last order.

    Models with batch norm are, others are as fast either way. ResNeSt's split attention reshapes
    the channels, which takes three times as long in this order.
    """
    modules = [*model.modules()]
    splits = any(isinstance(module, SplitAttn) for module in modules)
    return not splits and any(hasattr(module, "running_var") for module in modules)


def breaks_in_channels_last(model: nn.Module) -> bool:
    """Whether a CPU cannot train a model with its maps in channels-last order.

    There oneDNN 3.12 writes beyond its memory in the gradient of the weight of a 1x1 convolution
    with a stride and less than 16 input channels, as RepVGG has them.
    """
    return any(
        module.kernel_size == (1, 1) != module.stride and module.in_channels < 16 * module.groups
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


def lay_out(model: nn.Module, channels_last: bool) -> None:
    """Keep the weights of convolutions in the memory format of the maps.

    In another one each convolution copies its weight first, in both passes: a SelecSLS-42's
    training step of two images of 224 pixels took a third longer.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight is not None:  # it may be unused
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
