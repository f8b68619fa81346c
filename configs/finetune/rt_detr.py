"""rt_detr_v2 on one's own data: set dataset.train_json, train_images, val_json, val_images.

Or another architecture: model.architecture=deformable_detr.
"""

from detbackbones.data.registry import num_classes
from detectron2.config import LazyCall as L

from ..common.finetune import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.detr import model

model.num_classes = L(num_classes)(dataset="${dataloader.train.dataset.names}")
model.num_queries = 100
model.test_topk_per_image = 100
model.config_kwargs.decoder_layers = 3
model.backbone.update(model_name="tf_efficientnet_lite0", in_channels="${dataset.channels}")
dataloader.train.mapper.use_instance_mask = False
optimizer.params.backbone_lr_factor = 0.1
train.clip_grad.params.max_norm = 0.1
