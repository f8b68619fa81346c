"""detrex's DINO, timm ResNet-152-D, COCO for 12 epochs."""

from detbackbones import TimmBackbone
from detbackbones.backbones.timm_backbone import pixel_mean, pixel_std
from detbackbones.shapes import output_names, output_shapes
from detectron2.config import LazyCall as L

from ..common.detrex import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone = L(TimmBackbone)(
    model_name="resnet152d",
    pretrained=True,
    out_features=["res3", "res4", "res5"],  # by stride: indices differ from family to family
    norm="FrozenBN",
    freeze_at=1,
)
model.neck.input_shapes = L(output_shapes)(backbone={"config": "${....backbone}"})
model.neck.in_features = L(output_names)(backbone={"config": "${....backbone}"})
model.pixel_mean = L(pixel_mean)(model_name="${..backbone.model_name}")
model.pixel_std = L(pixel_std)(model_name="${..backbone.model_name}")
train.output_dir = "output/dino_timm_4scale_12ep"
