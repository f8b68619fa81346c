"""FeatureBackbone: a feature extractor of any source as a detectron2 backbone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from omegaconf import OmegaConf
from torch import nn

from .freeze import NO_PREFIX, Prefix, freeze
from .levels import Trace, output_list, trace
from .messages import nearest
from .norm import convert_norm


def select_levels(out_features: Sequence[str] | None, valid: Sequence[str]) -> list[str]:
    """The levels to output: those of ``out_features``, in the order of ``valid``.

    Without ``out_features``, the levels of strides 4 to 32 (``res2`` to ``res5``).

    Raises:
        ValueError: if a name is unknown or given twice, or the list is empty.
    """
    if out_features is None:
        return [name for name in valid if name in ("res2", "res3", "res4", "res5")]
    wrong = [name for name in out_features if name not in valid]
    if wrong or not out_features or len(set(out_features)) < len(out_features):
        raise ValueError(
            f"out_features={list(out_features)} must be different levels of the model: "
            + nearest(wrong[0] if wrong else "", valid)
        )
    return [name for name in valid if name in out_features]


def plain_dict(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments as a dict of its own, with plain lists and dicts where a config had its."""
    if OmegaConf.is_config(arguments):
        return OmegaConf.to_container(arguments, resolve=True)
    return dict(arguments or {})


class FeatureBackbone(Backbone):
    """A feature extractor with measured channels and strides, frozen as asked.

    Its state dict has the source model's own keys under the prefix ``model.``, so that checkpoints
    of the source model load into it, and it saves back to them.
    """

    def __init__(
        self,
        extractor: nn.Module,
        names: Sequence[str],
        *,
        in_channels: int = 3,
        norm: str = "",
        prefix: Prefix = NO_PREFIX,
        source_keys: Mapping[str, str] | None = None,
        source_names: Iterable[str] = (),
    ):
        """
        Args:
            extractor: maps (N, C, H, W) images to a list or dict of feature maps, (N, C, h, w) or
                (N, h, w, C).
            names: a name for each of its outputs.
            in_channels: channels of the input.
            norm: see :func:`detbackbones.norm.convert_norm`.
            prefix: the part to freeze, see :func:`detbackbones.freeze.frozen_prefix`.
            source_keys: names of the extractor's parameters and buffers to their names in the
                source model, where these differ.
            source_names: keys of the source model's whole state dict; when they are given, weights
                of a deeper model of its family are refused.
        """
        super().__init__()
        measured = trace(extractor, in_channels)
        _drop_unused(extractor, measured, in_channels)
        self.model = convert_norm(extractor, norm)
        self._eval_modules = freeze(self.model, prefix)
        self._source_keys = {k: v for k, v in (source_keys or {}).items() if k != v}
        self._source_names = frozenset(source_names)
        self.register_state_dict_post_hook(_rename_saved)
        self.register_load_state_dict_pre_hook(_rename_loaded)

        # (position among the extractor's outputs, level), fine to coarse
        levels = sorted(zip(names, enumerate(measured.levels)), key=lambda item: item[1][1].stride)
        self._levels = dict(levels)
        self._out_features = list(self._levels)
        self._out_feature_channels = {n: level.channels for n, (_, level) in levels}
        self._out_feature_strides = {n: level.stride for n, (_, level) in levels}
        self.train()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images (N, C, H, W); H and W are multiples of ``size_divisibility``.

        Returns:
            each level's feature map (N, C, H / stride, W / stride), fine to coarse.
        """
        outputs = output_list(self.model(x))
        return {
            name: outputs[i].permute(0, 3, 1, 2) if level.channels_last else outputs[i]
            for name, (i, level) in self._levels.items()
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level, fine to coarse."""
        return super().output_shape()

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of this."""
        return max(self._out_feature_strides.values())

    def train(self, mode: bool = True) -> "FeatureBackbone":
        """Set the mode of all but the frozen modules, which stay in eval mode."""
        super().train(mode)
        for name in self._eval_modules:
            self.model.get_submodule(name).eval()
        return self

    def load_source(self, state: Mapping[str, torch.Tensor]) -> tuple[int, list[str]]:
        """Load a state dict of the source model; what the levels do not need is passed over.

        Args:
            state: with the source model's own keys.

        Returns:
            how many tensors were loaded, and the keys that are missing or of another shape.

        Raises:
            ValueError: if the state dict has layers that the source model has not.
        """
        own = {key.removeprefix("model."): value for key, value in self.state_dict().items()}
        parts = {key.partition(".")[0] for key in own}
        for key in state if self._source_names else ():
            foreign = key.endswith(".weight") and key not in self._source_names
            if foreign and key.partition(".")[0] in parts:
                raise ValueError(f"the model has no {key}")
        fit = {k: state[k] for k, v in own.items() if k in state and state[k].shape == v.shape}
        self.load_state_dict({f"model.{key}": value for key, value in fit.items()}, strict=False)
        # timm and torchvision count batches, but nothing depends on it
        wanting = [k for k in own if k not in fit and not k.endswith("num_batches_tracked")]
        return len(fit), wanting


def _drop_unused(extractor: nn.Module, measured: Trace, in_channels: int) -> None:
    """Replace the modules whose parameters no level needs, never used or used after the last one.

    Where the model cannot run without them they stay, without gradients.
    """
    end = max(level.end for level in measured.levels)
    needed = {name for name, first in measured.parameters.items() if first <= end}
    dropped = {}
    for name, module in list(extractor.named_modules()):
        own = [f"{name}.{key}" for key, _ in module.named_parameters()]
        parent, _, child = name.rpartition(".")
        inside = any(name.startswith(f"{other}.") for other in dropped)
        if name and own and not inside and not needed.intersection(own):
            dropped[name] = (extractor.get_submodule(parent), child, module)
    for parent, child, _ in dropped.values():
        setattr(parent, child, nn.Identity())
    try:
        whole = trace(extractor, in_channels).levels == measured.levels
    except Exception:  # what follows the last level may fail in any way
        whole = False
    if not whole:
        for parent, child, module in dropped.values():
            setattr(parent, child, module)
    for name, parameter in extractor.named_parameters():
        if name not in needed:
            parameter.requires_grad_(False)


def _rename(state_dict: dict, prefix: str, names: Mapping[str, str]) -> None:
    for old, new in names.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)


def _rename_saved(module: FeatureBackbone, state_dict: dict, prefix: str, _) -> None:
    _rename(state_dict, prefix + "model.", module._source_keys)


def _rename_loaded(module: FeatureBackbone, state_dict: dict, prefix: str, *_) -> None:
    _rename(state_dict, prefix + "model.", {v: k for k, v in module._source_keys.items()})
