"""detectron2's Panoptic FPN with a pyramid over a timm ResNet-50."""

from detbackbones.heads.fpn import SemSegFPNHead
from detectron2 import model_zoo

from .mask_rcnn import model

panoptic = model_zoo.get_config("common/models/panoptic_fpn.py").model
model._target_ = panoptic._target_
model.sem_seg_head = panoptic.sem_seg_head
model.sem_seg_head._target_ = SemSegFPNHead
