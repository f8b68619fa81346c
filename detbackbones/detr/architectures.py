"""The DETR-family models of transformers, and what each asks of a backbone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from detectron2.modeling import Backbone

from ..backbones.feature_backbone import FeatureBackbone
from ..measure.levels import select_levels


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
        encoder_only: it has a plain ViT's blocks in it, and no levels.
        counts_alone: prefixes of the names of losses that each process divides by its own number of
            boxes, in transformers without accelerate.
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
    encoder_only: bool = False
    counts_alone: tuple[str, ...] = ()


_HYBRID = Architecture(
    (8, 16, 32),
    pyramid=True,
    hybrid=True,
    two_stage=True,
    processor="RTDetrImageProcessor",
    padded_boxes=True,
    counts_alone=("loss_vfl", "loss_mal", "loss_bbox", "loss_giou", "loss_fgl"),
)
# transformers 5.23 counts the class loss once, whatever cls_loss_coefficient says
_WEIGHTS = (
    ("loss_ce", 1),
    ("loss_bbox", "bbox_loss_coefficient"),
    ("loss_giou", "giou_loss_coefficient"),
)
_COUNTED = ("loss_ce", "loss_bbox", "loss_giou")
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
    "deformable_detr": Architecture((8, 16, 32), loss_weights=_WEIGHTS, counts_alone=_COUNTED),
    "detr": Architecture(
        (32,),
        no_object=True,
        processor="DetrImageProcessor",
        loss_weights=_WEIGHTS,
        counts_alone=_COUNTED[1:],  # its class loss is a mean over the queries
    ),
    "conditional_detr": Architecture(
        (32,),
        processor="ConditionalDetrImageProcessor",
        loss_weights=_WEIGHTS,
        counts_alone=_COUNTED,
    ),
    "dab-detr": Architecture((32,), loss_weights=_WEIGHTS, counts_alone=_COUNTED),
}
SEGMENTERS = {
    "mask2former": Architecture(
        (4, 8, 16, 32), pyramid=True, slot="model.pixel_level_module.encoder", no_object=True
    ),
    "eomt": Architecture((), no_object=True, encoder_only=True),
}
EVERY = ARCHITECTURES | SEGMENTERS


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


def choose_levels(
    architecture: str, backbone: Backbone, in_features: Sequence[str] | None
) -> list[str]:
    """Names of the levels of a backbone that a model takes, fine to coarse.

    Raises:
        ValueError: if a level is unknown, or the strides are not what the model needs.
    """
    wanted, shapes = EVERY[architecture], backbone.output_shape()
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
