"""Levels (feature maps) and how they are measured: one forward pass on the meta device."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
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
        layout: "NCHW", "NHWC", or "NLC" for tokens in the order of the rows.
        resampled: True if its own grid is no whole fraction of the input, so that it is to be
            resampled to the grid of the stride.
        end: index of the operation that wrote it (see :class:`Trace`).
    """

    channels: int
    stride: int
    layout: str
    resampled: bool
    end: int

    @property
    def exponent(self) -> int:
        """The n of the nearest stride 2^n; a level is called ``res{n}``."""
        return round(math.log2(self.stride))

    def feature_map(self, output: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The model's output as a feature map.

        Args:
            output: as the model gave it, in ``layout``.
            size: (H, W) of the image.

        Returns:
            (N, channels, H / stride, W / stride); where the division leaves a remainder, with the
            rows and columns that the model gave.
        """
        h, w = size[0] // self.stride, size[1] // self.stride
        if self.layout == "NHWC":
            output = output.permute(0, 3, 1, 2)
        elif self.layout == "NLC":
            output = output.transpose(1, 2).unflatten(2, (h, w))
        if self.resampled and output.shape[2:] != (h, w):
            output = F.interpolate(output, (h, w), mode="bilinear", align_corners=False)
        return output


@dataclass(frozen=True)
class Trace:
    """What happened when a module ran once; operations are counted from 0.

    Attributes:
        levels: the module's outputs, in the order in which it gives them.
        shapes: of these outputs, as the module gave them.
        parameters: name of each parameter that was used, and the index of its first use.
        needed: names of the parameters on which some level's values depend.
        overwrites: how many operations in place change what some level's values depend on.
        modules: name of each submodule that was called (``""`` is the module itself), and the index
            of its last operation; infinity for one that did not return.
        followed_by: name of each submodule without submodules that ran once and whose one output
            nothing but the run of another read, and the name of that other.
    """

    levels: list[Level]
    shapes: list[torch.Size]
    parameters: dict[str, int]
    needed: frozenset[str]
    overwrites: int
    modules: dict[str, float]
    followed_by: dict[str, str]


def output_list(outputs) -> list[torch.Tensor]:
    """The outputs of a feature extractor (list, tuple or dict) as a list."""
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def measure_shape(
    shape: torch.Size, size: tuple[int, int], resample: bool = False
) -> tuple[int, int, str, bool] | None:
    """Channels, stride and layout of a feature map of an input with the given (height, width).

    Args:
        shape: of the output.
        size: (H, W) of the input.
        resample: take a map of another stride than 2^n for one of the nearest, to be resampled.

    Returns:
        (channels, stride, layout, resampled), or None if the shape is no feature map with a whole
        stride in any layout.
    """
    if len(shape) == 3:
        stride = math.isqrt(size[0] * size[1] // shape[1]) if shape[1] else 0
        grid = stride and (size[0] / stride) * (size[1] / stride)
        whole = stride and size[0] % stride == 0 == size[1] % stride and grid == shape[1]
        return (shape[2], stride, "NLC", False) if whole else None
    if len(shape) != 4 or 0 in shape:
        return None
    grids = {"NCHW": (shape[1], *shape[2:]), "NHWC": (shape[3], *shape[1:3])}
    for layout, (channels, h, w) in grids.items():
        stride = size[0] // h
        if min(h, w) > 1 and size == (h * stride, w * stride) and not (resample and odd(stride)):
            return channels, stride, layout, False
    for layout, (channels, h, w) in grids.items() if resample else ():
        exponents = {round(math.log2(size[0] / h)), round(math.log2(size[1] / w))}
        if len(exponents) == 1 and min(h, w) > 1:
            return channels, 2 ** exponents.pop(), layout, True
    return None


def odd(stride: int) -> bool:
    """Whether a stride is no power of two."""
    return stride & (stride - 1) != 0


def meta_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers as meta tensors, tied where they are tied."""
    state, made = {}, {}
    for prefix, child in module.named_modules():
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None:
                meta = made.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))
                state[f"{prefix}.{name}" if prefix else name] = meta
    return state


def run_on_meta(module: nn.Module, state: dict[str, torch.Tensor], shape: tuple[int, ...]) -> Any:
    """Run a module without memory or arithmetic.

    Args:
        module: is not touched.
        state: what :func:`meta_state` made of it. (By the name of every tensor, for
            ``functional_call`` leaves modules that have two names on the meta device if it is to
            find the second itself.)
        shape: of its input.
    """
    x = torch.empty(*shape, device="meta")
    with torch.no_grad():
        return torch.func.functional_call(module, state, (x,), tie_weights=False)


class _OperationLog(TorchDispatchMode):
    """Counts operations, and notes what each reads and writes."""

    def __init__(self):
        super().__init__()
        self.first_read: dict[int, int] = {}  # by id of the tensor
        self.last_write: dict[int, int] = {}
        # of each operation: what it reads and writes, and whether it writes in place
        self.memory: list[tuple[set[int], set[int], bool]] = []
        self._alive = []  # an id or address is unique only among what is alive

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = _tensors((args, kwargs or {}))
        for tensor in read:
            self.first_read.setdefault(id(tensor), len(self.memory))
        out = func(*args, **(kwargs or {}))
        written = _tensors(out)
        for tensor in written:
            self.last_write[id(tensor)] = len(self.memory)
        self._alive += written
        in_place = func._schema.is_mutable
        self.memory.append((set(map(_address, read)), set(map(_address, written)), in_place))
        return out

    def sources(self, tensors: list[torch.Tensor]) -> tuple[set[int], int]:
        """Addresses of the memory on which some of the tensors depend, and how many operations
        overwrite some of it.

        Memory, not tensors: an operation in place on a view changes what the base holds.
        """
        found, overwrites = set(map(_address, tensors)), 0
        for read, written, in_place in reversed(self.memory):
            if written & found:
                found |= read
                overwrites += in_place
        return found, overwrites


