"""Levels (feature maps) and how they are measured: one forward pass on the meta device."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Height and width differ, so that a layout can be told from a shape, and both divide by 64.
PROBE_SIZE = (256, 320)


@dataclass(frozen=True)
class Level:
    """A feature map as it was measured.

    Attributes:
        channels: number of channels.
        stride: input pixels per feature-map pixel, the same in both directions.
        channels_last: True for an (N, H, W, C) output, False for (N, C, H, W).
        end: index of the operation that wrote it (see :class:`Trace`).
    """

    channels: int
    stride: int
    channels_last: bool
    end: int

    @property
    def exponent(self) -> int:
        """The n of the nearest stride 2^n; a level is called ``res{n}``."""
        return round(math.log2(self.stride))


@dataclass(frozen=True)
class Trace:
    """What happened when a module ran once; operations are counted from 0.

    Attributes:
        levels: the module's outputs, in the order in which it gives them.
        parameters: name of each parameter that was used, and the index of its first use.
        modules: name of each submodule that was called (``""`` is the module itself), and the index
            of its last operation.
    """

    levels: list[Level]
    parameters: dict[str, int]
    modules: dict[str, int]


def output_list(outputs) -> list[torch.Tensor]:
    """The outputs of a feature extractor (list, tuple or dict) as a list."""
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def measure_shape(shape: torch.Size, size: tuple[int, int]) -> tuple[int, int, bool] | None:
    """Channels, stride and layout of a feature map of an input with the given (height, width).

    Returns:
        (channels, stride, channels_last), or None if the shape is no feature map with a whole
        stride in either layout.
    """
    if len(shape) != 4:
        return None
    for channels_last in (False, True):
        h, w = shape[1:3] if channels_last else shape[2:4]
        if h and w and size[0] % h == 0 and size[0] // h * w == size[1]:
            return shape[3 if channels_last else 1], size[0] // h, channels_last
    return None


def meta_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers as meta tensors, for ``torch.func.functional_call``."""
    state = [*module.named_parameters(), *module.named_buffers()]
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in state}


class _OperationLog(TorchDispatchMode):
    """Counts operations, and notes what each reads for the first time and writes last."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.first_read: dict[int, int] = {}
        self.last_write: dict[int, int] = {}
        self._alive = []  # an id is unique only among living tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self.first_read.setdefault(id(leaf), self.count)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.last_write[id(leaf)] = self.count
                self._alive.append(leaf)
        self.count += 1
        return out


def trace(module: nn.Module, in_channels: int = 3) -> Trace:
    """Run a feature extractor once, without memory or arithmetic, and measure it.

    The module itself is not touched: its parameters and buffers are replaced by meta tensors for
    the one call. Nothing is assumed of the module but that it maps an image batch to feature maps.

    Args:
        module: maps a tensor of shape (N, C, H, W) to a list, tuple or dict of feature maps.
        in_channels: the C of its input.

    Returns:
        the trace, with one level an output.

    Raises:
        ValueError: if an output is no feature map with a whole stride.
    """
    meta = meta_state(module)
    log = _OperationLog()
    finished: dict[str, int] = {}
    hooks = [
        child.register_forward_hook(lambda *_, name=name: finished.update({name: log.count - 1}))
        for name, child in module.named_modules()
    ]
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), log:
            x = torch.empty(2, in_channels, *PROBE_SIZE, device="meta")
            outputs = output_list(torch.func.functional_call(module, meta, (x,)))
    finally:
        for hook in hooks:
            hook.remove()
        module.train(modes[0][1])
        for child, mode in modes:
            child.training = mode

    levels = []
    for output in outputs:
        measured = measure_shape(output.shape, PROBE_SIZE)
        if measured is None:
            raise ValueError(
                f"an output of {type(module).__name__} has shape {tuple(output.shape)} for an "
                f"input of {PROBE_SIZE[0]}x{PROBE_SIZE[1]}: it is no feature map with a whole "
                "stride"
            )
        levels.append(Level(*measured, end=log.last_write[id(output)]))
    first_use = {
        name: log.first_read[id(meta[name])]
        for name, _ in module.named_parameters()
        if id(meta[name]) in log.first_read
    }
    return Trace(levels, first_use, finished)


def last_of_each_stride(levels: list[Level]) -> dict[str, int]:
    """Name levels by their stride, detectron2's way.

    Args:
        levels: in the order of execution.

    Returns:
        ``res{n}`` for stride 2^n to the index of the last level with that stride, fine to coarse.
    """
    names = {level.exponent: index for index, level in enumerate(levels)}
    return {f"res{exponent}": names[exponent] for exponent in sorted(names)}
