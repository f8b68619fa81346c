"""Reading a YAML config that may be a stranger's: no tag is executed, and what it calls is known.

A LazyConfig calls what its ``_target_`` keys name, so that one is a program.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.registry import locate

from .messages import first_line

PACKAGES = ("detbackbones", "detectron2", "torch", "torchvision", "timm", "transformers", "fvcore")
# In these packages, but made to run what is in a file or at an address.
RUNNERS = (
    "detectron2.config",
    "detectron2.utils.registry",
    "torch.hub",
    "torch.package",
    "torch.serialization",
    "torch.utils.cpp_extension",
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, and the tuples that detectron2 writes."""

    def tuple(self, node: yaml.Node) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.tuple)


def read_yaml(file: Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a config that detectron2's ``LazyConfig.save`` or a person wrote.

    ``LazyConfig.load`` would execute what tags such as ``!!python/object/apply`` name.

    Args:
        file: of the config.
        trust: whether ``_target_`` may name what is in none of :data:`PACKAGES`, and the config may
            ask for pickled checkpoints.

    Raises:
        ValueError: if it is no YAML, has other tags than those of plain values and tuples, or needs
            trust; names the line or the key.
    """
    try:
        content = yaml.load(file.read_bytes(), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be YAML: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a config, a mapping of keys to values")
    if not trust:
        _check_calls(file, content)
    return content


def _check_calls(file: Path, content: dict[str, Any]) -> None:
    advice = "read the file, and give --trust if you trust it"
    for key, target in _targets(content, ""):
        if not _is_known(target):
            raise ValueError(
                f"{file}: {key}={target!r} calls what is not of {', '.join(PACKAGES)}: {advice}"
            )
    train = content.get("train")
    if isinstance(train, dict) and train.get("allow_pickle"):
        raise ValueError(
            f"{file}: train.allow_pickle=True lets a checkpoint execute any code: {advice}"
        )


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The ``_target_`` values in a config, with their keys."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        if key == "_target_":
            yield f"{path}{key}", value
        if isinstance(value, dict | list | tuple):
            yield from _targets(value, f"{path}{key}.")


def _is_known(target: object) -> bool:
    """Whether a target is defined in one of the packages, not only to be had through it."""
    if not isinstance(target, str) or target.partition(".")[0] not in PACKAGES:
        return False
    try:
        module = locate(target).__module__
    except Exception:  # whatever an import raises
        return False
    owned = isinstance(module, str) and module.partition(".")[0] in PACKAGES
    return owned and not any(f"{module}.".startswith(f"{runner}.") for runner in RUNNERS)
