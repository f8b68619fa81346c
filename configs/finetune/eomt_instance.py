"""EoMT on one's own data: set dataset.train_json, train_images, val_json, val_images."""

from detbackbones.data.registry import num_classes
from detectron2.config import LazyCall as L

from ..common.models.eomt_small import model
from .mask2former_instance import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401

model.num_classes = L(num_classes)(dataset="${dataloader.train.dataset.names}")
optimizer.update(lr=2e-4)
optimizer.params.update(backbone_lr_factor=1.0, layer_decay=0.8)
