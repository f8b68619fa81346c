"""fcos on one's own data: set dataset.train_json, train_images, val_json, val_images."""

from ..common.models.fcos import model
from .retinanet import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from .retinanet import model as retinanet

model.num_classes = retinanet.num_classes
model.backbone = retinanet.backbone
model.update(pixel_mean=retinanet.pixel_mean, pixel_std=retinanet.pixel_std)
del retinanet  # or it would be a part of the config
