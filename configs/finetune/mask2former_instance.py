"""Mask2Former on one's own data: set dataset.train_json, train_images, val_json, val_images.

It is smaller than that of the paper, which has 6 layers in its encoder and 9 in its decoder:
transformers counts one more in decoder_layers.
"""

from detbackbones.data.registry import num_classes
from detectron2.config import LazyCall as L

from ..common.finetune import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.mask2former import model

model.num_classes = L(num_classes)(dataset="${dataloader.train.dataset.names}")
model.config_kwargs.update(encoder_layers=2, decoder_layers=4, train_num_points=4096)
model.backbone.update(model_name="tf_efficientnet_lite0", in_channels="${dataset.channels}")
optimizer.lr = 2e-4
optimizer.params.backbone_lr_factor = 0.1

dataloader.train.mapper.instance_mask_format = "bitmask"  # of polygons and RLE
dataloader.train.dataset.names.mask_format = "${dataloader.train.mapper.instance_mask_format}"
dataloader.test.dataset.names.mask_format = "${dataloader.train.mapper.instance_mask_format}"
dataloader.evaluator.tasks = ["bbox", "segm"]  # also while nothing is found
