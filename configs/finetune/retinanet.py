"""retinanet on one's own data: set dataset.train_json, train_images, val_json, val_images."""

from detbackbones.data.registry import num_classes
from detectron2.config import LazyCall as L

from ..common.finetune import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.retinanet import model

model.num_classes = L(num_classes)(dataset="${dataloader.train.dataset.names}")
model.backbone.out_channels = 128
model.backbone.bottom_up.update(
    model_name="tf_efficientnet_lite0", in_channels="${dataset.channels}"
)
model.pixel_mean.in_channels = model.pixel_std.in_channels = "${dataset.channels}"
dataloader.train.mapper.use_instance_mask = False
