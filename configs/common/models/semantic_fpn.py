"""detectron2's semantic segmentation with the head of Panoptic FPN alone."""

from detectron2.config import LazyCall as L
from detectron2.modeling import SemanticSegmentor

from .panoptic_fpn import model as panoptic

model = L(SemanticSegmentor)(
    backbone=panoptic.backbone,
    sem_seg_head=panoptic.sem_seg_head,
    pixel_mean=panoptic.pixel_mean,
    pixel_std=panoptic.pixel_std,
)
model.sem_seg_head.loss_weight = 1.0
