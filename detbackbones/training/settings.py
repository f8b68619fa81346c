"""What the settings of a config may be: one table, checked before anything is built."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data.files import existing
from ..messages import first_line


@dataclass(frozen=True)
class Rule:
    """What a setting must be.

    Attributes:
        fits: whether a value is that.
        must: the end of the sentence that refuses another value.
        text: whether it is text, which an override may write without quotes.
    """

    fits: Callable[[Any], bool]
    must: str
    text: bool = False


def _is_whole(value: object, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def whole(least: int, most: int | None = None) -> Rule:
    """A whole number of a range."""
    end = "" if most is None else f" to {most}"
    return Rule(
        lambda value: _is_whole(value, least, math.inf if most is None else most),
        f"be a whole number from {least}{end}",
    )


def number(least: float, most: float = math.inf, *, above: bool = False) -> Rule:
    """A number of a range, whose lower end does not belong to it if ``above``."""
    must = f"be a number {'above' if above else 'from'} {least}"
    must += "" if most == math.inf else f"{' and up' if above else ''} to {most}"
    return Rule(
        lambda value: (
            type(value) in (int, float)
            and (least < value if above else least <= value)
            and value <= most
            and value != math.inf
        ),
        must,
    )


def whole_numbers(least: int) -> Rule:
    """A list of whole numbers that is not empty."""
    return Rule(
        lambda value: (
            isinstance(value, list | tuple)
            and bool(value)
            and all(_is_whole(item, least) for item in value)
        ),
        f"be a list of whole numbers from {least}",
    )


def or_null(rule: Rule) -> Rule:
    """None, or what a rule says."""
    return Rule(lambda value: value is None or rule.fits(value), f"{rule.must}, or null", rule.text)


SWITCH = Rule(lambda value: isinstance(value, bool), "be True or False")
TEXT = Rule(lambda value: isinstance(value, str), "be text", text=True)
NAMES = Rule(
    lambda value: (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(item, str) for item in value)
    ),
    "be a list of names",
)

SETTINGS: Mapping[str, Rule] = {
    "train.output_dir": Rule(lambda v: isinstance(v, str) and v, "be a folder", text=True),
    "train.init_checkpoint": or_null(TEXT),
    "train.max_iter": whole(1),
    "train.seed": whole(0),
    "train.device": TEXT,
    "train.eval_period": whole(0),
    "train.log_period": whole(1),
    "train.accumulation_steps": whole(1),
    "train.model_ema.enabled": SWITCH,
    "train.model_ema.decay": Rule(
        lambda value: type(value) in (int, float) and 0 <= value < 1,
        "be a number from 0 to below 1",
    ),
    "train.trackers": Rule(
        lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
        "be a list of names",
    ),
    "train.best_metric": or_null(TEXT),
    "train.patience": or_null(whole(1)),
    "train.feature_cache": number(0),
    "train.pictures": whole(0),
    "train.score_threshold": number(0, 1),
    "train.allow_partial": SWITCH,
    "train.allow_pickle": SWITCH,
    "train.amp.enabled": SWITCH,
    "train.amp.dtype": TEXT,
    "train.clip_grad.enabled": SWITCH,
    "train.clip_grad.params.max_norm": number(0, above=True),
    "train.clip_grad.params.norm_type": Rule(
        lambda value: type(value) in (int, float) and value > 0, "be a number above 0, or inf"
    ),
    "train.checkpointer.period": whole(1),
    "train.checkpointer.max_to_keep": or_null(whole(1)),
    "train.fsdp": SWITCH,
    "train.ddp.broadcast_buffers": SWITCH,
    "train.ddp.find_unused_parameters": SWITCH,
    "train.ddp.fp16_compression": SWITCH,
    "dataset.train_json": TEXT,
    "dataset.train_images": TEXT,
    "dataset.train_labels": TEXT,
    "dataset.val_json": TEXT,
    "dataset.val_images": TEXT,
    "dataset.val_labels": TEXT,
    "dataset.images": TEXT,
    "dataset.size": whole(1),
    "dataset.classes": or_null(NAMES),
    "dataset.num_classes": whole(1, 255),
    "dataset.channels": whole(1),
    "dataset.max_value": or_null(number(0, above=True)),
    "dataset.verify": SWITCH,
    "dataset.train_sizes": whole_numbers(1),
    "dataset.val_size": whole(1),
    "dataset.max_size": whole(1),
    "dataset.augmentation.scale_jitter": or_null(
        Rule(
            lambda value: (
                isinstance(value, list)
                and len(value) == 2
                and all(type(item) in (int, float) for item in value)
                and 0 < value[0] <= value[1]
            ),
            "be two numbers above 0 that grow",
        )
    ),
    "dataset.augmentation.crop": number(0, 1),
    "dataset.augmentation.zoom_out": number(0, 1),
    "dataset.augmentation.color": number(0, 1),
    "dataset.augmentation.upright": SWITCH,
    **{f"dataset.mixing.{key}": number(0, 1) for key in ("mosaic", "mixup", "copy_paste", "until")},
    "dataloader.train.total_batch_size": whole(1),
    "dataloader.train.num_workers": whole(0),
    "dataloader.train.aspect_ratio_grouping": SWITCH,
    "dataloader.train.repeat_threshold": number(0, 1),
    "dataloader.test.num_workers": whole(0),
    "dataloader.test.batch_size": whole(1),
    "optimizer.lr": number(0, above=True),
    "optimizer.weight_decay": number(0),
    "optimizer.momentum": number(0, 1),
    "optimizer.params.backbone_lr_factor": number(0),
    "optimizer.params.layer_decay": number(0, 1, above=True),
    "lr_multiplier.warmup_length": number(0, 1),
    "lr_multiplier.warmup_factor": number(0, 1),
    "model.backbone.out_channels": whole(1),
}

SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

JSON, FOLDER = "the path of a COCO JSON file", "the folder of the images"
PATHS = {  # of data in COCO's format
    "dataset.train_json": (os.path.isfile, JSON),
    "dataset.train_images": (os.path.isdir, FOLDER),
    "dataset.val_json": (os.path.isfile, JSON),
    "dataset.val_images": (os.path.isdir, FOLDER),
}

_ABSENT = object()


def check_settings(cfg: DictConfig, *, trains: bool = True) -> None:
    """Refuse settings that are of another type or out of range, and files that are not there.

    Args:
        cfg: the config, with its overrides; it may lack settings.
        trains: whether the training data must be there.

    Raises:
        ValueError: if a setting is wrong.
        FileNotFoundError: if a file or folder of ``dataset`` does not exist.
    """
    for section in SECTIONS:
        if not isinstance(cfg.get(section), DictConfig):
            raise ValueError(f"{section}={cfg.get(section)!r} must be a section of settings")
    for section in ("train", "dataset"):
        _check_names(section, cfg.get(section) or {})
    for key, rule in SETTINGS.items():
        value = _setting(cfg, key)
        if key == "dataset.num_classes" and "train_labels" not in (cfg.get("dataset") or {}):
            continue  # a key of the user's own
        if value is not _ABSENT and not rule.fits(value):
            raise ValueError(f"{key}={value!r} must {rule.must}")
    if "train_json" in (cfg.get("dataset") or {}):
        for key, (exists, what) in PATHS.items():
            if key.startswith("dataset.train") and not trains:
                continue
            path = _setting(cfg, key)
            if not isinstance(path, str):
                raise ValueError(f"{key} is missing: it must be {what}")
            existing(key, path, exists, what)


def _check_names(section: str, given: Iterable[str]) -> None:
    """Refuse a name that is nearly that of a setting; other trainers have settings of their own."""
    known = {key.split(".")[1] for key in SETTINGS if key.startswith(f"{section}.")}
    for key in given:
        if key not in known and (close := get_close_matches(key, known, 1, 0.85)):
            raise ValueError(
                f"config key '{section}.{key}' is unknown: the nearest is '{section}.{close[0]}'"
            )


def _setting(cfg: DictConfig, key: str) -> Any:
    """The value of a key; absent too if it is something that is to be called for it."""
    try:
        value = OmegaConf.select(cfg, key, default=_ABSENT)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key} must be a value: {first_line(error)}") from error
    if isinstance(value, DictConfig) and "_target_" in value:
        return _ABSENT
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value, resolve=True)
    return value
