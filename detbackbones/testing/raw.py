"""RawBackbone: what the contract makes of timm's own feature extractor."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone


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
