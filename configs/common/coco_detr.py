"""COCO as DETRs are trained on it, with DINO's recipe of 12 epochs with a batch of 16.

The recipe is that of https://arxiv.org/abs/2203.03605 with a warm-up of 900 iterations, the
augmentation of https://arxiv.org/abs/2005.12872. detectron2 leaves out images without boxes.
"""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .coco import dataloader, train
from .optim import AdamW as optimizer

dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations = [
    L(T.RandomApply)(
        tfm_or_aug=L(T.AugmentationList)(
            augs=[
                L(T.ResizeShortestEdge)(short_edge_length=(400, 500, 600), sample_style="choice"),
                L(T.RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
            ]
        ),
        prob=0.5,
    ),
    L(T.ResizeShortestEdge)(
        short_edge_length=tuple(range(480, 801, 32)), max_size=1333, sample_style="choice"
    ),
    L(T.RandomFlip)(horizontal=True),
]

optimizer.update(lr=1e-4, weight_decay=1e-4)
optimizer.params.backbone_lr_factor = 0.1
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[82500, 90000]),
    warmup_length=0.01,  # fraction of train.max_iter
    warmup_factor=0.01,
)
train.max_iter = 90000
train.clip_grad.enabled = True
train.clip_grad.params.max_norm = 0.1
