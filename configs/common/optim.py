"""AdamW without weight decay on norms and biases, and learning rates for the backbone's layers."""

import torch
from detbackbones.training.optim import param_groups
from detectron2.config import LazyCall as L

AdamW = L(torch.optim.AdamW)(
    params=L(param_groups)(
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        backbone_lr_factor=1.0,
        layer_decay=1.0,
    ),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    fused=True,  # on a CPU two to six times as fast
)
