"""DINO with 4 scales, torchvision ResNet-50, COCO 12 epochs."""

from ..common.backbone import torchvision_r50
from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.dino import model

model.backbone = torchvision_r50
