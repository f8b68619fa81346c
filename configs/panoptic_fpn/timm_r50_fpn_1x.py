"""panoptic FPN, timm ResNet-50, COCO 1x."""

from ..common.coco_panoptic import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.panoptic_fpn import model  # noqa: F401
