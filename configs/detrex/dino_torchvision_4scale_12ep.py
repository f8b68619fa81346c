"""detrex's DINO, torchvision ResNet-50, COCO for 12 epochs."""

from detbackbones import TorchvisionBackbone
from detectron2.config import LazyCall as L

from ..common.backbone import torchvision_pixels
from .dino_timm_4scale_12ep import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone = L(TorchvisionBackbone)(
    model_name="resnet50",
    weights="DEFAULT",
    out_features=["res3", "res4", "res5"],
    norm="FrozenBN",
    freeze_at=1,
)
model.update(torchvision_pixels)
train.output_dir = "output/dino_torchvision_4scale_12ep"
