"""TimmBackbone: any timm model as a detectron2 backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from ..config import check_model_kwargs, plain_dict
from ..messages import one_of, whole_number
from .detrex import norm_from_detrex
from .feature_backbone import FeatureBackbone
from .pyramid import build_yacs_pyramid
from .source import Levels
from .timm_source import TimmSource


@BACKBONE_REGISTRY.register()
class TimmBackbone(FeatureBackbone):
    """A timm model as a backbone: feature maps by stride (``res2`` ...) or index (``p1`` ...).

    Attributes:
        indices: timm's index of each level; empty with ``layers``.
    """

    source_class = TimmSource

    @configurable
    def __init__(
        self,
        model_name: str,
        *,
        pretrained: bool = False,
        checkpoint_path: str = "",
        in_channels: int = 3,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        out_depths: Sequence[float] | None = None,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        norm: str = "",
        freeze_at: int = 0,
        fold: bool = True,
        channels_last: bool | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lora_rank: int = 0,
        lora_layers: Sequence[str] = (),
        output_stride: int | None = None,
        img_size: int | None = None,
        patch_size: int | None = None,
        window_size: int | None = None,
        global_blocks: int = 4,
        final_norm: bool = False,
        drop_path_rate: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
        features_only: bool = True,
        norm_layer: type | str | None = None,
    ):
        """
        Args:
            model_name: as in ``timm.create_model``, with or without a tag; ``hf-hub:...`` and
                ``local-dir:...`` work as there.
            pretrained: download timm's pretrained weights.
            checkpoint_path: a ``.pth``, ``.pt`` or ``.safetensors`` file of the classification
                model, or of a detector trained with this backbone.
            in_channels: channels of the input; weights of another number are adapted as timm does.
            out_features: levels to output, by stride: ``["res3", "res4", "res5"]``. By default
                those of strides 4 to 32. Later stages are not built.
            out_indices: levels to output by timm's index instead, named ``p{index}``.
            out_depths: levels of a plain ViT by the part of its blocks that is behind them instead:
                ``[0.5, 0.75, 1]`` of 12 blocks are ``p5``, ``p8`` and ``p11``.
            layers: names of modules whose outputs to take instead, ``["layer2", "layer3"]``, or a
                mapping from these to level names.
            norm: batch norm ``""`` as in the model, ``"FrozenBN"``, ``"SyncBN"`` or ``"BN"``.
            freeze_at: 0 nothing, 1 the stem, 2 up to and including ``res2``, ... 5 all.
            fold: make frozen batch norm a part of the convolution before it; see ``fold_norms``.
            channels_last: the memory format of the maps; None is for where it was measured to help,
                on a CPU in models with batch norm but ResNeSt. RepVGG never has channels last on a
                CPU, see :func:`detbackbones.adapt.memory_format.breaks_in_channels_last`.
            compile: run the model through ``torch.compile``.
            grad_checkpointing: compute maps again in the backward pass instead of keeping them:
                less memory, more time.
            lora_rank: freeze the model, and train updates of this rank of its linear layers and
                1x1 convolutions (LoRA, needs peft); 0 is none.
            lora_layers: endings of the names of the layers that have updates, such as
                ``["attn.qkv", "attn.proj"]``; empty is for all.
            output_stride: 8, 16 or 32; dilate the late stages to keep it, in models that can.
            img_size: build the model for images of this size, in models that are built for one.
                Most take others too; those that do not take images up to this size.
            patch_size: resample the patch embedding to this stride, in ViTs: 16 lets a feature
                pyramid stand on a patch-14 ViT. The grid of the position embeddings stays.
            window_size: let the blocks of a plain ViT attend within windows of so many patches, see
                :func:`detbackbones.adapt.windows.add_windows`; None is for the whole image.
            global_blocks: how many of its blocks attend to the whole image all the same.
            final_norm: pass each level of a plain ViT through the norm behind its last block, as
                DINOv2 and DINOv3 do for dense tasks; by default levels are as the blocks give them.
            drop_path_rate: stochastic depth, in models that have it.
            model_kwargs: further arguments for ``timm.create_model``.
            features_only: only True; there for configs written for detrex.
            norm_layer: a FrozenBatchNorm2d class means ``norm="FrozenBN"``; for detrex's configs.

        Raises:
            ValueError: if an argument is out of range or the model cannot give what is asked.
            FileNotFoundError: if ``checkpoint_path`` does not exist.
            ConnectionError: if pretrained weights cannot be downloaded.
            ImportError: if peft is needed and not installed.
        """
        norm = norm_from_detrex(features_only, norm_layer, norm)
        whole_number("in_channels", in_channels)
        asked = {"out_features": out_features, "out_indices": out_indices}
        asked |= {"out_depths": out_depths, "layers": layers}
        asked = [f"{key}={value}" for key, value in asked.items() if value is not None]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} were given together: use one")
        if output_stride not in (None, 8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r} is unknown: valid are 8, 16, 32")
        kwargs = plain_dict(model_kwargs)
        check_model_kwargs(kwargs, ("model_name", "in_channels"))
        if drop_path_rate is not None:
            kwargs["drop_path_rate"] = drop_path_rate
        for key, value in (("img_size", img_size), ("patch_size", patch_size)):
            if value is not None:
                whole_number(key, value)
                kwargs[key] = value
        if output_stride is not None:
            kwargs["output_stride"] = output_stride
        if window_size is not None:
            whole_number("window_size", window_size)
        windows = (window_size, global_blocks) if window_size else None
        one_of("final_norm", final_norm, (True, False))
        if final_norm and layers is not None:
            raise ValueError("final_norm=True and layers=... were given together: use one")
        source = TimmSource(
            model_name, in_channels, attention_windows=windows, final_norm=final_norm, **kwargs
        )
        if out_depths is not None:
            out_indices = _indices_of_depths(out_depths, source)
        if layers is not None:
            levels = source.levels_by_module(layers)
        elif out_indices is not None:
            indices = _checked_indices(out_indices, source.level_keys, model_name)
            levels = Levels({index: f"p{index}" for index in indices})
        else:
            levels = source.levels_by_stride(out_features)
        super().__init__(
            source,
            levels,
            pretrained=pretrained,
            checkpoint_path=checkpoint_path,
            norm=norm,
            freeze_at=freeze_at,
            fold=fold,
            channels_last=channels_last,
            compile=compile,
            grad_checkpointing=grad_checkpointing,
            lora_rank=lora_rank,
            lora_layers=lora_layers,
        )
        self.indices = {} if levels.by_module else {v: k for k, v in levels.names.items()}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from the yacs keys under MODEL.TIMM, see ``add_backbone_config``."""
        timm_cfg = cfg.MODEL.TIMM
        return {
            "model_name": timm_cfg.MODEL_NAME,
            "pretrained": timm_cfg.PRETRAINED,
            "checkpoint_path": timm_cfg.CHECKPOINT_PATH,
            "in_channels": input_shape.channels,
            "out_features": timm_cfg.OUT_FEATURES or None,
            "norm": timm_cfg.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "output_stride": timm_cfg.OUTPUT_STRIDE or None,
            "img_size": timm_cfg.IMG_SIZE or None,
            "patch_size": timm_cfg.PATCH_SIZE or None,
            "drop_path_rate": timm_cfg.DROP_PATH_RATE or None,
            "grad_checkpointing": timm_cfg.GRAD_CHECKPOINTING,
        }


