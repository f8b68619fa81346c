"""DINO with 4 scales, timm Swin-T, COCO 12 epochs."""

from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.dino import model

model.backbone.update(
    model_name="swin_tiny_patch4_window7_224", norm="", freeze_at=0, drop_path_rate=0.1
)
