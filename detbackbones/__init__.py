"""Any timm or torchvision model as a detectron2 backbone."""

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .deploy import Predictor

_MISSING = ""
try:
    with warnings.catch_warnings():
        # detectron2 imports pkg_resources and scripts two functions; both only warn
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*is deprecated")
        import detectron2.model_zoo  # noqa: F401
        import detectron2.modeling  # noqa: F401
except ImportError as error:  # the program that installs it is a part of this package
    _MISSING = (
        f"detbackbones needs detectron2, which cannot be imported ({error}): "
        "run detbackbones install-detectron2"
    )
else:
    from .backbones import (
        FeatureBackbone,
        SpatialTuningAdapter,
        TimmBackbone,
        TorchvisionBackbone,
        build_pyramid,
    )
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
    from .config import add_backbone_config, get_config, list_configs, load_config
    from .detr import TransformersDetector, TransformersSegmenter
    from .heads import DPTHead, LinearHead

__all__ = [
    "BackboneConfig",
    "DPTHead",
    "FeatureBackbone",
    "FeatureBackboneConfig",
    "LinearHead",
    "ModelSource",
    "Predictor",
    "SpatialTuningAdapter",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TransformersDetector",
    "TransformersSegmenter",
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
    "load_config",
]


def __getattr__(name: str) -> object:
    if _MISSING and name in __all__:
        raise ImportError(_MISSING)
    if name == "Predictor":  # it brings training and its plots, which a backbone does without
        from .deploy import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
