"""Mask2Former on one's own data: set dataset.train_images, train_labels, val_images, val_labels
and num_classes. The images may be a pattern: dataset.train_images='images/train_*.jpg'."""

from ..common.models.mask2former import model
from .semantic_fpn import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401

model.update(task="semantic", num_classes="${dataset.num_classes}")
model.config_kwargs.update(encoder_layers=2, decoder_layers=4, train_num_points=4096)
model.backbone.update(model_name="tf_efficientnet_lite0", in_channels="${dataset.channels}")
optimizer.lr = 2e-4
optimizer.params.backbone_lr_factor = 0.1
