"""DINO with 5 scales, timm ResNet-50, COCO 12 epochs."""

from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.dino import model

model.in_features = ["res2", "res3", "res4", "res5"]
