"""mask rcnn, timm ConvNeXt-T with FPN, COCO 1x with AdamW."""

from detectron2 import model_zoo

from .timm_r50_fpn_1x import dataloader, lr_multiplier, model, train  # noqa: F401

model.backbone.bottom_up.update(
    model_name="convnext_tiny", norm="", freeze_at=0, drop_path_rate=0.2
)
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.update(lr=1e-4, weight_decay=0.05)
