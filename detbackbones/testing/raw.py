"""timm's own feature extractors, as they come: something to compare with."""

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from torch import nn


class RawBackbone(Backbone):
    """timm's own feature extractor as it comes, believed in all that it says of itself."""

    img_size = None
    resampled = ()

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] | None = None,
        norm: str = "",
        fold: bool = False,  # timm folds nothing
        **kwargs: Any,
    ):
        super().__init__()
        if out_features is not None:
            kwargs["out_indices"] = [int(level.removeprefix("p")) for level in out_features]
        self.model = timm.create_model(name, features_only=True, **kwargs)
        info = self.model.feature_info
        self._out_features = [f"p{index}" for index in info.out_indices]
        self._out_feature_channels = dict(zip(self._out_features, info.channels()))
        self._out_feature_strides = dict(zip(self._out_features, info.reduction()))
        if norm == "FrozenBN":
            self.model = FrozenBatchNorm2d.convert_frozen_batchnorm(self.model)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._out_features, self.model(x)))

    def load_source(self, state: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
        missing = self.model.load_state_dict(state, strict=False).missing_keys
        return len(self.model.state_dict()) - len(missing), missing


def extracted_maps(name: str, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The maps (N, C, H, W) that ``features_only=True`` gives for the weights of a model.

    For most families that is another way to them than the one by which TimmBackbone has its levels.

    Args:
        name: of the model.
        model: as timm creates it.
        x: images (N, C, H, W).
    """
    extractor = timm.create_model(name, features_only=True).eval().to(x.dtype)
    values = {flat(key): value for key, value in model.state_dict().items()}
    own = extractor.state_dict()
    extractor.load_state_dict({key: values[flat(key)] for key in own})
    channels = extractor.feature_info.channels()
    maps = extractor(x)
    return [m if m.shape[1] == c else m.permute(0, 3, 1, 2) for m, c in zip(maps, channels)]


def flat(key: str) -> str:
    """A key of a state dict as it is called in every kind of extractor."""
    return re.sub(r"^((model|body)\.)*", "", key).replace(".", "_")
