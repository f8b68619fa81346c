"""TorchvisionBackbone: any torchvision classification model as a detectron2 backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from ..config import check_model_kwargs, plain_dict
from ..measure.levels import select_levels
from ..messages import first_line, one_of, whole_number
from .feature_backbone import FeatureBackbone
from .pyramid import build_yacs_pyramid
from .source import Levels
from .torchvision_graph import check_nodes
from .torchvision_source import TorchvisionSource


@BACKBONE_REGISTRY.register()
class TorchvisionBackbone(FeatureBackbone):
    """A torchvision classification model as a backbone, its feature maps found by tracing."""

    source_class = TorchvisionSource

    @configurable
    def __init__(
        self,
        model_name: str,
        in_channels: int = 3,
        *,
        weights: Any = None,
        pretrained: bool | None = None,
        checkpoint_path: str = "",
        return_nodes: Mapping[str, str] | Sequence[str] | None = None,
        out_features: Sequence[str] | None = None,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        norm: str = "",
        freeze_at: int = 0,
        fold: bool = True,
        channels_last: bool | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        lora_rank: int = 0,
        lora_layers: Sequence[str] = (),
        img_size: int | None = None,
        drop_path_rate: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ):
        """
        Args:
            model_name: a name of ``torchvision.models.list_models()``.
            in_channels: channels of the input; weights of another number are adapted as timm does.
            weights: a name ("IMAGENET1K_V2", "DEFAULT") or value of the model's weights enum.
            pretrained: True is the same as ``weights="DEFAULT"`` where none are named; False builds
                the model that ``weights`` are for without loading them.
            checkpoint_path: a ``.pth``, ``.pt`` or ``.safetensors`` file of the classification
                model, or of a detector trained with this backbone.
            return_nodes: graph nodes to output and their level names, as in torchvision's
                ``create_feature_extractor``: ``{"layer2": "res3"}``. By default the last output
                before each downsampling block, named by its stride.
            out_features: levels to output, by default those of strides 4 to 32 (or all of
                ``return_nodes``).
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
            img_size: build a ViT or MaxViT for images of this size. A ViT takes others too, a
                MaxViT takes images up to this size.
            drop_path_rate: stochastic depth, in models that have it.
            model_kwargs: further arguments for ``torchvision.models.get_model``.

        Raises:
            ValueError: if an argument is out of range or the model cannot give what is asked.
            FileNotFoundError: if ``checkpoint_path`` does not exist.
            ConnectionError: if pretrained weights cannot be downloaded.
        """
        if pretrained is not None:
            one_of("pretrained", pretrained, (True, False))
        whole_number("in_channels", in_channels)
        others = {"return_nodes": return_nodes, "out_features": out_features}
        if layers is not None and (given := [k for k, v in others.items() if v is not None]):
            raise ValueError(f"layers={layers} and {given[0]} were given together: use one")
        kwargs = plain_dict(model_kwargs)
        check_model_kwargs(kwargs, ("model_name", "in_channels", "weights"))
        if drop_path_rate is not None:
            kwargs["drop_path_rate"] = drop_path_rate
        if img_size is not None:
            whole_number("img_size", img_size)
            kwargs["img_size"] = img_size
        if pretrained and weights is None:
            weights = "DEFAULT"
        source = TorchvisionSource(model_name, in_channels, weights=weights, **kwargs)
        if layers is not None:
            levels = source.levels_by_module(layers)
        elif return_nodes is None:
            levels = source.levels_by_stride(out_features)
        else:
            nodes = check_nodes(return_nodes, source.model)
            valid = list(nodes.values())
            kept = select_levels(valid if out_features is None else out_features, valid)
            levels = Levels({node: name for node, name in nodes.items() if name in kept})
            try:
                source.fit(levels)
            except ValueError as error:
                raise ValueError(
                    f"return_nodes={dict(levels.names)} cannot be levels: {first_line(error)}"
                ) from error
        super().__init__(
            source,
            levels,
            pretrained=weights is not None and pretrained is not False,
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

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from the yacs keys under MODEL.TORCHVISION, see ``add_backbone_config``."""
        torchvision_cfg = cfg.MODEL.TORCHVISION
        return {
            "model_name": torchvision_cfg.MODEL_NAME,
            "weights": torchvision_cfg.WEIGHTS or None,
            "out_features": torchvision_cfg.OUT_FEATURES or None,
            "norm": torchvision_cfg.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "grad_checkpointing": torchvision_cfg.GRAD_CHECKPOINTING,
        }


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TorchvisionBackbone with a pyramid p2 to p6, from yacs keys."""
    return build_yacs_pyramid(cfg, TorchvisionBackbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TorchvisionBackbone with a pyramid p3 to p7, from yacs keys."""
    return build_yacs_pyramid(cfg, TorchvisionBackbone(cfg, input_shape), retinanet=True)
