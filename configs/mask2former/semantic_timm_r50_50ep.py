"""Mask2Former for classes of pixels, timm ResNet-50, COCO's stuff (all things are one class)."""

from ..common.coco_stuff import dataloader
from ..common.mask2former_recipe import augmentations, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.mask2former import model

model.update(task="semantic", num_classes=54)
dataloader.train.mapper.augmentations = augmentations
del augmentations  # or it would be a part of the config
