"""detectron2's Faster R-CNN: Mask R-CNN without the mask branch."""

from .mask_rcnn import model

for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)
