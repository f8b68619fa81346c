"""Loading whole detectors of the Hugging Face hub, and saving them as transformers reads them."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from detectron2.modeling import Backbone
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..backbones.timm_backbone import TimmBackbone
from ..config import plain_dict
from ..messages import first_line, nearest
from ..weights import fitting, unloaded
from ..weights.downloads import downloading_from_hub
from .architectures import ARCHITECTURES, import_transformers
from .build import encoder_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What transformers calls a ResNet-D in RT-DETR, and timm in resnet50d; the order matters.
_RESNET_D = [
    (r"^embedder\.embedder\.0\.convolution\.", "conv1.0."),
    (r"^embedder\.embedder\.0\.normalization\.", "conv1.1."),
    (r"^embedder\.embedder\.1\.convolution\.", "conv1.3."),
    (r"^embedder\.embedder\.1\.normalization\.", "conv1.4."),
    (r"^embedder\.embedder\.2\.convolution\.", "conv1.6."),
    (r"^embedder\.embedder\.2\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d+)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.(1\.)?convolution\.", ".downsample.1."),
    (r"\.shortcut\.(1\.)?normalization\.", ".downsample.2."),
]


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn the errors of transformers into one sentence each."""
    if os.path.isdir(name):
        try:
            yield
        except (OSError, ValueError) as error:
            raise ValueError(
                f"pretrained_detector={name!r} is no folder of a detector of transformers: "
                f"{first_line(error)}"
            ) from error
    else:
        advice = "give pretrained_detector= a folder, or train.init_checkpoint= a file"
        with downloading_from_hub(name, f"{advice}, or neither"):
            yield


def read_config(name: str | Mapping[str, Any]) -> "PreTrainedConfig":
    """The configuration of a detector of transformers.

    Args:
        name: on the hub, or a folder; or what is in its ``config.json``.

    Raises:
        ConnectionError: if it cannot be downloaded.
        ValueError: if it is a folder without a configuration, or of a model that is none of
            ``ARCHITECTURES``.
    """
    transformers = import_transformers()
    from . import dino  # noqa: F401  which transformers knows from then on

    if isinstance(name, str):
        with _reading(name):
            config = transformers.AutoConfig.from_pretrained(name)
    else:
        config = transformers.AutoConfig.for_model(**plain_dict(name))
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"pretrained_detector={name!r} must be of a known architecture, and it is of "
            f"{config.model_type!r}: {nearest(config.model_type, ARCHITECTURES)}"
        )
    return config


def load_pretrained(model: "PreTrainedModel", backbone: Backbone, name: str) -> str:
    """Load those weights of a detector that fit: tensors of the same name and shape.

    Class heads for another number of classes stay as they are, and so does the backbone, unless
    all that it needs is there. Pickled weights are not read.

    Args:
        model: of the same architecture, a backbone in the place of its encoder.
        backbone: the backbone.
        name: on the hub, or a folder.

    Returns:
        the report, one line.
    """
    with _reading(name):
        source = type(model).from_pretrained(name, use_safetensors=True)
    prefix = f"{encoder_name(source)}."
    state = source.state_dict()
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    own = model.state_dict()
    fit = fitting(rest, own)
    model.load_state_dict(fit, strict=False)
    left = sorted({key.rpartition(".")[0] for key in own if key not in fit})

    encoder = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    own_backbone = _timm_backbone(backbone)
    wanted = timm_backbone_name(source.config.backbone_config)
    loaded = 0
    if own_backbone and _name(own_backbone.model_name) == wanted:
        loaded = _load_backbone(own_backbone, timm_keys(encoder))
    report = f"loaded {len(fit)} of the detector's {len(own)} tensors from {name}"
    if left:
        report += f" (not {', '.join(left[:4])}{', ...' if len(left) > 4 else ''})"
    return f"{report}, and {loaded or 'none'} of the backbone's"