@dataclass
class _Run:
    """One run of a submodule: the indices of its operations, what it was given and what it gave."""

    name: str
    inputs: list[torch.Tensor]
    start: int
    end: float = math.inf
    outputs: list[torch.Tensor] = field(default_factory=list)


def _followed_by(
    module: nn.Module, runs: list[_Run], log: _OperationLog, outputs: list[torch.Tensor]
) -> dict[str, str]:
    """See :class:`Trace`.

    Args:
        module: what ran.
        runs: of its submodules, in the order in which they began.
        log: of the operations.
        outputs: of the module.
    """
    count = Counter(run.name for run in runs)
    reads: dict[int, list[int]] = {}
    for index, (read, _, _) in enumerate(log.memory):
        for address in read:
            reads.setdefault(address, []).append(index)
    takers: dict[int, list[_Run]] = {}
    for run in runs:
        for tensor in run.inputs:
            takers.setdefault(id(tensor), []).append(run)
    given = {_address(tensor) for tensor in outputs}

    found = {}
    for run in runs:
        if count[run.name] > 1 or len(run.outputs) != 1 or run.end < run.start:
            continue
        (output,) = run.outputs
        if any(module.get_submodule(run.name).children()) or _address(output) in given:
            continue
        # What takes it is a sequence of modules each in the one before it; of these the innermost.
        # One that has nothing to do in eval mode, a dropout, is none of them.
        *outer, taker = takers.get(id(output), [run])
        within = all(other.start <= taker.start and taker.end <= other.end for other in outer)
        indices = [index for index in reads.get(_address(output), []) if index > run.end]
        if (
            within
            and taker is not run
            and count[taker.name] == 1
            and all(taker.start <= index <= taker.end for index in indices)
        ):
            found[run.name] = taker.name
    return found


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trace(
    module: nn.Module,
    in_channels: int = 3,
    size: tuple[int, int] = PROBE_SIZE,
    resample: bool = False,
) -> Trace:
    """Run a feature extractor once, without memory or arithmetic, and measure it.

    The module itself is not touched: its parameters and buffers are replaced by meta tensors for
    the one call. Nothing is assumed of the module but that it maps an image batch to feature maps.

    Args:
        module: maps a tensor of shape (N, C, H, W) to a list, tuple or dict of feature maps.
        in_channels: the C of its input.
        size: the (H, W) of its input.
        resample: see :func:`measure_shape`.

    Returns:
        the trace, with one level an output.

    Raises:
        ValueError: if an output is no feature map with a whole stride.
    """
    meta = meta_state(module)
    log = _OperationLog()
    runs: list[_Run] = []

    def begin(name: str, inputs: tuple) -> None:
        runs.append(_Run(name, _tensors(inputs), len(log.memory)))

    def finish(name: str, output: Any) -> None:
        run = next(run for run in reversed(runs) if run.name == name and run.end == math.inf)
        run.end, run.outputs = len(log.memory) - 1, _tensors(output)

    hooks = []
    for name, child in module.named_modules():
        hooks += [
            child.register_forward_pre_hook(lambda _, inputs, name=name: begin(name, inputs)),
            child.register_forward_hook(lambda _, inputs, output, name=name: finish(name, output)),
        ]
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with log:
            outputs = output_list(run_on_meta(module, meta, (2, in_channels, *size)))
    finally:
        for hook in hooks:
            hook.remove()
        module.train(modes[0][1])
        for child, mode in modes:
            child.training = mode

    levels = []
    for output in outputs:
        measured = measure_shape(output.shape, size, resample)
        if measured is None:
            raise ValueError(
                f"an output of {type(module).__name__} has shape {tuple(output.shape)} for an "
                f"input of {size[0]}x{size[1]}: it is no feature map with a whole stride"
            )
        levels.append(Level(*measured, end=log.last_write[id(output)]))
    names = [name for name, _ in module.named_parameters()]
    sources, overwrites = log.sources(outputs)
    return Trace(
        levels,
        [output.shape for output in outputs],
        {
            name: log.first_read[id(meta[name])]
            for name in names
            if id(meta[name]) in log.first_read
        },
        frozenset(name for name in names if _address(meta[name]) in sources),
        overwrites,
        {run.name: run.end for run in runs},
        _followed_by(module, runs, log, outputs),
    )


def last_of_each_stride(levels: list[Level]) -> dict[str, int]:
    """Name levels by their stride, detectron2's way.

    Args:
        levels: in the order of execution.

    Returns:
        ``res{n}`` for stride 2^n to the index of the last level with that stride, fine to coarse.
    """
    names = {level.exponent: index for index, level in enumerate(levels)}
    return {f"res{exponent}": names[exponent] for exponent in sorted(names)}
