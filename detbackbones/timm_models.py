"""timm models, built so that they take images of the most sizes, and their levels measured."""

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from timm.layers import Format, PatchEmbed
from timm.models import get_arch_pretrained_cfgs
from timm.models._features import FeatureGetterNet
from torch import nn
from torch.overrides import TorchFunctionMode

from .checkpoint import downloading_from_hub
from .layers import LayerExtractor
from .levels import Trace, trace
from .messages import nearest
from .sizes import SizeRule, find_size_rule

# What timm's model families call "take images of any size"; the first that runs is used. The last
# is for a model that reads the shape of its maps from numbers: its tokens are taken instead.
SIZE_SWITCHES = ({}, {"dynamic_img_size": True}, {"strict_img_size": False}, {"output_fmt": "NLC"})


@dataclass(frozen=True)
class TimmLevels:
    """All levels of a model.

    Attributes:
        native: the N of the N x N images that the model is built for.
        patch_size: of a ViT, None for other models.
        trace: of timm's extractor of all levels, for such an image; strides are powers of two.
        indices: timm's index of each level of the trace.
        names: the extractor's modules, parameters and buffers to their names in the model.
        keys: of the model's state dict.
    """

    native: int
    patch_size: int | None
    trace: Trace
    indices: list[int]
    names: dict[str, str]
    keys: frozenset[str]


_FOUND: dict[str, Any] = {}


def _remember(function: Callable) -> Callable:
    """Keep what running a model has shown, for a program may build it many times."""

    @functools.wraps(function)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        key = f"{function.__name__} {args} {sorted(kwargs.items())}"
        if key not in _FOUND:
            _FOUND[key] = function(*args, **kwargs)
        return _FOUND[key]

    return remembering


@_remember
def all_levels(model_name: str, **kwargs: Any) -> TimmLevels:
    """Build an extractor of all levels of a model on the meta device, and run it.

    Args:
        model_name: as in ``timm.create_model``.
        kwargs: its arguments.

    Raises:
        ValueError: if the model cannot be built, or gives no feature maps.
    """
    source = create(model_name, "meta", **kwargs)
    info = getattr(source, "feature_info", ())
    indices = [i for i, level in enumerate(info) if level["module"]]
    if not indices:
        raise ValueError(f"model_name={model_name!r} has no feature maps: it cannot be a backbone")
    native = native_size(source, kwargs)
    failures = []
    for switch in SIZE_SWITCHES:
        try:
            extractor = create_extractor(model_name, "meta", indices, **{**switch, **kwargs})
            found = trace(extractor, kwargs["in_chans"], (native, native), resample=True)
        except Exception as error:  # a model may refuse in any way
            failures.append(error)
            continue
        return TimmLevels(
            native,
            patch_size_of(source),
            found,
            indices,
            source_names(extractor, source),
            frozenset(source.state_dict()),
        )
    reason = str(failures[0]).partition("\n")[0]
    raise ValueError(f"model_name={model_name!r} cannot be a backbone: {reason}") from failures[0]


@_remember
def size_switch(
    model_name: str, *, indices: list[int], layers: list[str], **kwargs: Any
) -> tuple[dict[str, Any], SizeRule, Trace]:
    """Find the arguments with which some levels of a model can be had of the most image sizes.

    Args:
        model_name: as in ``timm.create_model``.
        indices: timm's of the levels, or none.
        layers: names of modules that give the levels, or none.
        kwargs: arguments of ``timm.create_model``.

    Returns:
        the arguments, the sizes, and a trace of the extractor of the levels.

    Raises:
        ValueError: if there are no such arguments.
    """
    found = all_levels(model_name, **{k: v for k, v in kwargs.items() if k != "output_stride"})
    at_native = [found.trace.shapes[found.indices.index(i)] for i in indices]
    if "output_stride" in kwargs:
        at_native = []
    trials = [{**switch, **kwargs} for switch in SIZE_SWITCHES]
    variants = [
        functools.partial(create_extractor, model_name, "meta", indices, layers, **trial)
        for trial in trials
    ]
    try:
        sizes, chosen, measured = find_size_rule(
            variants,
            found.native,
            kwargs["in_chans"],
            # patch_size changes a ViT's stride; nothing changes that of other models
            odd_strides=found.patch_size is not None,
            at_native=at_native,
        )
    except ValueError as error:
        raise ValueError(f"model_name={model_name!r} cannot be a backbone: {error}") from error
    return trials[chosen], sizes, measured


