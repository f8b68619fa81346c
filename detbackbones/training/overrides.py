"""Command-line overrides of a LazyConfig that refuse a key the config cannot use."""

import inspect

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..messages import first_line, nearest


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Change a config by ``key=value`` words.

    A key may be one that the config has, or an argument that the callable at that place takes
    though the config does not mention it.

    Args:
        cfg: changed in place.
        overrides: such as ``train.max_iter=100`` or ``model.backbone.bottom_up.norm=BN``.

    Returns:
        the config.

    Raises:
        ValueError: if a word is no ``key=value`` or its key is unknown.
    """
    for word in overrides:
        key, equals, _ = word.lstrip("+~").partition("=")
        if not equals:
            raise ValueError(f"override {word!r} must be key=value")
        _check_key(cfg, key)
        try:
            cfg = LazyConfig.apply_overrides(cfg, [word])
        except Exception as error:  # hydra's grammar has many errors of its own
            raise ValueError(
                f"override {word!r} must be key=value that the config takes: {first_line(error)}"
            ) from error
    return cfg


def _check_key(cfg: DictConfig, key: str) -> None:
    """Refuse a key if one of its parts is neither in the config nor an argument at its place."""
    node, path, free = cfg, "", False
    for part in key.split("."):
        name, _, index = part.partition("[")
        known = None if free else _keys(node)
        if known is not None and name not in known:
            near = nearest(f"{path}{name}", [f"{path}{k}" for k in known])
            raise ValueError(f"config key {key!r} is unknown: {near}")
        called = isinstance(node, DictConfig) and "_target_" in node
        try:
            inside = isinstance(node, (DictConfig, ListConfig))
            node = OmegaConf.select(node, part) if inside else None
        except OmegaConfBaseException:
            node = None
        if node is None:  # an argument that the config does not mention: it decides what is valid
            return
        # a dict that is an argument, such as model_kwargs, may have any keys
        free = called and isinstance(node, DictConfig) and "_target_" not in node
        path += f"{name}." if not index else f"{part}."


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
