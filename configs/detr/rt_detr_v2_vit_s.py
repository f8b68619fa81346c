"""rt_detr_v2, timm ViT-S with a simple feature pyramid, COCO 12 epochs."""

from ..common.backbone import vit_s_pyramid
from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.detr import model

model.backbone = vit_s_pyramid
del vit_s_pyramid  # or it would be a part of the config
optimizer.params.layer_decay = 0.8
optimizer.params.backbone_lr_factor = 1.0
