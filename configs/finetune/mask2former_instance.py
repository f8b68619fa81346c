"""Mask2Former on one's own data: set dataset.train_json, train_images, val_json, val_images."""

from detbackbones.data.registry import num_classes
from detectron2.config import LazyCall as L

from ..common.finetune import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.mask2former_small import model

model.num_classes = L(num_classes)(dataset="${dataloader.train.dataset.names}")
optimizer.params.backbone_lr_factor = 0.1

dataloader.train.mapper.instance_mask_format = "bitmask"  # of polygons and RLE
dataloader.train.dataset.names.mask_format = "${dataloader.train.mapper.instance_mask_format}"
dataloader.test.dataset.names.mask_format = "${dataloader.train.mapper.instance_mask_format}"
dataloader.evaluator.tasks = ["bbox", "segm"]  # also while nothing is found
