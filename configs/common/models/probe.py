"""A frozen timm backbone, and a linear classifier of its pixels."""

from detbackbones.backbones.timm_backbone import pixel_mean, pixel_std
from detbackbones.heads import LinearHead
from detbackbones.shapes import output_shapes
from detectron2.config import LazyCall as L
from detectron2.modeling import SemanticSegmentor

from ..backbone import timm_r50

model = L(SemanticSegmentor)(
    backbone=timm_r50,
    sem_seg_head=L(LinearHead)(
        input_shape=L(output_shapes)(backbone={"config": "${....backbone}"}),
        in_features=None,  # all levels
        loss_weight=1.0,
        ignore_value=255,
    ),
    pixel_mean=L(pixel_mean)(model_name="${..backbone.model_name}"),
    pixel_std=L(pixel_std)(model_name="${..backbone.model_name}"),
)
model.backbone.freeze_at = 5
