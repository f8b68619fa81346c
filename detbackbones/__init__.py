"""Any timm or torchvision model as a detectron2 backbone."""

import warnings

try:
    with warnings.catch_warnings():
        # detectron2 imports pkg_resources and scripts two functions; both only warn
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*is deprecated")
        import detectron2.model_zoo  # noqa: F401
        import detectron2.modeling  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"detbackbones needs detectron2, which cannot be imported ({error}): "
        "run python tools/install_detectron2.py from the project's checkout"
    ) from error

from .catalog import (
    BackboneConfig,
    FeatureBackboneConfig,
    ModelSource,
    count_parameters,
    create_backbone,
    create_feature_backbone,
    get_backbone_out_features,
    get_feature_channels,
    get_feature_info,
    get_feature_strides,
    get_model_source,
    list_backbones,
    list_hf_hub_backbones,
)
from .config import add_backbone_config, get_config, list_configs
from .detr import TransformersDetector
from .feature_backbone import FeatureBackbone
from .heads import DPTHead, LinearHead
from .pyramid import build_pyramid
from .timm_backbone import TimmBackbone
from .torchvision_backbone import TorchvisionBackbone

__all__ = [
    "BackboneConfig",
    "DPTHead",
    "FeatureBackbone",
    "FeatureBackboneConfig",
    "LinearHead",
    "ModelSource",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TransformersDetector",
    "add_backbone_config",
    "build_pyramid",
    "count_parameters",
    "create_backbone",
    "create_feature_backbone",
    "get_backbone_out_features",
    "get_config",
    "get_feature_channels",
    "get_feature_info",
    "get_feature_strides",
    "get_model_source",
    "list_backbones",
    "list_configs",
    "list_hf_hub_backbones",
]
