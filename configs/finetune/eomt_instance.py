"""EoMT on one's own data: set dataset.train_json, train_images, val_json, val_images."""

from detbackbones.data.registry import num_classes
from detectron2.config import LazyCall as L

from ..common.finetune import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.eomt_small import model

model.num_classes = L(num_classes)(dataset="${dataloader.train.dataset.names}")
optimizer.update(lr=2e-4)
optimizer.params.layer_decay = 0.8

dataloader.train.mapper.instance_mask_format = "bitmask"  # of polygons and RLE
dataloader.train.dataset.names.mask_format = "${dataloader.train.mapper.instance_mask_format}"
dataloader.test.dataset.names.mask_format = "${dataloader.train.mapper.instance_mask_format}"
dataloader.evaluator.tasks = ["bbox", "segm"]  # also while nothing is found
