"""A linear probe on one's own label maps: set dataset.train_images, train_labels, val_images,
val_labels and num_classes; or on data that detectron2 knows: dataloader.train.dataset.names,
dataloader.test.dataset.names and dataset.num_classes."""

from ..common.models.probe import model
from ..finetune.semantic_fpn import (  # noqa: F401
    dataloader,
    dataset,
    lr_multiplier,
    optimizer,
    train,
)

model.sem_seg_head.num_classes = "${dataset.num_classes}"
model.backbone.update(model_name="resnet18", in_channels="${dataset.channels}")
model.pixel_mean.in_channels = model.pixel_std.in_channels = "${dataset.channels}"
dataset.train_sizes = [288]  # one size: the features of an image can be used again
optimizer.lr = 3e-2
train.update(max_iter=500, eval_period=0)
