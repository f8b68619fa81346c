"""Which parameters and modules lie before a level, in the order of execution, and freezing them."""

from dataclasses import dataclass

from torch import nn

from ..measure.trace import Trace
from .norm import freeze_batch_norm, is_batch_norm


@dataclass(frozen=True)
class FrozenPart:
    """The part of a model that runs up to the end of a level, by the model's own names.

    Attributes:
        parameters: names of the parameters that it uses.
        modules: names of the submodules that run in it from beginning to end.
    """

    parameters: frozenset[str]
    modules: frozenset[str]


def frozen_part(trace: Trace, freeze_at: int, prefix: str = "") -> FrozenPart:
    """What ``freeze_at`` freezes.

    Args:
        trace: of an extractor of all levels of the model.
        freeze_at: 0 nothing, 1 the stem, n everything that runs up to the end of the last level
            with a stride of at most 2^n, 5 the whole model (detectron2's numbers for ResNet).
        prefix: what the extractor puts before the model's own names.

    Raises:
        ValueError: if ``freeze_at`` is out of range.
    """
    if freeze_at not in range(6):
        raise ValueError(
            f"freeze_at={freeze_at!r} is out of range: valid are 0 (nothing) to 5 (all)"
        )
    parameters = {name.removeprefix(prefix): index for name, index in trace.parameters.items()}
    if freeze_at == 0:
        end = -1
    elif freeze_at == 5:
        end = float("inf")
    else:
        ends = [level.end for level in trace.levels if level.exponent <= freeze_at]
        first_level = min(level.end for level in trace.levels)
        end = max(ends) if ends else _end_of_stem(parameters, first_level)
    return FrozenPart(
        frozenset(name for name, index in parameters.items() if index <= end),
        frozenset(n.removeprefix(prefix) for n, index in trace.modules.items() if index <= end),
    )


def _end_of_stem(parameters: dict[str, int], first_level: int) -> int:
    """Index of the last operation of the stem of a model that has no level of stride 2.

    The stem is the largest named part that begins with the first parameter and does not reach the
    end of the first level (a patch embedding with its norm, say), with what runs before the next
    part (adding position embeddings).

    Args:
        parameters: name of each parameter that is used, and the index of its first use.
        first_level: the index of the operation that ends the first level.
    """
    order = sorted(parameters, key=parameters.get)
    last = [name for name in order if parameters[name] <= first_level][-1]
    parts = order[0].split(".")[:-1]
    stem = next(
        prefix
        for prefix in (".".join(parts[:n]) + "." for n in range(1, len(parts) + 1))
        if not last.startswith(prefix) or prefix.count(".") == len(parts)
    )
    after = [parameters[name] for name in order if not name.startswith(stem) and "." in name]
    return min(after, default=first_level + 1) - 1


def freeze(extractor: nn.Module, part: FrozenPart, prefix: str = "") -> list[str]:
    """Freeze a part of a model: no gradients, and batch norm in it fixed whatever its kind.

    Args:
        extractor: of the model; changed in place. What is missing in it is passed over.
        part: of the model.
        prefix: what the extractor puts before the model's own names.

    Returns:
        the names, in the extractor, of the modules that are to stay in eval mode.
    """
    for name, parameter in extractor.named_parameters():
        if name.removeprefix(prefix) in part.parameters:
            parameter.requires_grad_(False)
    names = [n for n, _ in extractor.named_modules() if n.removeprefix(prefix) in part.modules]
    for name in names:
        parent, _, child = name.rpartition(".")
        module = extractor.get_submodule(name)
        if is_batch_norm(module):
            setattr(extractor.get_submodule(parent), child, freeze_batch_norm(module))
    return names
