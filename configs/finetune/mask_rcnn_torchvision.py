"""mask rcnn on one's own data, on a torchvision model."""

from ..common.backbone import torchvision_pixels, torchvision_r50
from .mask_rcnn import dataloader, dataset, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = torchvision_r50
model.backbone.bottom_up.model_name = "resnet18"
model.update(torchvision_pixels)
