"""Which parameters and modules lie before a level, in the order of execution."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .levels import Trace
from .norm import freeze_batch_norm


@dataclass(frozen=True)
class Prefix:
    """The part of a model that runs up to the end of a level.

    Attributes:
        parameters: names of the parameters that it uses.
        modules: names of the submodules that run in it from beginning to end.
    """

    parameters: frozenset[str]
    modules: frozenset[str]


NO_PREFIX = Prefix(frozenset(), frozenset())


def _end_of_stem(trace: Trace, source_keys: dict[str, str]) -> int:
    """Index of the last operation of the stem of a model that has no level of stride 2.

    The stem is the largest named part that begins with the first parameter and does not reach the
    end of the first level (a patch embedding with its norm, say), with what runs before the next
    part (adding position embeddings).
    """
    names = {name: source_keys.get(name, name) for name in trace.parameters}
    order = sorted(trace.parameters, key=trace.parameters.get)
    first_level = min(level.end for level in trace.levels)
    last = names[[name for name in order if trace.parameters[name] <= first_level][-1]]
    parts = names[order[0]].split(".")[:-1]
    stem = next(
        prefix
        for prefix in (".".join(parts[:n]) + "." for n in range(1, len(parts) + 1))
        if not last.startswith(prefix) or prefix.count(".") == len(parts)
    )
    after = [
        trace.parameters[name]
        for name in order
        if not names[name].startswith(stem) and "." in names[name]
    ]
    return min(after, default=first_level + 1) - 1


def frozen_prefix(trace: Trace, freeze_at: int, source_keys: dict[str, str]) -> Prefix:
    """What ``freeze_at`` freezes.

    Args:
        trace: of an extractor of all levels of the model.
        freeze_at: 0 nothing, 1 the stem, n everything that runs up to the end of the last level
            with a stride of at most 2^n, 5 the whole model (detectron2's numbers for ResNet).
        source_keys: names of the extractor's parameters to their names in the source model.

    Raises:
        ValueError: if ``freeze_at`` is out of range.
    """
    if freeze_at not in range(6):
        raise ValueError(
            f"freeze_at={freeze_at!r} is out of range: valid are 0 (nothing) to 5 (all)"
        )
    if freeze_at == 0:
        end = -1
    elif freeze_at == 5:
        end = float("inf")
    else:
        ends = [level.end for level in trace.levels if level.exponent <= freeze_at]
        end = max(ends) if ends else _end_of_stem(trace, source_keys)
    return Prefix(
        frozenset(name for name, index in trace.parameters.items() if index <= end),
        frozenset(name for name, index in trace.modules.items() if index <= end),
    )


def renamed_prefix(
    prefix: Prefix, source_names: Mapping[str, str], other_names: Mapping[str, str]
) -> Prefix:
    """The same prefix in another extractor of the source model.

    Args:
        prefix: of one extractor.
        source_names: its names to those of the source model.
        other_names: the other extractor's names to those of the source model.
    """
    own = {source: name for name, source in other_names.items()}

    def rename(names: Iterable[str]) -> frozenset[str]:
        return frozenset(own[source_names[n]] for n in names if source_names[n] in own)

    return Prefix(rename(prefix.parameters), rename(prefix.modules))


def freeze(model: nn.Module, prefix: Prefix) -> list[str]:
    """Freeze a prefix of a model: no gradients, and batch norm in it fixed whatever its kind.

    Args:
        model: the extractor; changed in place.
        prefix: names in it; those that the model does not have are passed over.

    Returns:
        the names of the modules that are to stay in eval mode.
    """
    for name, parameter in model.named_parameters():
        if name in prefix.parameters:
            parameter.requires_grad_(False)
    names = [name for name, _ in model.named_modules() if name in prefix.modules]
    for name in names:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            setattr(model.get_submodule(parent), child, freeze_batch_norm(module))
    return names
