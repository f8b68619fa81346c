"""DINO with 4 scales, timm ConvNeXt-T, COCO 12 epochs."""

from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.dino import model

model.backbone.update(model_name="convnext_tiny", norm="", freeze_at=0, drop_path_rate=0.1)
