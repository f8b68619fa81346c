"""Output shapes for configs: a neck's input_shapes and in_features without typed-in channels."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone

from .config import without_weights
from .measure.meta import NumbersOnCPU
from .messages import first_line, one_of


def output_shapes(backbone: Backbone | Mapping[str, Any]) -> dict[str, ShapeSpec]:
    """Channels and stride of each level of a backbone, for a neck that is told them.

    A config is measured on the meta device, and no weights are fetched or read. For that it stands
    in a dict here, since ``instantiate`` builds every config that is an argument itself::

        model.neck.input_shapes = L(output_shapes)(backbone={"config": "${....backbone}"})

    ``L(output_shapes)(backbone="${...backbone}")`` gives the same, but builds a second backbone.

    Args:
        backbone: one that is built, the config of one, or ``{"config": the config of one}``.

    Returns:
        the backbone's ``output_shape()``, fine to coarse.

    Raises:
        ValueError: if it is no backbone, or cannot be built on the meta device.
    """
    if isinstance(backbone, Mapping) and "_target_" not in backbone and "config" in backbone:
        return output_shapes(backbone["config"])
    if isinstance(backbone, Mapping) and "_target_" in backbone:
        config = without_weights(backbone)
        try:
            backbone = _on_meta(config)
        except RuntimeError as error:
            target = getattr(config["_target_"], "__qualname__", config["_target_"])
            raise ValueError(
                f"backbone={target} cannot be built on the meta device ({first_line(error)}): "
                "write the shapes of its levels into the config"
            ) from error
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"backbone={backbone!r:.80} must be a detectron2 Backbone or the config of one"
        )
    return backbone.output_shape()


def _on_meta(config: Mapping[str, Any]) -> Any:
    try:
        with torch.device("meta"):
            return instantiate(config)
    except RuntimeError:  # it may read numbers back, as detectron2's Swin does
        with torch.device("meta"), NumbersOnCPU():
            return instantiate(config)


def output_names(backbone: Backbone | Mapping[str, Any]) -> list[str]:
    """Names of a backbone's levels, fine to coarse; the argument as in :func:`output_shapes`."""
    return list(output_shapes(backbone))


def output_channels(backbone: Backbone | Mapping[str, Any], level: str) -> int:
    """Channels of one level of a backbone, for a detector that takes one alone.

    Args:
        backbone: as in :func:`output_shapes`.
        level: its name, such as "res5".

    Raises:
        ValueError: if the backbone has no such level.
    """
    shapes = output_shapes(backbone)
    one_of("level", level, shapes)
    return shapes[level].channels
