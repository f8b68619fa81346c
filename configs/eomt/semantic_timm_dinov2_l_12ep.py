"""EoMT for classes of pixels, DINOv2-L, COCO's stuff (all things are one class)."""

from ..common.coco_stuff import dataloader
from ..common.eomt_recipe import augmentations, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.eomt import model

model.update(task="semantic", num_classes=54)
dataloader.train.mapper.augmentations = augmentations
dataloader.test.mapper.augmentations[0].update(short_edge_length=640, max_size=640)
del augmentations  # or it would be a part of the config
