"""LoRA: of a frozen model's linear maps, small updates of a low rank learn.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685, by
peft. The scale of the paper (its alpha over the rank) is 1, so that weight and update add up to
what a model without LoRA computes with, and a state dict says all that there is to know.
"""

import re
from collections.abc import Container, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from ..messages import nearest, whole_number

_A, _B = ".lora_A.weight", ".lora_B.weight"
_INSIDE = re.compile(r"\.(base_layer|lora_[AB]\.default)\.")


def check_lora(rank: int, layers: Sequence[str]) -> None:
    """Refuse what is no rank or no list, and a place without peft, before a model is built.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the rank is no whole number from 1, or 0 where layers are named, or the
            layers are no list.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"lora_layers={layers!r} must be a list of endings of names")
    if not (rank or layers):
        return
    whole_number("lora_rank", rank)
    if find_spec("peft") is None:
        raise ImportError(f"lora_rank={rank} needs peft: pip install '.[lora]', or peft alone")


def add_lora(
    extractor: nn.Module, rank: int, learning: Container[str], layers: Sequence[str] = ()
) -> None:
    """Freeze a model, and give its linear layers and 1x1 convolutions updates that learn.

    An update begins as zero. In the state dict a layer keeps its names, and has ``lora_A.weight``
    and ``lora_B.weight`` besides: peft's names.

    Args:
        extractor: changed in place.
        rank: of the updates.
        learning: names of the modules that may have updates. It must leave out a layer that does
            not run, of which the model takes the weight alone: its update would be passed over.
        layers: endings of the names of the layers that have updates, as peft's
            ``target_modules``: ``["attn.qkv", "attn.proj"]``; empty is for all that can.

    Raises:
        ValueError: if no layer can have an update, or an ending is of none that can.
    """
    from peft import LoraConfig, inject_adapter_in_model  # a part of the extra [lora]

    modules = extractor.named_modules()
    names = [name for name, module in modules if name in learning and _can_have_update(module)]
    if not names:
        raise ValueError(f"lora_rank={rank} has no effect: no linear or 1x1 layer of it learns")
    for layer in layers:
        if not any(_ends(name, layer) for name in names):
            endings = {".".join(name.split(".")[-n:]) for name in names for n in (1, 2)}
            raise ValueError(
                f"lora_layers={layer!r} must be the end of the name of a linear or 1x1 layer that "
                f"learns: {nearest(layer, sorted(endings))}"
            )
    if layers:
        names = [name for name in names if _ends(name, *layers)]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names))),
        extractor,
    )
    for name in names:
        layer = extractor.get_submodule(name)
        layer.register_state_dict_post_hook(_to_own_names)
        layer.register_load_state_dict_pre_hook(_to_names_of_peft)


def _ends(name: str, *endings: str) -> bool:
    return f".{name}".endswith(tuple(f".{ending}" for ending in endings))


def _can_have_update(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    is_conv = type(module) in (nn.Conv2d, Conv2dSame)
    return is_conv and module.kernel_size == (1, 1) and module.groups == 1


def has_update(module: nn.Module) -> bool:
    """Whether a module is a layer with an update: what peft has put around it is no part of it."""
    return hasattr(module, "base_layer")


def own_name(name: str) -> str:
    """The source model's name of a parameter, or of the weight that an update is for."""
    return _INSIDE.sub(".", name)


def forget_updates(module: nn.Module) -> None:
    """Make all updates zero, as they begin: weights that are loaded are whole."""
    for name, parameter in module.named_parameters():
        if name.endswith(".lora_B.default.weight"):
            nn.init.zeros_(parameter)


def is_update(name: str) -> bool:
    """Whether a name of a state dict is of an update."""
    return name.endswith((_A, _B))


def merged(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state dict in which the updates are added to the weights, whatever stands before the names.

    Raises:
        ValueError: if there is an update without its weight, or of another shape.
    """
    layers = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    if not layers:
        return tensors
    state = {name: tensor for name, tensor in tensors.items() if not is_update(name)}
    for layer in layers:
        name, a, b = f"{layer}.weight", tensors[layer + _A], tensors.get(layer + _B)
        weight = state.get(name)
        if weight is None or b is None:
            raise ValueError(f"it has {layer + _A!r}, and must have the layer's weight and lora_B")
        update = b.double().flatten(1) @ a.double().flatten(1)
        if update.numel() != weight.numel():
            raise ValueError(f"{layer + _A!r} must be of the shape of {name!r}")
        state[name] = (weight.double() + update.view_as(weight)).to(weight.dtype)
    return state


def _to_own_names(layer: nn.Module, state: dict[str, Any], prefix: str, _: dict) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        end = "." + key.removeprefix(prefix)
        new = end.replace(".base_layer.", ".").replace(".default.", ".")
        state[prefix + new[1:]] = state.pop(key)


def _to_names_of_peft(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        end = key.removeprefix(prefix)
        new = (
            end.replace(".weight", ".default.weight")
            if end.startswith("lora_")
            else f"base_layer.{end}"
        )
        state[prefix + new] = state.pop(key)
