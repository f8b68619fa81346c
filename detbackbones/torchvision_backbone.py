"""TorchvisionBackbone: any torchvision classification model as a detectron2 backbone."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import fx, nn
from torchvision.models import VisionTransformer, WeightsEnum
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import StochasticDepth

from .checkpoint import downloading
from .feature_backbone import FeatureBackbone, plain_dict, select_levels
from .freeze import NO_PREFIX, Prefix, frozen_prefix
from .levels import measure_shape, meta_state, run_on_meta, trace
from .messages import nearest, one_of, whole_number
from .norm import NORMS
from .pyramid import build_yacs_pyramid
from .sizes import ANY_SIZE, SizeRule
from .torchvision_vit import VisionTransformerFeatures

# A module that is traced through cannot be put into eval mode alone, as freeze_at does.
TRACER = {"leaf_modules": [StochasticDepth]}


@BACKBONE_REGISTRY.register()
class TorchvisionBackbone(FeatureBackbone):
    """A torchvision classification model as a backbone, its feature maps found by tracing."""

    @configurable
    def __init__(
        self,
        model_name: str,
        *,
        weights: Any = None,
        pretrained: bool = False,
        return_nodes: Mapping[str, str] | Sequence[str] | None = None,
        out_features: Sequence[str] | None = None,
        norm: str = "",
        freeze_at: int = 0,
        fold: bool = True,
        channels_last: bool | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        img_size: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ):
        """
        Args:
            model_name: a name of ``torchvision.models.list_models()``.
            weights: a name ("IMAGENET1K_V2", "DEFAULT") or value of the model's weights enum.
            pretrained: the same as ``weights="DEFAULT"``.
            return_nodes: graph nodes to output and their level names, as in torchvision's
                ``create_feature_extractor``: ``{"layer2": "res3"}``. By default the last output
                before each downsampling block, named by its stride.
            out_features: levels to output, by default those of strides 4 to 32 (or all of
                ``return_nodes``).
            norm: batch norm ``""`` as in the model, ``"FrozenBN"``, ``"SyncBN"`` or ``"BN"``.
            freeze_at: 0 nothing, 1 the stem, 2 up to and including ``res2``, ... 5 all.
            fold: make frozen batch norm a part of the convolution before it; see ``fold_norms``.
            channels_last: the memory format of the maps; None is for where it was measured to help,
                on a CPU in models with batch norm.
            compile: run the model through ``torch.compile``.
            grad_checkpointing: compute maps again in the backward pass instead of keeping them:
                less memory, more time.
            img_size: build a ViT or MaxViT for images of this size. A ViT takes others too, a
                MaxViT takes images up to this size.
            model_kwargs: further arguments for ``torchvision.models.get_model``.

        Raises:
            ValueError: if an argument is out of range or the model cannot give what is asked.
            ConnectionError: if pretrained weights cannot be downloaded.
        """
        names = torchvision.models.list_models(module=torchvision.models)
        if model_name not in names:
            raise ValueError(
                f"model_name={model_name!r} is no torchvision classifier: "
                + nearest(model_name, names)
            )
        one_of("norm", norm, NORMS)
        if pretrained and weights is None:
            weights = "DEFAULT"
        if weights is not None:
            weights = _checked_weights(model_name, weights)

        kwargs = plain_dict(model_kwargs)
        if img_size is not None:
            whole_number("img_size", img_size)
            kwargs |= _size_kwargs(model_name, img_size)
        with downloading(model_name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*initialization of .* will be changed")
            try:
                source = torchvision.models.get_model(model_name, weights=weights, **kwargs)
            except (AssertionError, TypeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"model_name={model_name!r} cannot be built: {reason}") from error
        source_names = source.state_dict()
        if isinstance(source, VisionTransformer) and return_nodes is None:
            source = VisionTransformerFeatures(source)
        try:
            built_for = getattr(source, "image_size", None)  # of a ViT with weights their size
            native = img_size or built_for or _crop_size(model_name)
            sizes, default_nodes = _find_levels(source, native)
        except Exception as error:  # a model may refuse in any way
            reason = str(error).partition("\n")[0]
            raise ValueError(f"model_name={model_name!r} cannot be a backbone: {reason}") from error
        prefix = NO_PREFIX
        if freeze_at != 0:
            whole = _extractor(source, list(default_nodes.values()))
            probe = trace(whole, size=sizes.probe, resample=sizes.resample)
            prefix = frozen_prefix(probe, freeze_at, {})

        if return_nodes is None:
            nodes = {
                default_nodes[name]: name for name in select_levels(out_features, default_nodes)
            }
        else:
            nodes = _checked_nodes(return_nodes, source)
            kept = list(nodes.values()) if out_features is None else out_features
            kept = select_levels(kept, list(nodes.values()))
            nodes = {node: name for node, name in nodes.items() if name in kept}
        extractor = _extractor(source, nodes)
        try:
            measured = trace(extractor, size=sizes.probe, resample=sizes.resample)
        except ValueError as error:
            raise ValueError(f"return_nodes={nodes} cannot be levels: {error}") from error
        _switch_off_dropout(extractor, prefix)
        super().__init__(
            extractor,
            list(nodes.values()),
            sizes=sizes,
            measured=measured,
            norm=norm,
            prefix=prefix,
            fold=fold,
            channels_last=channels_last,
            compile=compile,
            grad_checkpointing=grad_checkpointing,
            source_names=source_names,
        )
        self.model_name = model_name
        self.pixel_mean, self.pixel_std = _pixels(model_name, weights)

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


def _find_levels(model: nn.Module, native: int) -> tuple[SizeRule, dict[str, str]]:
    """The sizes that a model takes, and its levels: any size, or its native one, or resampled."""
    if isinstance(model, VisionTransformerFeatures):
        sizes = SizeRule(model.patch_size)
        (level,) = trace(model, size=sizes.probe).levels
        return sizes, {f"res{level.exponent}": "encoder"}
    failures = []
    for sizes in (ANY_SIZE, SizeRule(native, native), SizeRule(resample=True)):
        try:
            return sizes, find_level_nodes(model, sizes)
        except Exception as error:  # a model may refuse in any way
            failures.append(error)
    raise failures[0]


def find_level_nodes(model: nn.Module, sizes: SizeRule = ANY_SIZE) -> dict[str, str]:
    """Find a model's levels by tracing it.

    A level is what enters the block that halves the resolution, or what the model ends with. The
    block is the largest module in which no other resolution occurs: of a ResNet, ``layer2`` and not
    the strided convolution in it, before which two others have already run.

    Args:
        model: any that torch.fx can trace.
        sizes: the image sizes that it takes.

    Returns:
        level name (``res2`` for stride 4) to graph node, fine to coarse.
    """
    outputs = _run_all(model, sizes.probe)
    classifier = [name for name, _ in model.named_children()][-1] + "."
    if outputs[next(reversed(outputs))].dim() == 4:
        classifier = None
    strides = {
        node: measured[1]
        for node, output in outputs.items()
        if isinstance(output, torch.Tensor)
        and output.dim() == 4
        and not (classifier and node.startswith(classifier))
        and (measured := measure_shape(output.shape, sizes.probe, sizes.resample))
    }
    order = list(strides)
    levels = {}
    coarsest = 1
    for node in order:
        if strides[node] <= coarsest:
            continue
        block = _block(node, strides, {coarsest, strides[node]})
        start = next(i for i, n in enumerate(order) if n == block or n.startswith(block + "."))
        if start:
            levels[coarsest] = order[start - 1]
        coarsest = strides[node]
    if coarsest == 1:
        raise ValueError("it has no feature maps with a whole stride above 1")
    levels[coarsest] = [n for n in order if strides[n] == coarsest][-1]
    return {f"res{stride.bit_length() - 1}": node for stride, node in levels.items()}


def _block(node: str, strides: dict[str, int], allowed: set[int]) -> str:
    """The outermost module around a node in which only the allowed strides occur."""
    parts = node.split(".")
    for depth in range(1, len(parts)):
        path = ".".join(parts[:depth])
        if {s for n, s in strides.items() if n.startswith(path + ".")} <= allowed:
            return path
    return node


def _extractor(model: nn.Module, nodes: Mapping[str, str] | list[str]) -> nn.Module:
    if isinstance(model, VisionTransformerFeatures):
        return model
    extractor = create_feature_extractor(model, nodes, tracer_kwargs=TRACER)
    keys = model.state_dict()
    for name, buffer in list(extractor.named_buffers(recurse=False)):
        if name not in keys:  # a constant of the graph
            extractor.register_buffer(name, buffer, persistent=False)
    return extractor


def _switch_off_dropout(extractor: nn.Module, prefix: Prefix) -> None:
    """Dropout that is a function, whose mode is written in the graph, is off in a frozen prefix."""
    if not isinstance(extractor, fx.GraphModule):
        return
    frozen = bool(prefix.modules)
    for node in extractor.train_graph.nodes:
        if node.op == "call_module":
            frozen = node.target in prefix.modules
        elif frozen and node.kwargs.get("training"):
            node.update_kwarg("training", False)
    extractor.recompile()


def _run_all(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """The output of every node but the input, on the meta device, in the order of execution."""
    nodes = [n for n in get_graph_node_names(model, TRACER)[1] if n != "x"]
    extractor = create_feature_extractor(
        model, train_return_nodes=nodes[:1], eval_return_nodes=nodes, tracer_kwargs=TRACER
    )
    extractor.eval()
    return run_on_meta(extractor, meta_state(extractor), (2, 3, *size))


def _size_kwargs(model_name: str, img_size: int) -> dict[str, Any]:
    """The argument by which a torchvision model is built for an image size."""
    if model_name.startswith("vit_"):
        return {"image_size": img_size}
    if model_name.startswith("maxvit_"):
        return {"input_size": (img_size, img_size)}
    raise ValueError(f"img_size={img_size} has no meaning for {model_name}: it takes any size")


def _crop_size(model_name: str) -> int:
    """The N of the N x N images that a model's weights were evaluated on."""
    weights = torchvision.models.get_model_weights(model_name).DEFAULT
    return weights.transforms().crop_size[0]


