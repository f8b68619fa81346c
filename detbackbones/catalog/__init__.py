"""The measured catalogue of models, and AutoTimm's names for creating them."""

from .autotimm import (
    BackboneConfig,
    FeatureBackboneConfig,
    FeatureMaps,
    count_parameters,
    create_backbone,
    create_feature_backbone,
    get_backbone_out_features,
    get_feature_channels,
    get_feature_info,
    get_feature_strides,
)
from .facts import NECKS, Facts, facts
from .listing import ModelSource, get_model_source, list_backbones, list_hf_hub_backbones

__all__ = [
    "NECKS",
    "BackboneConfig",
    "Facts",
    "FeatureBackboneConfig",
    "FeatureMaps",
    "ModelSource",
    "count_parameters",
    "create_backbone",
    "create_feature_backbone",
    "facts",
    "get_backbone_out_features",
    "get_feature_channels",
    "get_feature_info",
    "get_feature_strides",
    "get_model_source",
    "list_backbones",
    "list_hf_hub_backbones",
]
