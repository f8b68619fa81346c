"""DINO on one's own data: set dataset.train_json, train_images, val_json, val_images.

It is smaller than that of the paper, which has 900 queries, 6 layers in both its parts, and 2048
hidden features in each.
"""

from detbackbones.data.registry import num_classes
from detectron2.config import LazyCall as L

from ..common.finetune import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.dino import model

model.num_classes = L(num_classes)(dataset="${dataloader.train.dataset.names}")
model.num_queries = 100
model.test_topk_per_image = 100
model.config_kwargs.update(
    encoder_layers=2, decoder_layers=3, encoder_ffn_dim=1024, decoder_ffn_dim=1024
)
model.backbone.update(model_name="tf_efficientnet_lite0", in_channels="${dataset.channels}")
dataloader.train.mapper.use_instance_mask = False
optimizer.params.backbone_lr_factor = 0.1
train.clip_grad.params.max_norm = 0.1
