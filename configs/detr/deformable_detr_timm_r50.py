"""deformable_detr with iterative refinement of boxes, timm ResNet-50, COCO 12 epochs."""

from ..common.coco_detr import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.detr import model

model.architecture = "deformable_detr"
model.config_kwargs.with_box_refine = True
