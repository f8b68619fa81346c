"""Which memory format of the feature maps is faster."""

from torch import nn


def gains_from_channels_last(model: nn.Module) -> bool:
    """Whether a model was measured to be faster on a CPU with its maps in channels-last order.

    Models with batch norm are, others are as fast either way. In this order the gradient of the
    weight of a 1x1 convolution with a stride and less than 16 input channels is computed with
    memory beyond its own (oneDNN 3.12): models that have one (RepVGG) are left as they are.
    """
    if not any(hasattr(module, "running_var") for module in model.modules()):
        return False
    return not any(
        module.kernel_size == (1, 1) != module.stride and module.in_channels < 16 * module.groups
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )
