"""The recipe of EoMT for COCO: 12 epochs with a batch of 16, crops of 640, large-scale jitter.

See https://arxiv.org/abs/2503.19108. There the ViT begins to learn after the heads; here both do
together.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from .optim import AdamW as optimizer
from .train import train

augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=640, target_width=640),
    L(T.FixedSizeCrop)(crop_size=(640, 640)),
]
optimizer.update(lr=1e-4, weight_decay=0.05)
optimizer.params.layer_decay = 0.8
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(PolynomialDecayParamScheduler)(base_value=1.0, power=0.9),
    warmup_length=1500 / 88700,  # fraction of train.max_iter
    warmup_factor=0.001,
)
train.max_iter = 88700
train.clip_grad.enabled = True
train.clip_grad.params.max_norm = 0.01