def native_size(source: nn.Module, kwargs: dict[str, Any]) -> int:
    """The N of the N x N images that a model is built for."""
    img_size = kwargs.get("img_size") or source.pretrained_cfg["input_size"][-2:]
    return img_size if isinstance(img_size, int) else img_size[0]


def create(
    model_name: str, device: str | None, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """``timm.create_model`` on a device, or the current one.

    Raises:
        ValueError: if there is no such model, or it refuses its arguments.
        ConnectionError: if pretrained weights cannot be downloaded.
    """
    model_name = str(model_name)
    name, _, tag = model_name.partition(".")
    if ":" not in model_name:
        if not timm.is_model(name):
            hint = nearest(name, timm.list_models())
            if name in torchvision.models.list_models(module=torchvision.models):
                hint = "it is one of torchvision, of which TorchvisionBackbone makes a backbone"
            raise ValueError(f"model_name={model_name!r} is no timm model: {hint}")
        tags = get_arch_pretrained_cfgs(name) if tag else ()
        if tag and model_name not in tags:
            raise ValueError(
                f"model_name={model_name!r} has an unknown tag: {nearest(model_name, tags)}"
            )
    hub = pretrained or model_name.startswith("hf-hub:")
    try:
        with (
            torch.device(device or torch.get_default_device()),
            _WithoutInitialisation(),
            downloading_from_hub(model_name) if hub else nullcontext(),
        ):
            return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    except ConnectionError:
        raise
    except (AssertionError, OSError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0] or f"timm refuses {kwargs}"
        raise ValueError(f"model_name={model_name!r} cannot be built: {reason}") from error


class _WithoutInitialisation(TorchFunctionMode):
    """Passes over operations in place on meta tensors: there is no value that they could change.

    Half the time that it takes to build a model on the meta device goes into its initialisation.
    """

    operations = frozenset(
        "add_ clamp_ div_ erfinv_ fill_ mul_ normal_ sub_ uniform_ zero_".split()
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.operations and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def create_extractor(
    model_name: str,
    device: str | None,
    indices: Sequence[int],
    layers: Sequence[str] = (),
    *,
    output_fmt: str = "",
    **kwargs: Any,
) -> nn.Module:
    """An extractor of some levels of a model.

    Args:
        model_name, device, kwargs: as in :func:`create`.
        indices: timm's of the levels, which its own extractor gives.
        layers: names of modules that give the levels instead.
        output_fmt: "NLC" for tokens instead of maps, of timm's extractor for ViTs.
    """
    if layers:
        if output_fmt:
            raise ValueError("a module gives what it gives")
        return LayerExtractor(create(model_name, device, **kwargs), layers)
    extractor = create(model_name, device, features_only=True, out_indices=tuple(indices), **kwargs)
    if output_fmt:
        if not isinstance(extractor, FeatureGetterNet):
            raise ValueError(f"{model_name} has no tokens")
        extractor.output_fmt = Format(output_fmt)
    return extractor


def patch_kwargs(model_name: str, patch_size: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for another patch size on the grid of patches that the model was trained with."""
    source = create(model_name, "meta", **kwargs)
    own = patch_size_of(source)
    if own is None:
        raise ValueError(f"patch_size={patch_size} needs a ViT, and {model_name} has no patches")
    grid = native_size(source, {}) // own
    return {"patch_size": patch_size, "img_size": grid * patch_size, **kwargs}


def patch_size_of(model: nn.Module) -> int | None:
    """The patch size of a ViT, None for other models."""
    for name, module in model.named_modules():
        if name.endswith("patch_embed") and isinstance(module, PatchEmbed):
            return module.patch_size[0]
    return None


def source_names(extractor: nn.Module, source: nn.Module) -> dict[str, str]:
    """The extractor's module, parameter and buffer names to those of the classification model.

    timm's extractors put ``model.`` or ``body.`` before a name or write its first dots as
    underscores.
    """
    flat = {name.replace(".", "_"): name for name in _names(source)}
    names = {name: re.sub(r"^(model|body)\.", "", name) for name in _names(extractor)}
    return {own: flat.get(name.replace(".", "_"), name) for own, name in names.items()}


def _names(model: nn.Module) -> list[str]:
    return [*(name for name, _ in model.named_modules()), *model.state_dict()]
