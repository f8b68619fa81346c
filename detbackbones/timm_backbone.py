"""TimmBackbone: any timm model as a detectron2 backbone."""

import logging
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.models._manipulate import adapt_input_conv, group_with_matcher

from .checkpoint import load_backbone_checkpoint
from .feature_backbone import FeatureBackbone, plain_dict, select_levels
from .freeze import frozen_prefix, renamed_prefix
from .layers import check_layers
from .levels import last_of_each_stride
from .messages import one_of, whole_number
from .norm import NORMS, norm_from_layer
from .pyramid import build_yacs_pyramid
from .timm_models import (
    all_levels,
    create,
    create_extractor,
    patch_kwargs,
    size_switch,
    source_names,
)

logger = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register()
class TimmBackbone(FeatureBackbone):
    """A timm model as a backbone: feature maps by stride (``res2`` ...) or index (``p1`` ...)."""

    @configurable
    def __init__(
        self,
        model_name: str,
        *,
        pretrained: bool = False,
        checkpoint_path: str = "",
        in_channels: int = 3,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        norm: str = "",
        freeze_at: int = 0,
        fold: bool = True,
        channels_last: bool | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        output_stride: int | None = None,
        img_size: int | None = None,
        patch_size: int | None = None,
        drop_path_rate: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
        features_only: bool = True,
        norm_layer: type | str | None = None,
    ):
        """
        Args:
            model_name: as in ``timm.create_model``, with or without a tag; ``hf-hub:...`` and
                ``local-dir:...`` work as there.
            pretrained: download timm's pretrained weights.
            checkpoint_path: a ``.pth``, ``.pt`` or ``.safetensors`` file of the classification
                model, or of a detector trained with this backbone.
            in_channels: channels of the input; weights of another number are adapted as timm does.
            out_features: levels to output, by stride: ``["res3", "res4", "res5"]``. By default
                those of strides 4 to 32. Later stages are not built.
            out_indices: levels to output by timm's index instead, named ``p{index}``.
            layers: names of modules whose outputs to take instead, ``["layer2", "layer3"]``, or a
                mapping from these to level names.
            norm: batch norm ``""`` as in the model, ``"FrozenBN"``, ``"SyncBN"`` or ``"BN"``.
            freeze_at: 0 nothing, 1 the stem, 2 up to and including ``res2``, ... 5 all.
            fold: make frozen batch norm a part of the convolution before it; see ``fold_norms``.
            channels_last: the memory format of the maps; None is for where it was measured to help,
                on a CPU in models with batch norm.
            compile: run the model through ``torch.compile``.
            grad_checkpointing: compute maps again in the backward pass instead of keeping them:
                less memory, more time.
            output_stride: 8, 16 or 32; dilate the late stages to keep it, in models that can.
            img_size: build the model for images of this size, in models that are built for one.
                Most take others too; those that do not take images up to this size.
            patch_size: resample the patch embedding to this stride, in ViTs: 16 lets a feature
                pyramid stand on a patch-14 ViT. The grid of the position embeddings stays.
            drop_path_rate: stochastic depth, in models that have it.
            model_kwargs: further arguments for ``timm.create_model``.
            features_only: only True; there for configs written for detrex.
            norm_layer: a FrozenBatchNorm2d class means ``norm="FrozenBN"``; for detrex's configs.

        Raises:
            ValueError: if an argument is out of range or the model cannot give what is asked.
            FileNotFoundError: if ``checkpoint_path`` does not exist.
            ConnectionError: if pretrained weights cannot be downloaded.
        """
        if not features_only:
            raise ValueError("features_only=False is not possible: a backbone gives feature maps")
        whole_number("in_channels", in_channels)
        asked = {"out_features": out_features, "out_indices": out_indices, "layers": layers}
        asked = [f"{key}={value}" for key, value in asked.items() if value is not None]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} were given together: use one")
        if output_stride not in (None, 8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r} is unknown: valid are 8, 16, 32")
        one_of("norm", norm, NORMS)
        if norm_layer is not None:
            norm = norm_from_layer(norm_layer, norm)

        kwargs = {**plain_dict(model_kwargs), "in_chans": in_channels}
        if drop_path_rate is not None:
            kwargs["drop_path_rate"] = drop_path_rate
        if img_size is not None:
            whole_number("img_size", img_size)
            kwargs["img_size"] = img_size
        if patch_size is not None:
            whole_number("patch_size", patch_size)
            kwargs |= patch_kwargs(model_name, patch_size, kwargs)
        found = all_levels(model_name, **kwargs)
        prefix = frozen_prefix(found.trace, freeze_at, found.names)
        by_stride = last_of_each_stride(found.trace.levels)
        if output_stride is not None:
            kwargs["output_stride"] = output_stride

        indices, modules = [], []
        if layers is not None:
            source = create(model_name, "meta", **kwargs)
            named = check_layers(source, layers, (found.native, found.native), in_channels)
            modules, level_names = list(named), list(named.values())
        elif out_indices is not None:
            indices = _checked_indices(out_indices, found.indices, model_name)
            level_names = [f"p{index}" for index in indices]
        else:
            level_names = select_levels(out_features, list(by_stride))
            indices = [found.indices[by_stride[name]] for name in level_names]
        kwargs, sizes, measured = size_switch(model_name, indices=indices, layers=modules, **kwargs)
        extractor = create_extractor(
            model_name, None, indices, modules, pretrained=pretrained, **kwargs
        )
        names = found.names
        if layers is not None:
            names = source_names(extractor, source)
            prefix = renamed_prefix(prefix, found.names, names)
        super().__init__(
            extractor,
            level_names,
            in_channels=in_channels,
            sizes=sizes,
            measured=measured,
            norm=norm,
            prefix=prefix,
            fold=fold,
            channels_last=channels_last,
            compile=compile,
            grad_checkpointing=grad_checkpointing,
            source_keys=names,
            source_names=found.keys,
        )
        self.model_name = model_name
        self.indices = dict(zip(level_names, indices))  # of timm, by level; empty with `layers`
        self._kwargs = {key: value for key, value in kwargs.items() if key != "output_fmt"}
        if checkpoint_path:
            load_backbone_checkpoint(self, checkpoint_path)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from the yacs keys under MODEL.TIMM, see ``add_backbone_config``."""
        timm_cfg = cfg.MODEL.TIMM
        return {
            "model_name": timm_cfg.MODEL_NAME,
            "pretrained": timm_cfg.PRETRAINED,
            "checkpoint_path": timm_cfg.CHECKPOINT_PATH,
            "in_channels": input_shape.channels,
            "out_features": timm_cfg.OUT_FEATURES or None,
            "norm": timm_cfg.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "output_stride": timm_cfg.OUTPUT_STRIDE or None,
            "img_size": timm_cfg.IMG_SIZE or None,
            "patch_size": timm_cfg.PATCH_SIZE or None,
            "drop_path_rate": timm_cfg.DROP_PATH_RATE or None,
            "grad_checkpointing": timm_cfg.GRAD_CHECKPOINTING,
        }

    @property
    def pixel_mean(self) -> list[float]:
        """Mean of the images that the model was trained on, RGB, in the range 0 to 255."""
        return pixel_mean(self.model_name)

    @property
    def pixel_std(self) -> list[float]:
        """Standard deviation that goes with :attr:`pixel_mean`."""
        return pixel_std(self.model_name)

    def load_source(self, state: Mapping[str, torch.Tensor]) -> tuple[int, list[str]]:
        """Load a state dict of the classification model, converted as timm converts it.

        timm's filters read the formats of original repositories and resample position embeddings;
        the first convolution is adapted to ``in_channels``.
        """
        source = create(self.model_name, "meta", **self._kwargs)
        module = sys.modules[type(source).__module__]
        own = source.state_dict()
        wanted = {key.removeprefix("model.") for key in self.state_dict()}
        if {k for k in wanted if not k.endswith("num_batches_tracked")} <= state.keys():
            # Filters tell timm's own format by the classifier, which a trained backbone has not.
            state = {**own, **state}
        if hasattr(module, "checkpoint_filter_fn"):
            try:
                state = module.checkpoint_filter_fn(dict(state), source)
            except Exception:  # it knows no such format; the comparison says what is missing
                logger.debug("timm's filter for %s failed", self.model_name, exc_info=True)
        state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and not v.is_meta}
        first = source.pretrained_cfg.get("first_conv") or ()
        for name in (first,) if isinstance(first, str) else first:
            key = f"{name}.weight"
            if key in state and key in own and state[key].shape[1] == 3 != own[key].shape[1]:
                state = {**state, key: adapt_input_conv(own[key].shape[1], state[key])}
        return super().load_source(state)

    def parameter_depths(self) -> dict[str, int] | None:
        """The layers that timm's ``group_matcher()`` finds in the classification model.

        What it does not match is of depth 0, with the classifier, as timm has it.
        """
        source = create(self.model_name, "meta", **self._kwargs)
        if not hasattr(source, "group_matcher"):
            return None
        names = self._parameters_of_source()
        keys = {key for key, _ in source.named_parameters()} | set(names.values())
        if not source.num_classes:  # or the last block would have the classifier's place
            keys.add("(classifier)")
        matcher = source.group_matcher(coarse=False)
        layers = group_with_matcher(((key, key) for key in keys), matcher, reverse=True)
        return {name: max(layers.values()) - layers[key] for name, key in names.items()}

    def no_weight_decay(self) -> set[str]:
        """What timm's ``no_weight_decay()`` names, or matches by a pattern."""
        source = create(self.model_name, "meta", **self._kwargs)
        patterns = source.no_weight_decay() if hasattr(source, "no_weight_decay") else ()
        names = self._parameters_of_source()
        return {name for name, key in names.items() if any(fnmatch(key, p) for p in patterns)}

    def _parameters_of_source(self) -> dict[str, str]:
        """Names of the parameters to their names in the classification model."""
        names = [name for name, _ in self.model.named_parameters()]
        return {f"model.{name}": self._source_keys.get(name, name) for name in names}


