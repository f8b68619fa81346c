"""One run of a module on the meta device, and all that can be learned from it."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .levels import PROBE_SIZE, Level, measure_shape, output_list
from .meta import meta_state, run_on_meta


@dataclass
class Run:
    """One run of a submodule.

    Attributes:
        name: of the submodule.
        inputs: the tensors that it was given.
        start: index of its first operation.
        versions: how often each of them had been written in place when it began.
        end: index of its last operation, infinity if it did not return.
        outputs: the tensors that it gave.
    """

    name: str
    inputs: list[torch.Tensor]
    start: int
    versions: list[int] = field(default_factory=list)
    end: float = math.inf
    outputs: list[torch.Tensor] = field(default_factory=list)

    @property
    def repeatable(self) -> bool:
        """Whether its inputs are what they were, not overwritten in place by it or after it."""
        return [tensor._version for tensor in self.inputs] == self.versions

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its outputs."""
        return [tuple(tensor.shape) for tensor in self.outputs]


@dataclass(frozen=True)
class Trace:
    """What happened when a module ran once; operations are counted from 0.

    Attributes:
        module: what ran.
        size: (H, W) of the images that it was given.
        resample: see :func:`detbackbones.measure.levels.measure_shape`.
        state: its parameters and buffers by name, as they were for this run.
        runs: of its submodules and itself (``""``), in the order in which they began.
        ended: those of them that returned, in the order in which they did.
        log: of the operations.
        outputs: of the module, as a list where there are several; None if it failed.
        error: why it failed, or None.
    """

    module: nn.Module
    size: tuple[int, int]
    resample: bool
    state: dict[str, torch.Tensor]
    runs: list[Run]
    ended: list[Run]
    log: "_OperationLog"
    outputs: list[torch.Tensor] | None
    error: Exception | None

    @cached_property
    def levels(self) -> list[Level]:
        """The outputs as feature maps, in the order in which the module gives them.

        Raises:
            ValueError: if an output is no feature map with a whole stride.
        """
        levels = []
        for output in self.outputs:
            measured = measure_shape(output.shape, self.size, self.resample)
            if measured is None:
                raise ValueError(
                    f"an output of {type(self.module).__name__} has shape {tuple(output.shape)} "
                    f"for an input of {self.size[0]}x{self.size[1]}: it is no feature map with a "
                    "whole stride"
                )
            levels.append(Level(*measured, end=self.log.last_write[id(output)]))
        return levels

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the outputs, as the module gave them."""
        return [output.shape for output in self.outputs]

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Name of each parameter that was used, and the index of its first use."""
        first = self.log.first_read
        names = [name for name, _ in self.module.named_parameters()]
        return {n: first[id(self.state[n])] for n in names if id(self.state[n]) in first}

    @cached_property
    def needed(self) -> frozenset[str]:
        """Names of the parameters on which the values of some output depend."""
        sources, _ = self._sources
        names = [name for name, _ in self.module.named_parameters()]
        return frozenset(name for name in names if _address(self.state[name]) in sources)

    @property
    def overwrites(self) -> int:
        """How many operations in place change what the values of some output depend on."""
        return self._sources[1]

    @cached_property
    def _sources(self) -> tuple[set[int], int]:
        return self.log.sources(self.outputs)

    @cached_property
    def modules(self) -> dict[str, float]:
        """Name of each submodule that was called, and the index of its last operation.

        It is infinity for one that did not return; ``""`` is the module itself.
        """
        return {run.name: run.end for run in self.runs}

    @cached_property
    def runs_of(self) -> dict[str, list[Run]]:
        """The runs of each submodule, by each of its names, also of those that did not run."""
        by_name: dict[str, list[Run]] = {name: [] for name, _ in self.module.named_modules()}
        for run in self.runs:
            by_name[run.name].append(run)
        first = {module: name for name, module in self.module.named_modules()}
        every = self.module.named_modules(remove_duplicate=False)
        return {name: by_name[first[module]] for name, module in every if name}

    @cached_property
    def followed_by(self) -> dict[str, str]:
        """Which submodules are directly followed by another one: ``{"conv1": "bn1"}``.

        Of submodules without submodules that ran once: where what one gave was read in the run of
        another and nowhere else, the names of the two.
        """
        count = Counter(run.name for run in self.runs)
        reads: dict[int, list[int]] = {}
        for index, (read, _, _) in enumerate(self.log.memory):
            for address in read:
                reads.setdefault(address, []).append(index)
        takers: dict[int, list[Run]] = {}
        for run in self.runs:
            for tensor in run.inputs:
                takers.setdefault(id(tensor), []).append(run)
        given = {_address(tensor) for tensor in self.outputs}

        found = {}
        for run in self.runs:
            if count[run.name] > 1 or len(run.outputs) != 1 or run.end < run.start:
                continue
            (output,) = run.outputs
            if any(self.module.get_submodule(run.name).children()) or _address(output) in given:
                continue
            # What takes it is a sequence of modules each in the one before it; of these the
            # innermost. One that has nothing to do in eval mode, a dropout, is none of them.
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
        read = tensors_in((args, kwargs or {}))
        for tensor in read:
            self.first_read.setdefault(id(tensor), len(self.memory))
        out = func(*args, **(kwargs or {}))
        written = tensors_in(out)
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


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in whatever a module takes or returns."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(
    module: nn.Module,
    in_channels: int = 3,
    size: tuple[int, int] = PROBE_SIZE,
    resample: bool = False,
) -> Trace:
    """Run a module once, without memory or arithmetic, whatever it gives and even if it fails.

    The module itself is not touched: its parameters and buffers are replaced by meta tensors for
    the one call, in eval mode.

    Args:
        module: maps a tensor of shape (N, C, H, W) to anything.
        in_channels: the C of its input.
        size: the (H, W) of its input.
        resample: see :func:`detbackbones.measure.levels.measure_shape`.

    Returns:
        the trace; its ``levels`` can be asked for where the module gives feature maps.
    """
    state = meta_state(module)
    log = _OperationLog()
    runs: list[Run] = []
    ended: list[Run] = []

    def begin(name: str, inputs: tuple) -> None:
        tensors = tensors_in(inputs)
        versions = [tensor._version for tensor in tensors]
        runs.append(Run(name, tensors, len(log.memory), versions))

    def finish(name: str, output: Any) -> None:
        run = next(run for run in reversed(runs) if run.name == name and run.end == math.inf)
        run.end, run.outputs = len(log.memory) - 1, tensors_in(output)
        ended.append(run)

    hooks = []
    for name, child in module.named_modules():
        hooks += [
            child.register_forward_pre_hook(lambda _, inputs, name=name: begin(name, inputs)),
            child.register_forward_hook(lambda _, inputs, output, name=name: finish(name, output)),
        ]
    modes = [(child, child.training) for child in module.modules()]
    outputs = error = None
    module.eval()
    try:
        with log:
            outputs = run_on_meta(module, state, (2, in_channels, *size))
            if isinstance(outputs, Iterable):  # listing a tensor is an operation too
                outputs = output_list(outputs)
    except Exception as failure:  # a model may fail in any way
        error = failure
    finally:
        for hook in hooks:
            hook.remove()
        module.train(modes[0][1])
        for child, mode in modes:
            child.training = mode
    return Trace(module, size, resample, state, runs, ended, log, outputs, error)


def trace(
    module: nn.Module,
    in_channels: int = 3,
    size: tuple[int, int] = PROBE_SIZE,
    resample: bool = False,
) -> Trace:
    """Run a feature extractor once as :func:`record` does, and measure its levels.

    Args:
        module: maps a tensor of shape (N, C, H, W) to a list, tuple or dict of feature maps.
        in_channels, size, resample: see :func:`record`.

    Raises:
        ValueError: if an output is no feature map with a whole stride.
        Exception: what the module raises.
    """
    found = record(module, in_channels, size, resample)
    if found.error:
        raise found.error
    found.levels  # noqa: B018  measured now, so that it is refused now
    return found
