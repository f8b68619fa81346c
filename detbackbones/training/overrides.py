"""Command-line overrides of a LazyConfig that refuse a key the config cannot use."""

import inspect
from collections.abc import Iterator
from typing import Any

from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..messages import first_line, nearest
from .settings import SETTINGS


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Change a config by ``key=value`` words.

    A key may be one that the config has, or an argument that the callable at that place takes
    though the config does not mention it. A value is written as Hydra has it (numbers, ``True``,
    ``null``, ``[1,2]``, ``{a:1}``, ``'text'``); what is nothing of these is text as it stands, such
    as a path with spaces, commas or brackets.

    Args:
        cfg: changed in place.
        overrides: such as ``train.max_iter=100`` or ``model.backbone.bottom_up.norm=BN``.

    Returns:
        the config.

    Raises:
        ValueError: if a word is no ``key=value`` or its key is unknown.
    """
    for word in overrides:
        key, equals, text = word.lstrip("+").partition("=")
        if not equals or not key:
            raise ValueError(f"override {word!r} must be key=value")
        if key.startswith("~"):
            raise ValueError(f"override {word!r} must be key=value that sets one: none is deleted")
        _check_key(cfg, key)
        try:
            _update(cfg, key, _value(key, text))
        except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"override {word!r} must be key=value that the config takes: {first_line(error)}"
            ) from error
    return cfg


def _value(key: str, text: str) -> Any:
    """What a value is in Hydra's grammar, or else the text."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        value = text if override.is_sweep_override() else override.value()
    except HydraException:
        return text
    is_text = key in SETTINGS and SETTINGS[key].text
    return text if is_text and value is not None and not isinstance(value, str) else value


def _update(cfg: DictConfig, key: str, value: Any) -> None:
    """Set a key; a list, and what was to be called there, make way for another kind of value."""
    before = OmegaConf.select(cfg, key)
    replaced = isinstance(before, ListConfig)
    if isinstance(before, DictConfig) and not isinstance(value, dict):
        replaced = "_target_" in before
    OmegaConf.update(cfg, key, value, merge=not replaced, force_add=True)


def _check_key(cfg: DictConfig, key: str) -> None:
    """Refuse a key if one of its parts is neither in the config nor an argument at its place."""
    node, path, free = cfg, "", False
    for part in key.split("."):
        name, _, index = part.partition("[")
        known = None if free else _keys(node)
        if known is not None and name not in known:
            raise ValueError(f"config key {key!r} is unknown: {_near(cfg, key, path, known)}")
        if not isinstance(node, DictConfig | ListConfig):
            above = path.removesuffix(".")
            raise ValueError(
                f"override of {key!r} must be key=value that the config takes: {above} has no keys"
            )
        called = isinstance(node, DictConfig) and "_target_" in node
        try:
            node = OmegaConf.select(node, part)
        except OmegaConfBaseException:
            node = None
        if node is None:  # an argument that the config does not mention: it decides what is valid
            return
        # a dict that is an argument, such as model_kwargs, may have any keys
        free = called and isinstance(node, DictConfig) and "_target_" not in node
        path += f"{name}." if not index else f"{part}."


def _near(cfg: DictConfig, key: str, path: str, known: set[str]) -> str:
    """A clause that names the keys that may be meant: those that end so, or those at its place."""
    ends = [full for full in _paths(cfg) if full.endswith(f".{key}")]
    if ends:
        return f"is {' or '.join(map(repr, ends[:3]))} meant"
    name = key.removeprefix(path).partition(".")[0].partition("[")[0]
    return nearest(f"{path}{name}", [f"{path}{k}" for k in known])


def _paths(node: Any, path: str = "") -> Iterator[str]:
    """The keys of a config, with the arguments that its callables take beside them."""
    if isinstance(node, DictConfig):
        for key in sorted(_keys(node) or map(str, node)):
            yield f"{path}{key}"
            below = node._get_node(key)
            yield from _paths(below, f"{path}{key}.")


def _keys(node: DictConfig | ListConfig | None) -> set[str] | None:
    """What may stand below a node; None if it is anything."""
    if isinstance(node, ListConfig):
        return {str(i) for i in range(len(node))}
    if not isinstance(node, DictConfig):
        return None
    keys = {str(key) for key in node}
    if "_target_" not in node:
        return keys
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return keys | {p.name for p in parameters}
