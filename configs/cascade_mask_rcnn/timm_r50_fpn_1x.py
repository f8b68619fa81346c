"""cascade mask rcnn, timm ResNet-50 with FPN, COCO 1x."""

from ..common.coco import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.cascade_mask_rcnn import model  # noqa: F401
