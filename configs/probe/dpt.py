"""DPT's decoder as a probe: data as for linear.py. Of a plain ViT it takes four depths."""

from detbackbones.heads import DPTHead
from detbackbones.heads.dpt import dpt_indices
from detectron2.config import LazyCall as L

from .linear import dataloader, dataset, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.out_indices = L(dpt_indices)(model_name="${..model_name}")
model.sem_seg_head._target_ = DPTHead
model.sem_seg_head.conv_dims = 64  # small enough for a CPU; 256 in the paper
optimizer.lr = 1e-3
