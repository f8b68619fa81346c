"""semantic fpn, torchvision ResNet-50 with FPN, COCO 1x."""

from ..common.backbone import torchvision_pixels, torchvision_r50
from .timm_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = torchvision_r50
model.update(torchvision_pixels)
