"""The configuration of a model of transformers for the feature maps of a backbone."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detectron2.layers import ShapeSpec

from ..config import plain_dict
from ..messages import nearest
from .architectures import ARCHITECTURES, EVERY, SEGMENTERS, Architecture, import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ONCE = "transformers counts the class loss once, whatever it says"
_WITHOUT_EFFECT = {  # on training
    ("conditional_detr", "cls_loss_coefficient"): _ONCE,
    ("dab-detr", "cls_loss_coefficient"): _ONCE,
    ("deformable_detr", "two_stage"): "transformers has no loss for the first stage, and "
    "architecture='dino' has",
}


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


def refusal(config_kwargs: Mapping[str, Any], error: Exception) -> ValueError:
    """What a user is told where transformers refuses a configuration."""
    reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
    return ValueError(f"config_kwargs={config_kwargs} are refused: {reason}")


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
    elif "num_feature_levels" in default and not (base or EVERY[architecture].vit):
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
        reason = _WITHOUT_EFFECT.get((architecture, key))
        if reason and kwargs[key] is not False:
            raise ValueError(f"config_kwargs: {key}={kwargs[key]} must be left out: {reason}")
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
        raise refusal(kwargs, error) from error
    finally:
        saying.disabled = False
    _check_trainable(EVERY[architecture], config.to_dict())
    return config


def _stand_in(architecture: str, shapes: Sequence[ShapeSpec]) -> "PreTrainedConfig":
    """A small net of the same channels, in the place of which the backbone comes."""
    transformers, n = import_transformers(), len(shapes)
    if vit := EVERY[architecture].vit:
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
