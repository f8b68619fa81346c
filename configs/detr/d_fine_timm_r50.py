"""d_fine, timm ResNet-50, COCO 12 epochs."""

from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.detr import model

model.architecture = "d_fine"
