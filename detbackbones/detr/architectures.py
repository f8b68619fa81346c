"""The DETR-family models of transformers: what each asks of a backbone, and building one on it."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..config import plain_dict
from ..data.images import ImageError
from ..measure.levels import select_levels
from ..messages import first_line, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """What a model of transformers asks of a backbone, and what its numbers mean.

    Attributes:
        strides: of the levels that it takes by default.
        pyramid: each level's stride must be twice that of the level before.
        hybrid: it has the hybrid encoder of RT-DETR, whose configuration tells of every level.
        two_stage: the queries are chosen from all positions of the maps.
        vit: transformers' kind of ViT that it stands on, which has several maps of one stride. It
            takes one level, or several of the same stride and as many channels. Empty for others.
        slot: the name of the module that gives feature maps and nothing else; empty where it is the
            convolution encoder, whose maps have masks.
        no_object: the last logit is of no class, and scores are a softmax.
        processor: the image processor of transformers that its detections go through.
        padded_boxes: boxes are fractions of the padded images (the model has no use for the mask
            of the pixels), else of each image's own size.
        loss_weights: prefixes of the names of losses to the attributes of the configuration with
            their weights (a number is one itself), where the losses come without.
        masks: it has a model that gives masks, too.
    """

    strides: tuple[int, ...]
    pyramid: bool = False
    hybrid: bool = False
    two_stage: bool = False
    vit: str = ""
    slot: str = ""
    no_object: bool = False
    processor: str = "DeformableDetrImageProcessor"
    padded_boxes: bool = False
    loss_weights: tuple[tuple[str, str | float], ...] = ()
    masks: bool = False


_HYBRID = Architecture(
    (8, 16, 32),
    pyramid=True,
    hybrid=True,
    two_stage=True,
    processor="RTDetrImageProcessor",
    padded_boxes=True,
)
# transformers 5.23 counts the class loss once, whatever cls_loss_coefficient says
_WEIGHTS = (
    ("loss_ce", 1),
    ("loss_bbox", "bbox_loss_coefficient"),
    ("loss_giou", "giou_loss_coefficient"),
)

_CLASS_WEIGHTS = (("loss_ce", "class_loss_coefficient"), *_WEIGHTS[1:])
_MASK_WEIGHTS = (
    ("loss_mask_ce", "mask_class_loss_coefficient"),
    ("loss_mask_dice", "mask_dice_loss_coefficient"),
)

# by model_type, as transformers.AutoConfig knows them
ARCHITECTURES = {
    "rt_detr": _HYBRID,
    "rt_detr_v2": _HYBRID,
    "d_fine": _HYBRID,
    "deimv2": replace(_HYBRID, slot="model.conv_encoder.model"),
    "dino": Architecture((8, 16, 32), two_stage=True),
    "lw_detr": Architecture(
        (16,), vit="lw_detr_vit", slot="model.backbone.backbone", loss_weights=_CLASS_WEIGHTS
    ),
    "rf_detr": Architecture(
        (16,),
        vit="rf_detr_dinov2",
        slot="model.backbone.backbone",
        loss_weights=(*_CLASS_WEIGHTS, *_MASK_WEIGHTS),
        masks=True,
    ),
    "deformable_detr": Architecture((8, 16, 32), loss_weights=_WEIGHTS),
    "detr": Architecture(
        (32,), no_object=True, processor="DetrImageProcessor", loss_weights=_WEIGHTS
    ),
    "conditional_detr": Architecture(
        (32,), processor="ConditionalDetrImageProcessor", loss_weights=_WEIGHTS
    ),
    "dab-detr": Architecture((32,), loss_weights=_WEIGHTS),
}
SEGMENTERS = {
    "mask2former": Architecture(
        (4, 8, 16, 32), pyramid=True, slot="model.pixel_level_module.encoder"
    ),
}
_ALL = ARCHITECTURES | SEGMENTERS


def import_transformers() -> ModuleType:
    """The package transformers, or one sentence that says how to get it."""
    try:
        import scipy  # noqa: F401  for matching
        import transformers
    except ImportError as error:
        raise ImportError(
            f"this detector needs the package {error.name}: pip install detbackbones[detr]"
        ) from error
    return transformers


class BackboneEncoder(nn.Module):
    """A detectron2 backbone in the place of the one of a transformers model.

    The backbone is no submodule of it: the detector that holds both has it under its own name.
    """

    def __init__(
        self,
        backbone: Backbone,
        names: Sequence[str],
        *,
        min_positions: int = 0,
        with_masks: bool = True,
    ):
        """
        Args:
            backbone: gives the feature maps.
            names: of the levels to take, fine to coarse.
            min_positions: that the maps must have together, where a query is chosen from each.
            with_masks: it takes the place of a convolution encoder, which gives maps and masks;
                else of a backbone, which gives maps alone.
        """
        super().__init__()
        self._backbone, self.names = [backbone], names
        self.min_positions, self.with_masks = min_positions, with_masks

    def forward(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None, **_: Any
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | SimpleNamespace:
        """
        Args:
            pixel_values: normalized images (N, C, H, W).
            pixel_mask: (N, H, W), 1 for pixels of the image, 0 for padding; for masks.

        Returns:
            a feature map (N, c, h, w) and its mask (N, h, w) for each level; or the maps alone,
            as ``feature_maps`` of an object.

        Raises:
            ImageError: if the images are so small that there are less positions than queries.
        """
        levels = self._backbone[0](pixel_values)
        maps = [levels[name] for name in self.names]
        positions = sum(level[0, 0].numel() for level in maps)
        if positions < self.min_positions:
            height, width = pixel_values.shape[-2:]
            raise ImageError(
                f"images padded to {height}x{width} are too small for num_queries="
                f"{self.min_positions}: their feature maps have {positions} positions"
            )
        if not self.with_masks:
            return SimpleNamespace(feature_maps=maps)
        mask = pixel_mask[None].float()
        return [(level, F.interpolate(mask, size=level.shape[-2:])[0].bool()) for level in maps]


def choose_levels(
    architecture: str, backbone: Backbone, in_features: Sequence[str] | None
) -> list[str]:
    """Names of the levels of a backbone that a model takes, fine to coarse.

    Raises:
        ValueError: if a level is unknown, or the strides are not what the model needs.
    """
    wanted, shapes = _ALL[architecture], backbone.output_shape()
    by_stride = {shape.stride: name for name, shape in shapes.items()}
    has = ", ".join(f"{name} ({shape.stride})" for name, shape in shapes.items())
    if in_features is not None:
        names = select_levels(in_features, list(shapes), "in_features")
    else:
        missing = [stride for stride in wanted.strides if stride not in by_stride]
        if missing:
            raise ValueError(
                f"architecture={architecture!r} takes levels of strides {wanted.strides}, and the "
                f"backbone has {has}: give in_features, or build_pyramid(bottom_up=...) over it"
            )
        names = [by_stride[stride] for stride in wanted.strides]
    strides = [shapes[name].stride for name in names]
    if wanted.pyramid and any(2 * fine != coarse for fine, coarse in zip(strides, strides[1:])):
        raise ValueError(
            f"in_features={names} have strides {strides}, and architecture={architecture!r} takes "
            f"levels each of twice the stride before; the backbone has {has}"
        )
    if wanted.pyramid and backbone.size_divisibility % strides[-1]:
        raise ValueError(
            f"the backbone takes images of {backbone.size_divisibility} pixels, and architecture="
            f"{architecture!r} multiples of {strides[-1]}, the stride of {names[-1]}: give img_size"
        )
    if wanted.vit:
        if isinstance(backbone, FeatureBackbone) and max(by_stride) > max(strides):
            raise ValueError(
                f"the backbone has levels that architecture={architecture!r} does not take "
                f"({has}): build it with out_features={names}"
            )
        if len({(shapes[name].stride, shapes[name].channels) for name in names}) > 1:
            raise ValueError(
                f"in_features={names}: architecture={architecture!r} takes levels of one stride "
                f"and as many channels, such as several depths of a ViT; the backbone has {has}"
            )
    elif len(wanted.strides) == 1 < len(names):
        raise ValueError(f"in_features={names}: architecture={architecture!r} takes one level")
    return names


def _check_trainable(architecture: Architecture, settings: Mapping[str, Any]) -> None:
    """Refuse settings that transformers takes and then cannot train with.

    Raises:
        ValueError: if a parameter would have no gradient, which distributed training refuses at its
            second step, or the model would fail at the first image.
    """
    if architecture.hybrid and not settings["auxiliary_loss"]:
        raise ValueError(
            "config_kwargs: auxiliary_loss=False must be left out: the encoder's part in choosing "
            "queries would have no loss"
        )
    if settings.get("num_denoising") and settings["box_noise_scale"] <= 0:
        raise ValueError(
            f"config_kwargs: box_noise_scale={settings['box_noise_scale']} must be more than 0: "
            "transformers takes boxes without noise for logits"
        )
    if settings.get("learn_initial_query"):
        raise ValueError(
            "config_kwargs: learn_initial_query=True must be left out: transformers' model fails "
            "with it"
        )
    if "train_num_points" in settings:
        _check_mask2former(settings)
    if settings.get("decoder_layers", 2) < 2:
        raise ValueError(
            f"config_kwargs: decoder_layers={settings['decoder_layers']} must be at least 2: with "
            "one, transformers ties no weights or leaves some without a gradient"
        )


def _check_mask2former(settings: Mapping[str, Any]) -> None:
    """Refuse settings that transformers takes and its Mask2Former cannot be trained with.

    Raises:
        ValueError: as of :func:`_check_trainable`.
    """
    needs = (
        ("use_auxiliary_loss", settings["use_auxiliary_loss"], "True"),
        ("dropout", settings["dropout"] == 0, "0, for layers are dropped by it"),
        ("train_num_points", settings["train_num_points"] >= 1, "at least 1"),
        ("oversample_ratio", settings["oversample_ratio"] >= 1, "at least 1"),
        ("hidden_dim", settings["hidden_dim"] == settings["feature_size"], "feature_size"),
        ("enforce_input_projection", not settings["enforce_input_projection"], "False"),
    )
    for key, is_right, wanted in needs:
        if not is_right:
            raise ValueError(f"config_kwargs: {key}={settings[key]} must be {wanted}")


def build_config(
    architecture: str,
    shapes: Sequence[ShapeSpec],
    num_classes: int,
    num_queries: int | None = None,
    config_kwargs: Mapping[str, Any] | None = None,
    base: "PreTrainedConfig | None" = None,
) -> "PreTrainedConfig":
    """The configuration of a model of transformers for feature maps of these shapes.

    Args:
        architecture: a key of ``ARCHITECTURES`` or ``SEGMENTERS``.
        shapes: of the levels, fine to coarse.
        num_classes: without background.
        num_queries: None is for what the model has by default.
        config_kwargs: attributes of the configuration, such as ``decoder_layers``.
        base: start from this configuration instead of the architecture's default.

    Raises:
        ValueError: if ``config_kwargs`` has an unknown name, one that is computed here, or a value
            that is refused.
    """
    transformers = import_transformers()
    if architecture == "dino":
        from . import dino  # noqa: F401  which transformers knows from then on

    kwargs, n = plain_dict(config_kwargs), len(shapes)
    default = transformers.AutoConfig.for_model(architecture).to_dict()
    computed = {
        "backbone_config": _stand_in(architecture, shapes),
        "num_labels": num_classes,
        "num_queries": num_queries,
    }
    if "projector_scale_factors" in default and not base:
        kwargs.setdefault("projector_scale_factors", [1.0])
    if architecture in SEGMENTERS:
        strides = [shape.stride for shape in shapes]
        if n < 3:
            raise ValueError(f"in_features must be at least 3 for {architecture!r}, not {n}")
        computed |= {"feature_strides": strides, "common_stride": strides[0]}
    elif ARCHITECTURES[architecture].hybrid:
        computed |= {
            "encoder_in_channels": [shape.channels for shape in shapes],
            "feat_strides": [shape.stride for shape in shapes],
            "encode_proj_layers": [n - 1],
            "num_feature_levels": n,
            "decoder_in_channels": None,  # below: they follow encoder_hidden_dim
            "eval_size": None,  # positions and anchors for images of any size
            "anchor_image_size": None,
            "freeze_backbone_batch_norms": False,
        }
    elif "num_feature_levels" in default and not (base or _ALL[architecture].vit):
        # coarser maps follow those of the backbone
        maps = kwargs.setdefault("num_feature_levels", max(default["num_feature_levels"], n + 1))
        if maps < n:
            raise ValueError(
                f"config_kwargs: num_feature_levels={maps} must be at least {n}, the number of "
                "in_features"
            )
    if "decoder_n_levels" in default:
        computed["decoder_n_levels"] = n
    for key in kwargs:
        if key in computed:
            raise ValueError(f"config_kwargs has {key!r}, which follows from other parameters")
        if key not in default:
            raise ValueError(f"config_kwargs has {key!r}: {nearest(key, default)}")
    if num_queries is None:
        del computed["num_queries"]
    auxiliary = {"auxiliary_loss": True} if "auxiliary_loss" in default else {}
    settings = (base.to_dict() if base else {}) | auxiliary | kwargs | computed
    for key in ("id2label", "label2id", "model_type"):  # these of num_classes take their place
        settings.pop(key, None)
    if "decoder_in_channels" in computed:
        width = settings.get("encoder_hidden_dim", default.get("encoder_hidden_dim"))
        settings["decoder_in_channels"] = [width] * n
    saying = logging.getLogger(f"transformers.models.{architecture}.configuration_{architecture}")
    saying.disabled = True  # that the stand-in is no Swin
    try:
        config = transformers.AutoConfig.for_model(architecture, **settings)
    except Exception as error:  # huggingface_hub's validation has errors of its own
        reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        raise ValueError(f"config_kwargs={kwargs} are refused: {reason}") from error
    finally:
        saying.disabled = False
    _check_trainable(_ALL[architecture], config.to_dict())
    return config


def _stand_in(architecture: str, shapes: Sequence[ShapeSpec]) -> "PreTrainedConfig":
    """A small net of the same channels, in the place of which the backbone comes."""
    transformers, n = import_transformers(), len(shapes)
    if vit := _ALL[architecture].vit:
        return transformers.AutoConfig.for_model(
            vit,
            hidden_size=shapes[0].channels,
            num_hidden_layers=n,
            num_attention_heads=1,
            mlp_ratio=1,
            out_indices=list(range(1, n + 1)),
        )
    return transformers.ResNetConfig(
        embedding_size=1,
        hidden_sizes=[shape.channels for shape in shapes],
        depths=[1] * n,
        out_indices=list(range(1, n + 1)),
    )


def _fewest_positions(config: "PreTrainedConfig") -> int:
    """How many positions the maps must have, where a query is chosen from each."""
    wanted = _ALL[config.model_type]
    if wanted.vit:  # whose maps are scaled first
        scales = getattr(config, "projector_scale_factors", [1.0])
        return math.ceil(config.num_queries / sum(scale**2 for scale in scales))
    return config.num_queries if wanted.two_stage else 0


def build_model(
    config: "PreTrainedConfig", backbone: Backbone, names: Sequence[str], *, masks: bool = False
) -> "PreTrainedModel":
    """A model of transformers with random weights, a backbone in the place of its own.

    Args:
        config: see :func:`build_config`.
        backbone: gives the feature maps; it does not become a submodule.
        names: of its levels, fine to coarse.
        masks: of a detector, the model that gives masks, too.

    Raises:
        ValueError: if transformers cannot build it, such as with a width that its heads do not
            divide.
    """
    transformers, wanted = import_transformers(), _ALL[config.model_type]
    kind = "UniversalSegmentation" if config.model_type in SEGMENTERS else "ObjectDetection"
    kind = "InstanceSegmentation" if masks else kind
    try:
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    except Exception as error:  # it may assert, divide by zero, or fail in torch
        raise ValueError(
            f"config_kwargs: transformers cannot build {config.model_type!r} with them: "
            f"{first_line(error)}"
        ) from error
    encoder = BackboneEncoder(
        backbone,
        names,
        min_positions=_fewest_positions(config),
        with_masks=not wanted.slot,
    )
    model.set_submodule(encoder_name(model), encoder)
    return model


def encoder_name(model: "PreTrainedModel") -> str:
    """The name of the module of a model that runs its backbone, and that ours takes the place of.

    It is the convolution encoder, or the backbone in it.
    """
    if slot := _ALL[model.config.model_type].slot:
        # a model that gives masks has the detector in it
        return f"model.{slot}" if type(model).__name__.endswith("InstanceSegmentation") else slot
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    ends = ("ConvEncoder", BackboneEncoder.__name__)
    return next(name for name, kind in kinds.items() if kind.endswith(ends))
