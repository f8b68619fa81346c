"""rt_detr_v2, torchvision ResNet-50, COCO 12 epochs."""

from ..common.backbone import torchvision_r50
from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.detr import model

model.backbone = torchvision_r50
