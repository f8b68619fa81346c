"""A model of transformers with a detectron2 backbone in the place of its own."""

import math
import re
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..data.images import ImageError
from ..messages import first_line
from .architectures import EVERY, SEGMENTERS, import_transformers
from .initialization import initialize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# what boxes are computed from: heads, and the maps whose precision the anchors have
_BOXES = re.compile(r"bbox_(embed|predictor|head)(\.\d+)?$|decoder_input_proj\.\d+$")


class BackboneEncoder(nn.Module):
    """A detectron2 backbone in the place of the one of a transformers model.

    The backbone is no submodule of it: the detector that holds both has it under its own name.
    """

    def __init__(
        self,
        backbone: Backbone,
        names: Sequence[str],
        *,
        min_positions: int = 0,
        with_masks: bool = True,
    ):
        """
        Args:
            backbone: gives the feature maps.
            names: of the levels to take, fine to coarse.
            min_positions: that the maps must have together, where a query is chosen from each.
            with_masks: it takes the place of a convolution encoder, which gives maps and masks;
                else of a backbone, which gives maps alone.
        """
        super().__init__()
        self._backbone, self.names = [backbone], names
        self.min_positions, self.with_masks = min_positions, with_masks

    def forward(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None, **_: Any
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | SimpleNamespace:
        """
        Args:
            pixel_values: normalized images (N, C, H, W).
            pixel_mask: (N, H, W), 1 for pixels of the image, 0 for padding; for masks.

        Returns:
            a feature map (N, c, h, w) and its mask (N, h, w) for each level; or the maps alone,
            as ``feature_maps`` of an object.

        Raises:
            ImageError: if the images are so small that there are less positions than queries.
        """
        levels = self._backbone[0](pixel_values)
        # transformers computes the positions with the precision of these
        maps = [_of_full_precision(levels[name]) for name in self.names]
        positions = sum(level[0, 0].numel() for level in maps)
        if positions < self.min_positions:
            height, width = pixel_values.shape[-2:]
            raise ImageError(
                f"images padded to {height}x{width} are too small for num_queries="
                f"{self.min_positions}: their feature maps have {positions} positions"
            )
        if not self.with_masks:
            return SimpleNamespace(feature_maps=maps)
        mask = pixel_mask[None].float()
        return [(level, F.interpolate(mask, size=level.shape[-2:])[0].bool()) for level in maps]


def _fewest_positions(config: "PreTrainedConfig") -> int:
    """How many positions the maps must have, where a query is chosen from each."""
    wanted = EVERY[config.model_type]
    if wanted.vit:  # whose maps are scaled first
        scales = getattr(config, "projector_scale_factors", [1.0])
        return math.ceil(config.num_queries / sum(scale**2 for scale in scales))
    return config.num_queries if wanted.two_stage else 0


def build_model(
    config: "PreTrainedConfig", backbone: Backbone, names: Sequence[str], *, masks: bool = False
) -> "PreTrainedModel":
    """A model of transformers with random weights, a backbone in the place of its own.

    Args:
        config: see :func:`build_config`.
        backbone: gives the feature maps; it does not become a submodule.
        names: of its levels, fine to coarse.
        masks: of a detector, the model that gives masks, too.

    Raises:
        ValueError: if transformers cannot build it, such as with a width that its heads do not
            divide.
    """
    transformers, wanted = import_transformers(), EVERY[config.model_type]
    kind = "UniversalSegmentation" if config.model_type in SEGMENTERS else "ObjectDetection"
    kind = "InstanceSegmentation" if masks else kind
    try:
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    except Exception as error:  # it may assert, divide by zero, or fail in torch
        raise ValueError(
            f"config_kwargs: transformers cannot build {config.model_type!r} with them: "
            f"{first_line(error)}"
        ) from error
    encoder = BackboneEncoder(
        backbone,
        names,
        min_positions=_fewest_positions(config),
        with_masks=not wanted.slot,
    )
    model.set_submodule(encoder_name(model), encoder)
    if config.model_type != "dino":  # which has its own
        initialize(model)
    for name, module in model.named_modules():
        if _BOXES.search(name):
            module.register_forward_hook(_hook)
    return model


def _hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return _of_full_precision(output)


def _of_full_precision(output: torch.Tensor) -> torch.Tensor:
    """What autocast has made of half precision, which cannot tell the places in an image apart."""
    return output.float() if torch.is_autocast_enabled(output.device.type) else output


def encoder_name(model: "PreTrainedModel") -> str:
    """The name of the module of a model that runs its backbone, and that ours takes the place of.

    It is the convolution encoder, or the backbone in it.
    """
    if slot := EVERY[model.config.model_type].slot:
        # a model that gives masks has the detector in it
        return f"model.{slot}" if type(model).__name__.endswith("InstanceSegmentation") else slot
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    ends = ("ConvEncoder", BackboneEncoder.__name__)
    return next(name for name, kind in kinds.items() if kind.endswith(ends))


def checkpoint_layers(model: "PreTrainedModel") -> None:
    """Compute what is in the layers again in the backward pass instead of keeping it.

    It is what transformers calls gradient checkpointing, also for models that it does not offer it
    for.

    Raises:
        ValueError: if none of the model's layers can.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"grad_checkpointing=True must be left out for {model.config.model_type!r}, whose "
            "layers cannot be computed twice; the backbone has a grad_checkpointing of its own"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
