"""EoMT for masks of objects, DINOv2-L, COCO 12 epochs."""

from ..common.coco import dataloader
from ..common.eomt_recipe import augmentations, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.eomt import model  # noqa: F401

dataloader.train.mapper.update(augmentations=augmentations, instance_mask_format="bitmask")
dataloader.evaluator.tasks = ["bbox", "segm"]  # also while nothing is found
dataloader.test.mapper.augmentations[0].update(short_edge_length=640, max_size=640)
del augmentations  # or it would be a part of the config
