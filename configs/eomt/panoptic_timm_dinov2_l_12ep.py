"""EoMT for things and stuff, DINOv2-L, COCO 12 epochs.

The masks of things are those of COCO's instances, as in detectron2's panoptic FPN, and may overlap.
"""

from ..common.coco_panoptic import dataloader
from ..common.eomt_recipe import augmentations, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.eomt import model

model.update(task="panoptic", num_classes=133, num_things=80)
dataloader.train.mapper.update(augmentations=augmentations, instance_mask_format="bitmask")
dataloader.test.mapper.augmentations[0].update(short_edge_length=640, max_size=640)
del augmentations  # or it would be a part of the config
