"""EoMT on DINOv2 with registers, its patches of 16; a config changes the task and the ViT."""

from detbackbones import TimmBackbone, TransformersSegmenter
from detectron2.config import LazyCall as L

model = L(TransformersSegmenter)(
    architecture="eomt",
    backbone=L(TimmBackbone)(
        model_name="vit_large_patch14_reg4_dinov2",
        pretrained=True,
        patch_size=16,
        final_norm=True,
        model_kwargs={},
    ),
    num_classes=80,
    task="instance",
    num_queries=200,
    config_kwargs={},  # attributes of transformers' configuration
)