def _checked_indices(
    out_indices: Sequence[int], valid: Sequence[int], model_name: str
) -> list[int]:
    """``out_indices``, counted from 0 and in ascending order."""
    count = valid[-1] + 1
    if isinstance(out_indices, int) or not all(isinstance(i, int) for i in out_indices):
        raise ValueError(f"out_indices={out_indices!r} must be a list of whole numbers")
    indices = sorted(i + count if i < 0 else i for i in out_indices)
    if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(valid):
        raise ValueError(
            f"out_indices={list(out_indices)} must be different levels of {model_name}, "
            f"{valid[0]} to {valid[-1]}"
        )
    return indices


def pixel_mean(model_name: str) -> list[float]:
    """Mean of the images that a timm model was trained on, RGB, in the range 0 to 255."""
    return [255 * value for value in create(model_name, "meta").pretrained_cfg["mean"]]


def pixel_std(model_name: str) -> list[float]:
    """Standard deviation that goes with :func:`pixel_mean`."""
    return [255 * value for value in create(model_name, "meta").pretrained_cfg["std"]]


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TimmBackbone with a pyramid p2 to p6, from yacs keys."""
    return build_yacs_pyramid(cfg, TimmBackbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TimmBackbone with a pyramid p3 to p7, from yacs keys."""
    return build_yacs_pyramid(cfg, TimmBackbone(cfg, input_shape), retinanet=True)
