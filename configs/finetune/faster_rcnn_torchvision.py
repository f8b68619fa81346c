"""faster rcnn on one's own data, on a torchvision model."""

from detbackbones.backbones.source import per_channel
from detectron2.config import LazyCall as L

from ..common.backbone import torchvision_pixels, torchvision_r50
from .faster_rcnn import dataloader, dataset, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up = torchvision_r50
model.backbone.bottom_up.update(model_name="resnet18", in_channels="${dataset.channels}")
for key, values in torchvision_pixels.items():
    model[key] = L(per_channel)(values=values, in_channels="${dataset.channels}")
del key, values  # or they would be a part of the config
