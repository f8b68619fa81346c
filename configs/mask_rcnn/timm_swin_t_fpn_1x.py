"""mask rcnn, timm Swin-T with FPN, COCO 1x with AdamW."""

from .timm_convnext_t_fpn_1x import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up.model_name = "swin_tiny_patch4_window7_224"
