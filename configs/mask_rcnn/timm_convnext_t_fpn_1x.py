"""mask rcnn, timm ConvNeXt-T with FPN, COCO 1x with AdamW."""

from ..common.optim import AdamW as optimizer  # noqa: F401
from .timm_r50_fpn_1x import dataloader, lr_multiplier, model, train  # noqa: F401

model.backbone.bottom_up.update(
    model_name="convnext_tiny", norm="", freeze_at=0, drop_path_rate=0.2
)
