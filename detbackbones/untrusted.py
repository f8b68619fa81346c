"""Reading a YAML config that may be a stranger's: no tag is executed, and what it calls is known.

A LazyConfig calls what its ``_target_`` keys name, so that one is a program.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.registry import locate

from .messages import first_line

# Where detectors, data and optimizers are defined. Other modules of these packages run what is in a
# file, at an address, or in a text.
MODULES = (
    *("detbackbones.backbones", "detbackbones.data", "detbackbones.detr", "detbackbones.heads"),
    *("detbackbones.shapes", "detbackbones.training.distillation", "detbackbones.training.optim"),
    *("detectron2.data", "detectron2.evaluation", "detectron2.layers", "detectron2.modeling"),
    *("detectron2.projects", "detectron2.solver", "detectron2.structures"),
    "fvcore.common.param_scheduler",
    *("timm.data", "timm.layers", "timm.models", "timm.optim", "timm.scheduler"),
    *("torch.nn", "torch.optim", "torchvision.models", "torchvision.ops", "torchvision.transforms"),
)
EXCEPT = ("timm.models._", "timm.data.readers", "torch.nn.parallel")


_ADVICE = "give --trust if you trust the file"


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
        trust: whether tags are executed, ``_target_`` may name what is in none of :data:`MODULES`,
            interpolations may call resolvers, and the config may ask for pickled checkpoints.

    Raises:
        ValueError: if it is no YAML, has other tags than those of plain values and tuples, or needs
            trust; names the line or the key.
    """
    try:
        content = yaml.load(file.read_bytes(), yaml.UnsafeLoader if trust else _Loader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"{file}, line {line}: {error.problem}; {_ADVICE}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be YAML: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a config, a mapping of keys to values")
    if not trust:
        check_calls(file, content)
    return content


def check_calls(file: str | Path, content: dict[str, Any]) -> None:
    """Refuse a config that calls what does not define detectors, data and optimizers.

    Args:
        file: that it was read from, for the message.
        content: of the config, plain values.

    Raises:
        ValueError: if it does; names the key.
    """
    for key, target in _targets(content, ""):
        if not _is_known(target):
            raise ValueError(
                f"{file}: {key}={target!r} calls what is in no module that defines detectors, data "
                f"and optimizers: {_ADVICE}"
            )
    for key, text in _resolvers(content, ""):
        raise ValueError(f"{file}: {key}={text!r} calls a resolver of OmegaConf: {_ADVICE}")
    train = content.get("train")
    if isinstance(train, dict) and train.get("allow_pickle"):
        raise ValueError(
            f"{file}: train.allow_pickle=True lets a checkpoint execute any code: {_ADVICE}"
        )


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The ``_target_`` values in a config, with their keys."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        if key == "_target_":
            yield f"{path}{key}", value
        if isinstance(value, dict | list | tuple):
            yield from _targets(value, f"{path}{key}.")


def _resolvers(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """The texts in a config that call a resolver, such as ``${oc.env:HOME}``, with their keys.

    The name of a resolver may itself be an interpolation.
    """
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        for text in (key, value):
            if isinstance(text, str) and re.search(r"\$\{(\s*[^{}\s]*:|[^}]*\$\{)", text):
                yield f"{path}{key}", text
        if isinstance(value, dict | list | tuple):
            yield from _resolvers(value, f"{path}{key}.")


def _is_known(target: object) -> bool:
    """Whether a target is defined in one of the modules, not only to be had through it."""
    packages = {name.partition(".")[0] for name in MODULES}
    if not isinstance(target, str) or target.partition(".")[0] not in packages:
        return False
    try:
        module = f"{locate(target).__module__}."
    except Exception:  # whatever an import raises
        return False
    return any(module.startswith(f"{name}.") for name in MODULES) and not module.startswith(EXCEPT)
