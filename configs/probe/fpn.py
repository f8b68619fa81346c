"""The head of Panoptic FPN as a probe: data as for linear.py. The pyramid learns with the head."""

from ..finetune.semantic_fpn import model
from .linear import dataloader, dataset, lr_multiplier, optimizer, train  # noqa: F401

model.backbone.bottom_up.freeze_at = 5
optimizer.lr = 1e-3