def _checked_nodes(
    return_nodes: Mapping[str, str] | Sequence[str], model: nn.Module
) -> dict[str, str]:
    """``return_nodes`` as a dictionary in the order of execution, every node of which exists."""
    if not isinstance(return_nodes, Mapping):
        return_nodes = {name: name for name in return_nodes}
    # node or module -> position of its last operation, for outputs come in the graph's order
    valid = {}
    for position, name in enumerate(get_graph_node_names(model, TRACER)[1]):
        parts = name.split(".")
        valid.update({".".join(parts[:n]): position for n in range(1, len(parts) + 1)})
    for node in return_nodes:
        one_of("return_nodes", node, valid)
    if not return_nodes or len(set(return_nodes.values())) < len(return_nodes):
        raise ValueError(f"return_nodes={dict(return_nodes)} must give different names to nodes")
    return {str(node): str(return_nodes[node]) for node in sorted(return_nodes, key=valid.get)}


def _checked_weights(model_name: str, weights: Any) -> WeightsEnum:
    """The member of the model's own enum that ``weights`` is or names."""
    enum = torchvision.models.get_model_weights(model_name)
    name = str(weights).removeprefix(f"{enum.__name__}.")
    one_of("weights", name, [*(member.name for member in enum), "DEFAULT"])
    return enum[name]


def _pixels(model_name: str, weights: WeightsEnum | None) -> tuple[Any, Any]:
    """Mean and deviation that go with weights; without, those that all the model's weights have."""
    kinds = [weights] if weights else torchvision.models.get_model_weights(model_name)
    found = {(*each.transforms().mean, *each.transforms().std) for each in kinds}
    if len(found) > 1:
        return None, None
    values = [255 * value for value in found.pop()]
    return values[:3], values[3:]


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TorchvisionBackbone with a pyramid p2 to p6, from yacs keys."""
    return build_yacs_pyramid(cfg, TorchvisionBackbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """TorchvisionBackbone with a pyramid p3 to p7, from yacs keys."""
    return build_yacs_pyramid(cfg, TorchvisionBackbone(cfg, input_shape), retinanet=True)
