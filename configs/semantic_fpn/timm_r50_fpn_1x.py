"""semantic FPN, timm ResNet-50, COCO stuff 1x."""

from ..common.coco_stuff import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from ..common.models.semantic_fpn import model  # noqa: F401
