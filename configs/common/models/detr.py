"""RT-DETRv2 of transformers on a timm ResNet-50; a config changes the architecture."""

from detbackbones import TransformersDetector
from detectron2.config import LazyCall as L

from ..backbone import timm_r50

model = L(TransformersDetector)(
    architecture="rt_detr_v2",
    backbone=timm_r50,
    num_classes=80,
    num_queries=300,
    test_topk_per_image=300,
    config_kwargs={},  # attributes of transformers' configuration of the architecture
    pretrained_detector="",  # a name on the Hugging Face hub, or a folder
)
