"""Mask2Former for things and stuff, timm ResNet-50, COCO 50 epochs.

The masks of things are those of COCO's instances, as in detectron2's panoptic FPN, and may overlap.
"""

from ..common.coco_panoptic import dataloader
from ..common.mask2former_recipe import augmentations, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.mask2former import model

model.update(task="panoptic", num_classes=133, num_things=80)
dataloader.train.mapper.update(augmentations=augmentations, instance_mask_format="bitmask")
del augmentations  # or it would be a part of the config
