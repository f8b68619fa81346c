"""Weights, gradients and moments divided among the processes: FSDP2, torch's ``fully_shard``.

A process holds a part of each tensor, as a ``DTensor``, and gathers the weights of a block for the
time in which it runs. Zhao et al., PyTorch FSDP, https://arxiv.org/abs/2304.11277.
"""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from ..adapt.grad_checkpointing import Checkpoints
from ..backbones.feature_backbone import FeatureBackbone
from ..measure.trace import record


def shard(model: nn.Module, device: str) -> None:
    """Divide a model among all processes; each must have it, with equal weights.

    What is gathered at a time are the blocks of its backbones, and all the rest. The model loads
    whole tensors as before.

    Args:
        model: changed in place.
        device: "cuda" or "cpu", what it lies on.
    """
    mesh = init_device_mesh(device, (comm.get_world_size(),))
    for backbone in [m for m in model.modules() if isinstance(m, FeatureBackbone)]:
        for block in _blocks(backbone):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if module._parameters:
            module.register_load_state_dict_pre_hook(_divide)


def _blocks(backbone: FeatureBackbone) -> list[nn.Module]:
    """Those that run as a whole: a graph of torchvision's runs the layers in them alone."""
    size = (backbone.source.native_size,) * 2
    measured = record(backbone.extractor, backbone.source.in_channels, size)
    try:
        names = Checkpoints(backbone.extractor, measured).blocks
    except ValueError:  # nothing in them learns
        return []
    names = [name for name in names if name in measured.modules]
    return [
        backbone.extractor.get_submodule(name)
        for name in names
        if not any(name.startswith(f"{other}.") for other in names)
    ]


def _divide(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of whole tensors that a module is to load, take this process's part."""
    for name, parameter in module._parameters.items():
        if prefix + name in state and parameter is not None:
            state[prefix + name] = part_of(state[prefix + name], parameter)


def part_of(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, where ``like`` is divided and of the same shape."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def whole(state: Any) -> Any:
    """A state dict whose divided tensors are whole; all processes must call it together."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)


def divided_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """This process's part of the state of an optimizer, whose parameters may be divided."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {
            k: part_of(v, parameters[number]) if torch.is_tensor(v) else v for k, v in x.items()
        }
        for number, x in state["state"].items()
    }
    return {**state, "state": moments}


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has divided a model."""
    return isinstance(model, FSDPModule)
