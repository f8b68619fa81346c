"""Mask2Former for masks of objects, timm ResNet-50, COCO 50 epochs."""

from ..common.coco import dataloader
from ..common.mask2former_recipe import augmentations, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.mask2former import model  # noqa: F401

dataloader.train.mapper.update(augmentations=augmentations, instance_mask_format="bitmask")
dataloader.evaluator.tasks = ["bbox", "segm"]  # also while nothing is found
del augmentations  # or it would be a part of the config