def timm_keys(encoder: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a convolution encoder of transformers, by timm's names.

    Args:
        encoder: the state dict of a timm model in its wrapping, or of RT-DETR's ResNet.
    """
    state = {}
    for key, value in encoder.items():
        key = key.removeprefix("model.").removeprefix("_backbone.")
        for pattern, name in _RESNET_D:
            key = re.sub(pattern, name, key)
        state[key] = value
    return state


def timm_backbone_name(config: "PreTrainedConfig") -> str | None:
    """What timm calls the backbone of a configuration; None for what timm has not."""
    if config.model_type == "timm_backbone":
        return _name(config.backbone)
    if config.model_type == "rt_detr_resnet" and config.layer_type == "bottleneck":
        return f"resnet{3 * sum(config.depths) + 2}d"
    return None


def _name(model_name: str) -> str:
    return model_name.partition(".")[0]  # without the tag of its weights


def _timm_backbone(backbone: Backbone) -> TimmBackbone | None:
    """The TimmBackbone that a backbone is, or has under its pyramid."""
    return next((m for m in backbone.modules() if isinstance(m, TimmBackbone)), None)


def _load_backbone(backbone: FeatureBackbone, state: Mapping[str, torch.Tensor]) -> int:
    """Load a backbone if all that it needs is there; the number of tensors."""
    own = {key.removeprefix("model."): value for key, value in backbone.state_dict().items()}
    if unloaded(own, fitting(state, own)):
        return 0
    return backbone.load_source(state)[0].fitting


def save_pretrained(
    folder: str,
    detr: "PreTrainedModel",
    backbone: Backbone,
    in_features: Sequence[str],
    pixels: tuple[torch.Tensor, torch.Tensor],
    class_names: Sequence[str] | None,
) -> None:
    """Write a detector as transformers reads it.

    Args:
        folder: to write to; it must not exist or be empty.
        detr: the model, with the backbone in the place of its encoder.
        backbone: the backbone.
        in_features: names of the levels that the model takes.
        pixels: mean and deviation of the images' channels, 0 to 255, (C, 1, 1) each.
        class_names: names of the classes, in order; None for LABEL_0 and so on.

    Raises:
        FileExistsError: if ``folder`` holds files.
        ValueError: if the backbone is not one that transformers builds through timm, or
            transformers' model does not give what this one gives.
    """
    transformers = import_transformers()
    if os.path.isdir(folder) and os.listdir(folder):
        raise FileExistsError(f"folder {folder!r} holds files: choose another name or empty it")
    if class_names is not None and len(class_names) != detr.config.num_labels:
        raise ValueError(
            f"class_names has {len(class_names)} names for {detr.config.num_labels} classes"
        )
    if ARCHITECTURES[detr.config.model_type].vit:
        raise ValueError(
            f"save_pretrained: transformers builds {detr.config.model_type!r} on its own ViT alone"
        )
    timm = isinstance(backbone, TimmBackbone)
    if not timm or not backbone.indices:
        raise ValueError(
            "save_pretrained: transformers builds the stages of timm's models, and the backbone is "
            f"a {type(backbone).__name__}" + (" with layers=" if timm else "")
        )
    settings = detr.config.to_dict()
    settings["backbone_config"] = transformers.TimmBackboneConfig(
        backbone=backbone.model_name,
        out_indices=[backbone.indices[name] for name in in_features],
    )
    if class_names is not None:
        settings["id2label"] = dict(enumerate(class_names))
        settings["label2id"] = {name: i for i, name in enumerate(class_names)}
    config = type(detr.config).from_dict(settings)
    model = type(detr)(config)
    encoder = model.get_submodule(encoder_name(model))
    timm_model = getattr(encoder, "model", encoder)  # of a convolution encoder, or it is the slot
    timm_model = getattr(timm_model, "_backbone", timm_model)
    own = timm_model.state_dict()
    # timm's extractors write some dots of names as underscores, or model. before them
    names = {key.removeprefix("model.").replace(".", "_"): key for key in own}
    state = {key.removeprefix("model."): value for key, value in backbone.state_dict().items()}
    state = {names.get(key.replace(".", "_"), key): value for key, value in state.items()}
    timm_model.load_state_dict(fitting(state, own), strict=False)
    _check_maps(backbone, in_features, encoder, detr.config.model_type, len(pixels[0]))
    model.load_state_dict(detr.state_dict(), strict=False)
    model.save_pretrained(folder)
    processor = ARCHITECTURES[detr.config.model_type].processor
    getattr(transformers, processor)(
        do_normalize=True,
        image_mean=(pixels[0].flatten() / 255).tolist(),
        image_std=(pixels[1].flatten() / 255).tolist(),
    ).save_pretrained(folder)


@torch.no_grad()
def _check_maps(
    backbone: FeatureBackbone,
    in_features: Sequence[str],
    encoder: nn.Module,
    architecture: str,
    channels: int,
) -> None:
    """Refuse to save a detector whose feature maps transformers does not compute."""
    divisor, device = backbone.size_divisibility, next(backbone.parameters()).device
    side = divisor * math.ceil(128 / divisor)
    images = torch.randn(1, channels, side, side, device=device)
    mask = torch.ones(1, side, side, device=device)
    training = backbone.training
    levels = backbone.eval()(images)
    backbone.train(training)
    own = [levels[name] for name in in_features]
    try:
        encoder = encoder.to(device).eval()
        if ARCHITECTURES[architecture].slot:
            theirs = encoder(images).feature_maps
        else:
            theirs = [level for level, _ in encoder(images, mask)]
    except Exception as error:  # a model may fail in any way
        reason = f"transformers cannot run it: {error}"
    else:
        same = [level.shape for level in own] == [level.shape for level in theirs]
        if same and all((a - b).abs().max() <= 1e-3 * a.abs().max() for a, b in zip(own, theirs)):
            return
        reason = "transformers' model of this name gives other feature maps"
    raise ValueError(f"backbone={backbone.model_name!r} cannot be saved: {reason}")
