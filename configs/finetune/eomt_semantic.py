"""EoMT on one's own data: set dataset.train_images, train_labels, val_images, val_labels
and num_classes. The images may be a pattern: dataset.train_images='images/train_*.jpg'."""

from ..common.models.eomt_small import model
from .semantic_fpn import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401

model.update(task="semantic", num_classes="${dataset.num_classes}")
optimizer.update(lr=2e-4)
optimizer.params.layer_decay = 0.8
