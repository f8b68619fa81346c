"""Output shapes for configs: a neck's input_shapes and in_features without typed-in channels."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from omegaconf import OmegaConf, SCMode
from torch.overrides import TorchFunctionMode

NO_WEIGHTS = {"pretrained": False, "weights": None, "checkpoint_path": ""}


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
            with built_on_meta():
                backbone = instantiate(config)
        except RuntimeError as error:
            target = getattr(config["_target_"], "__qualname__", config["_target_"])
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"backbone={target} cannot be built on the meta device ({reason}): "
                "write the shapes of its levels into the config"
            ) from error
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"backbone={backbone!r:.80} must be a detectron2 Backbone or the config of one"
        )
    return backbone.output_shape()


def output_names(backbone: Backbone | Mapping[str, Any]) -> list[str]:
    """Names of a backbone's levels, fine to coarse; the argument as in :func:`output_shapes`."""
    return list(output_shapes(backbone))


def without_weights(config: Any) -> Any:
    """A plain copy of a config that neither fetches nor reads weights.

    Args:
        config: of a backbone, with others in it such as ``bottom_up``; its interpolations are
            resolved.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(
            config, resolve=True, structured_config_mode=SCMode.INSTANTIATE
        )
    if isinstance(config, list):
        return [without_weights(value) for value in config]
    if not isinstance(config, dict):
        return config
    none = NO_WEIGHTS if "_target_" in config else {}
    return {k: none[k] if k in none else without_weights(v) for k, v in config.items()}


@contextmanager
def built_on_meta() -> Iterator[None]:
    """Where what is built has its weights on the meta device, torchvision's RegNets too."""
    with torch.device("meta"), _NumbersOnCPU():
        yield


class _NumbersOnCPU(TorchFunctionMode):
    """Keeps tensors made of given numbers on the CPU, for constructors read such numbers back."""

    makers = (torch.arange, torch.linspace, torch.tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # where torch.tensor([]) lies is how torch finds its default device
        if func in self.makers and args != ([],) and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
