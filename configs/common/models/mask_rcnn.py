"""detectron2's Mask R-CNN with a pyramid over a timm ResNet-50."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from ..backbone import fpn, timm_pixels

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone = fpn
model.update(input_format="RGB", **timm_pixels)

# the channels follow model.backbone.out_channels
model.proposal_generator.head.in_channels = "${...backbone.out_channels}"
model.roi_heads.box_head.input_shape = L(ShapeSpec)(
    channels="${....backbone.out_channels}", height=7, width=7
)
model.roi_heads.box_predictor.input_shape = L(ShapeSpec)(channels="${...box_head.fc_dims[1]}")
model.roi_heads.mask_head.input_shape = L(ShapeSpec)(
    channels="${....backbone.out_channels}", height=14, width=14
)
