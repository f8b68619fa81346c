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

from .config import add_backbone_config, get_config, list_configs
from .detr import TransformersDetector
from .feature_backbone import FeatureBackbone
from .heads import DPTHead, LinearHead
from .pyramid import build_pyramid
from .timm_backbone import TimmBackbone
from .torchvision_backbone import TorchvisionBackbone

__all__ = [
    "DPTHead",
    "FeatureBackbone",
    "LinearHead",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TransformersDetector",
    "add_backbone_config",
    "build_pyramid",
    "get_config",
    "list_configs",
]
