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
from ..adapt.memory_format import lay_out
from ..backbones.feature_backbone import FeatureBackbone
from ..measure.trace import record


def shard(model: nn.Module, device: str) -> None:
    """Divide a model among all processes; each must have it, with equal weights.

    What is gathered at a time are the blocks of its backbones, and all the rest. The model loads
    whole tensors as before.

    Args:
        model: changed in place; it may lie on the CPU, from where its parts go to the device.
        device: "cuda" or "cpu".
    """
    mesh = init_device_mesh(device, (comm.get_world_size(),))
    for backbone in [m for m in model.modules() if isinstance(m, FeatureBackbone)]:
        lay_out(backbone.extractor, channels_last=False)  # all that fully_shard takes
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
    blocks = {
        name: backbone.extractor.get_submodule(name)
        for name in names
        if not any(name.startswith(f"{other}.") for other in names)
    }
    return [block for block in blocks.values() if any(True for _ in block.parameters())]


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
    """A state dict whose divided tensors are whole, one after the other, on the CPU.

    All processes must call it together; those that are not the main one have None in their place.
    """

    def gathered(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        full = x.full_tensor()
        return full.cpu() if comm.is_main_process() else None

    return tree_map(gathered, state)


@torch.no_grad()
def copy_weights(model: nn.Module, copy: nn.Module) -> None:
    """Give a whole copy the weights of a divided model; all processes must call it together."""
    state = model.state_dict()
    for name, value in copy.state_dict().items():
        value.copy_(state[name].full_tensor() if isinstance(state[name], DTensor) else state[name])


def moments_like_parameters(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of an optimizer with moments that are divided and laid out as the parameters are.

    On a CPU fused AdamW is wrong for a moment of other strides than its parameter's (torch 2.14).

    Raises:
        ValueError: if it is of another number of parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = sum(len(group["params"]) for group in state["param_groups"])
    if count != len(parameters):
        raise ValueError(
            f"the checkpoint's optimizer is for {count} parameters, and must be for the "
            f"{len(parameters)} that learn now: has freeze_at, norm, lora_rank or lora_layers "
            "changed?"
        )

    def like(value: Any, parameter: nn.Parameter) -> Any:
        if not torch.is_tensor(value) or value.shape != parameter.shape:
            return value
        value = part_of(value, parameter)
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    moments = {
        number: {key: like(value, parameters[number]) for key, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return {**state, "state": moments}


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has divided a model."""
    return isinstance(model, FSDPModule)
