"""The recipe of Mask2Former: 50 epochs of COCO with a batch of 16 and large-scale jitter.

See https://arxiv.org/abs/2112.01527, section 4.1.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .optim import AdamW as optimizer
from .train import train

augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
    L(T.FixedSizeCrop)(crop_size=(1024, 1024)),
]
optimizer.update(lr=1e-4, weight_decay=0.05)
optimizer.params.backbone_lr_factor = 0.1
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[327778, 355092], num_updates=368750
    ),
    warmup_length=10 / 368750,  # fraction of train.max_iter
    warmup_factor=1.0,
)
train.max_iter = 368750
train.clip_grad.enabled = True
train.clip_grad.params.max_norm = 0.01
