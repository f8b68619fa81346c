"""detectron2's FCOS with a pyramid p3 to p7 over a timm ResNet-50."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from ..backbone import retinanet_fpn, timm_pixels

model = model_zoo.get_config("common/models/fcos.py").model
model.backbone = retinanet_fpn
model.update(**timm_pixels)
model.head.input_shape = [L(ShapeSpec)(channels="${....backbone.out_channels}")] * 5
model.head.conv_dims = ["${...backbone.out_channels}"] * 4
