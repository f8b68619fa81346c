"""Backbones: models of any source with detectron2's interface, and pyramids over them."""

from .feature_backbone import FeatureBackbone
from .pyramid import build_pyramid
from .spatial_adapter import SpatialTuningAdapter
from .timm_backbone import TimmBackbone
from .torchvision_backbone import TorchvisionBackbone

# by the name of the source; a third is one line here
BACKBONES = {"timm": TimmBackbone, "torchvision": TorchvisionBackbone}

__all__ = [
    "BACKBONES",
    "FeatureBackbone",
    "SpatialTuningAdapter",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_pyramid",
]
