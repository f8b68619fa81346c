"""Loading whole detectors of the Hugging Face hub, and saving them as transformers reads them."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from detectron2.modeling import Backbone
from torch import nn

from ..checkpoint import downloading_from_hub
from ..feature_backbone import FeatureBackbone
from ..messages import one_of
from ..timm_backbone import TimmBackbone
from .architectures import ARCHITECTURES, encoder_name, import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .detector import TransformersDetector

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
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"pretrained_detector={name!r} is no folder of a detector of transformers: {reason}"
            ) from error
    else:
        advice = "give pretrained_detector= a folder, or train.init_checkpoint= a file"
        with downloading_from_hub(name, f"{advice}, or neither"):
            yield


def read_config(name: str) -> "PreTrainedConfig":
    """The configuration of a detector of transformers.

    Args:
        name: on the hub, or a folder.

    Raises:
        ConnectionError: if it cannot be downloaded.
        ValueError: if it is a folder without a configuration, or of a model that is none of
            ``ARCHITECTURES``.
    """
    with _reading(name):
        config = import_transformers().AutoConfig.from_pretrained(name)
    one_of(
        f"pretrained_detector={name!r} is of an architecture that", config.model_type, ARCHITECTURES
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
        source = import_transformers().AutoModelForObjectDetection.from_pretrained(
            name, use_safetensors=True
        )
    prefix = f"{encoder_name(source)}."
    state = source.state_dict()
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    own = model.state_dict()
    fit = {k: v for k, v in rest.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fit, strict=False)
    left = sorted({key.rpartition(".")[0] for key in own if key not in fit})

    encoder = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    own_backbone = _timm_backbone(backbone)
    loaded = 0
    if own_backbone and _name(own_backbone.model_name) == timm_name(source.config.backbone_config):
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


def timm_name(config: "PreTrainedConfig") -> str | None:
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
    for key, value in backbone.state_dict().items():
        key = key.removeprefix("model.")
        fits = key in state and state[key].shape == value.shape
        if not fits and not key.endswith("num_batches_tracked"):
            return 0
    return backbone.load_source(state)[0]


def save_pretrained(
    detector: "TransformersDetector", folder: str, class_names: Sequence[str] | None = None
) -> None:
    """See :meth:`TransformersDetector.save_pretrained`."""
    transformers = import_transformers()
    if os.path.isdir(folder) and os.listdir(folder):
        raise FileExistsError(f"folder {folder!r} holds files: choose another name or empty it")
    if class_names is not None and len(class_names) != detector.num_classes:
        raise ValueError(
            f"class_names has {len(class_names)} names for {detector.num_classes} classes"
        )
    backbone = detector.backbone
    timm = isinstance(backbone, TimmBackbone)
    if not timm or not backbone.indices:
        raise ValueError(
            "save_pretrained: transformers builds the stages of timm's models, and the backbone is "
            f"a {type(backbone).__name__}" + (" with layers=" if timm else "")
        )
    settings = detector.detr.config.to_dict()
    settings["backbone_config"] = transformers.TimmBackboneConfig(
        backbone=backbone.model_name,
        out_indices=[backbone.indices[name] for name in detector.in_features],
    )
    if class_names is not None:
        settings["id2label"] = dict(enumerate(class_names))
        settings["label2id"] = {name: i for i, name in enumerate(class_names)}
    config = type(detector.detr.config).from_dict(settings)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    encoder = model.get_submodule(encoder_name(model))
    timm_model = getattr(encoder.model, "_backbone", encoder.model)
    with contextlib.suppress(RuntimeError):  # other shapes, which the comparison finds
        timm_model.load_state_dict(backbone.model.state_dict(), strict=False)
    _check_maps(detector, encoder)
    model.load_state_dict(detector.detr.state_dict(), strict=False)
    model.save_pretrained(folder)
    padded = ARCHITECTURES[detector.architecture].padded_boxes
    kind = "RTDetrImageProcessor" if padded else "DeformableDetrImageProcessor"
    getattr(transformers, kind)(
        do_normalize=True,
        image_mean=(detector.pixel_mean.flatten() / 255).tolist(),
        image_std=(detector.pixel_std.flatten() / 255).tolist(),
    ).save_pretrained(folder)


@torch.no_grad()
def _check_maps(detector: "TransformersDetector", encoder: nn.Module) -> None:
    """Refuse to save a detector whose feature maps transformers does not compute."""
    divisor, device = detector.backbone.size_divisibility, detector.device
    side = divisor * math.ceil(128 / divisor)
    images = torch.randn(1, len(detector.pixel_mean), side, side, device=device)
    mask = torch.ones(1, side, side, device=device)
    training = detector.training
    levels = detector.eval().backbone(images)
    detector.train(training)
    own = [levels[name] for name in detector.in_features]
    try:
        theirs = [level for level, _ in encoder.to(device).eval()(images, mask)]
    except Exception as error:
        reason = f"transformers cannot run it: {error}"
    else:
        same = [level.shape for level in own] == [level.shape for level in theirs]
        if same and all((a - b).abs().max() <= 1e-3 * a.abs().max() for a, b in zip(own, theirs)):
            return
        reason = "transformers' model of this name gives other feature maps"
    raise ValueError(f"backbone={detector.backbone.model_name!r} cannot be saved: {reason}")
