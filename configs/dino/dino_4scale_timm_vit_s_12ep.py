"""DINO with 4 scales, timm ViT-S with a simple feature pyramid, COCO 12 epochs."""

from detbackbones import build_pyramid
from detectron2.config import LazyCall as L

from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.dino import model

vit = model.backbone
vit.update(model_name="vit_small_patch16_224", norm="", freeze_at=0, drop_path_rate=0.1)
model.backbone = L(build_pyramid)(bottom_up=vit, out_channels=256, min_level=3)
del vit  # or it would be a part of the config
optimizer.params.layer_decay = 0.8
optimizer.params.backbone_lr_factor = 1.0