def _checked_indices(
    out_indices: Sequence[int], valid: Sequence[int], model_name: str
) -> list[int]:
    """``out_indices``, counted from 0 and in ascending order."""
    if isinstance(out_indices, int) or not all(isinstance(i, int) for i in out_indices):
        raise ValueError(f"out_indices={out_indices!r} must be a list of whole numbers")
    count = valid[-1] + 1
    indices = sorted(i + count if i < 0 else i for i in out_indices)
    if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(valid):
        raise ValueError(
            f"out_indices={list(out_indices)} must be different levels of {model_name}, "
            f"{valid[0]} to {valid[-1]}"
        )
    return indices


def _indices_of_depths(out_depths: Sequence[float], source: TimmSource) -> list[int]:
    """timm's indices of the last blocks of so large parts of a plain ViT."""
    try:
        known = all(0 < depth <= 1 and not isinstance(depth, bool) for depth in out_depths)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"out_depths={out_depths!r} must be a list of numbers above 0, up to 1")
    if not source.is_plain_vit:
        raise ValueError(
            f"out_depths={list(out_depths)} needs a plain ViT, whose blocks all give maps of one "
            f"stride, and {source.model_name} is none: out_features takes its levels by stride"
        )
    keys = source.level_keys
    indices = [keys[max(round(depth * len(keys)), 1) - 1] for depth in out_depths]
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(
            f"out_depths={list(out_depths)} must be of different blocks, and of the {len(keys)} of "
            f"{source.model_name} they are the last of {[index + 1 for index in indices]}"
        )
    return indices


def pixel_mean(model_name: str, in_channels: int = 3) -> list[float]:
    """Mean of the images that a timm model was trained on, RGB, in the range 0 to 255.

    Args:
        model_name: as in ``timm.create_model``.
        in_channels: channels of the images; see :func:`detbackbones.backbones.source.per_channel`.
    """
    return TimmSource(model_name, in_channels).pixel_mean


def pixel_std(model_name: str, in_channels: int = 3) -> list[float]:
    """Standard deviation that goes with :func:`pixel_mean`."""
    return TimmSource(model_name, in_channels).pixel_std


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TimmBackbone with a pyramid p2 to p6, from yacs keys."""
    return build_yacs_pyramid(cfg, TimmBackbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TimmBackbone with a pyramid p3 to p7, from yacs keys."""
    return build_yacs_pyramid(cfg, TimmBackbone(cfg, input_shape), retinanet=True)
