"""mask rcnn, timm EfficientNet-B3 with FPN and frozen batch norm, COCO 1x."""

from .timm_r50_fpn_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.model_name = "efficientnet_b3"
