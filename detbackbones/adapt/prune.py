"""Taking out of a feature extractor the parts that its levels do not depend on.

A classifier, or the stages after the last level that is asked for: what remains is what a detector
trains, so that no parameter is left without a gradient.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..measure.sizes import SizeRule
from ..measure.trace import Trace, trace


def prune(extractor: nn.Module, measured: Trace, in_channels: int, sizes: SizeRule) -> None:
    """Take the modules and parameters that no level depends on out of an extractor.

    Where it runs them all the same, something takes their place; where that changes the levels
    they stay, without gradients.

    Args:
        extractor: changed in place.
        measured: a trace of it, or of one that is built alike.
        in_channels: channels of the images.
        sizes: the image sizes that it takes.
    """
    unused = []
    for name, module in extractor.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_parameters()]
        if name and own and not measured.needed.intersection(own):
            if not any(name.startswith(f"{other}.") for other in unused):
                unused.append(name)

    def runs_without(names: list[str], substitute: Callable[[nn.Module], nn.Module]) -> bool:
        modules = {name: extractor.get_submodule(name) for name in names}
        for name, module in modules.items():
            extractor.set_submodule(name, substitute(module))
        try:
            again = trace(extractor, in_channels, sizes.probe, sizes.resample)
            # what follows an Identity may overwrite what went into it
            if again.overwrites == measured.overwrites and _same_maps(again, measured):
                return True
        except Exception:  # a part that no level depends on may fail in any way
            pass
        for name, module in modules.items():
            extractor.set_submodule(name, module)
        return False

    def drop(names: list[str]) -> None:
        if not names or runs_without(names, lambda _: nn.Identity()):
            return
        for name in names:
            if not (runs_without([name], lambda _: nn.Identity()) or runs_without([name], Stub)):
                children = extractor.get_submodule(name).named_children()
                drop([f"{name}.{key}" for key, child in children if [*child.parameters()]])

    drop(unused)
    for name, parameter in list(extractor.named_parameters()):
        if name not in measured.needed:
            parameter.requires_grad_(False)
            if name not in measured.parameters:
                module, _, key = name.rpartition(".")
                extractor.get_submodule(module).register_parameter(key, None)


class Stub(nn.Module):
    """Zeros of the shapes that a module gives, in the place of one on which no level depends."""

    def __init__(self, module: nn.Module):
        """
        Args:
            module: what it takes the place of.
        """
        super().__init__()
        self._model = [copy.deepcopy(module).to("meta").eval()]  # in a list it is no submodule

    def forward(self, *args: torch.Tensor) -> Any:
        """Zeros, of whatever structure the module gives."""
        outputs = self._model[0](*(arg.to("meta", torch.float32) for arg in args))
        like = args[0]
        return tree_map(lambda out: like.new_zeros(out.shape), outputs)


def _same_maps(trace: Trace, other: Trace) -> bool:
    pairs = zip(trace.levels, other.levels, strict=True)
    return all(replace(level, end=0) == replace(same, end=0) for level, same in pairs)
