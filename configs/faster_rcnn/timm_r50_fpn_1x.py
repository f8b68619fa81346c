"""faster rcnn, timm ResNet-50 with FPN, COCO 1x."""

from ..common.coco import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.faster_rcnn import model  # noqa: F401

dataloader.train.mapper.use_instance_mask = False
