"""detectron2's Cascade Mask R-CNN with a pyramid over a timm ResNet-50."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from .mask_rcnn import model

heads = model_zoo.get_config("common/models/cascade_rcnn.py").model.roi_heads
for key in ("box_head", "box_predictor", "proposal_matcher"):
    model.roi_heads.pop(key)
for key in ("_target_", "box_heads", "box_predictors", "proposal_matchers"):
    model.roi_heads[key] = heads[key]
for head in model.roi_heads.box_heads:
    head.input_shape = L(ShapeSpec)(channels="${.....backbone.out_channels}", height=7, width=7)
for predictor in model.roi_heads.box_predictors:
    predictor.input_shape = L(ShapeSpec)(channels="${....box_heads[0].fc_dims[1]}")
