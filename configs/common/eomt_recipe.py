"""The recipe of EoMT for COCO: 12 epochs with a batch of 16, crops of 640, large-scale jitter.

See https://arxiv.org/abs/2503.19108. There the ViT begins to learn after the heads; here both do
together.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from .mask2former_recipe import augmentations, optimizer, train

augmentations[1].update(target_height=640, target_width=640)
augmentations[2].crop_size = (640, 640)
optimizer.params.update(backbone_lr_factor=1.0, layer_decay=0.8)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(PolynomialDecayParamScheduler)(base_value=1.0, power=0.9),
    warmup_length=1500 / 88700,  # fraction of train.max_iter
    warmup_factor=0.001,
)
train.max_iter = 88700
