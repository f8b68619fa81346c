"""Mask2Former of transformers on a timm ResNet-50; a config changes the task and the backbone."""

from detbackbones import TransformersSegmenter
from detectron2.config import LazyCall as L

from ..backbone import timm_r50

timm_r50.freeze_at = 0

model = L(TransformersSegmenter)(
    backbone=timm_r50,
    num_classes=80,
    task="instance",
    num_queries=100,
    config_kwargs={},  # attributes of transformers' configuration
)
